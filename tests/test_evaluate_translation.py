"""Tables of translations: reference rows, ranks among targets, distances, and the command on files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pushforward.cli import app
from pushforward.cli.evaluate_translation import matches
from pushforward.data.pictures import to_bytes
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import Reference, Sample
from pushforward.evaluation.pairs import pixels, psnr, ssim
from pushforward.evaluation.translation import PIXELS, Space, Words, compare, space, table
from pushforward.vision.features import FeatureNet
from support.helpers import normal

SHAPE = (3, 12, 12)
runner = CliRunner()


def some_images(count, seed=0, channels=3):
    """In [-1, 1], and values of 8 bits, so that files keep them."""
    values = (0.4 * normal(count, channels, *SHAPE[1:], seed=seed)).clamp(-1, 1).float()
    return to_bytes(values).float() / 127.5 - 1


def by_name(rows):
    return {row.name: row for row in rows}


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_copy_is_the_floor_and_the_truth_the_bound():
    source, truth = some_images(6, 1), some_images(6, 2)
    half = (source + truth) / 2
    rows = compare({"half": half}, source, truth, some_images(20, 3))
    assert [row.name for row in rows] == ["copy", "truth", "half"]
    copied, true, mixed = (row.measures for row in rows)
    assert copied["psnr"] == true["truth_psnr"] == math.inf
    assert copied["ssim"] == pytest.approx(1, abs=1e-5)
    assert true["truth_ssim"] == pytest.approx(1, abs=1e-5)
    assert copied["l2"] == copied["identity"] == true["truth_l2"] == 0
    assert (true["rank"], true["top1"], true["top10"]) == (1, 1, 1)
    assert copied["truth_psnr"] == pytest.approx(true["psnr"], rel=1e-6)  # the measure does not know which is which
    assert mixed["l2"] == pytest.approx(true["l2"] / 2, rel=1e-5)
    assert mixed["identity"] == pytest.approx(true["identity"] / 2, rel=1e-5)
    assert true["identity"] == pytest.approx(float((source - truth).abs().max()))
    assert all(row.count == 6 and row.space == "pixels" for row in rows)


def test_means_have_the_standard_errors_of_means():
    """Against NumPy; 1e-6 for float32."""
    source, output = some_images(7, 1), some_images(7, 2)
    row = by_name(compare({"a": output}, source))["a"]
    for key, values in {"psnr": psnr(output, source), "ssim": ssim(output, source)}.items():
        assert row.measures[key] == pytest.approx(float(values.mean()), rel=1e-6)
        assert row.measures[f"{key}_error"] == pytest.approx(np.std(values.numpy(), ddof=1) / 7**0.5, rel=1e-5)
        torch.testing.assert_close(row.values[key], values)
    assert not {"truth_psnr", "rank", "frechet", "clip", "lpips"} & set(row.measures)


def test_one_image_has_no_standard_error():
    row = compare({"a": some_images(1, 2)}, some_images(1, 1), some_images(1, 3))[-1]
    assert "psnr" in row.measures
    assert "psnr_error" not in row.measures


def test_partners_are_looked_for_among_targets_and_truths_each_once():
    """Outputs near the next image's truth: that one is found first, the own truth at the place of its distance."""
    truth, others = some_images(5, 2), some_images(30, 3)
    targets = torch.cat([others, truth, truth])  # the truths are among them, twice
    shifted = truth.roll(-1, 0)
    rows = by_name(compare({"own": truth * 0.99, "next": shifted * 0.99}, some_images(5, 1), truth, targets))
    assert rows["own"].measures["top1"] == 1
    assert rows["own"].values["rank"].tolist() == [1] * 5
    assert rows["next"].measures["top1"] == 0
    points, every = pixels(shifted * 0.99), pixels(torch.cat([truth, others]))
    order = torch.cdist(points.double(), every.double()).argsort(1)
    places = [int((order[k] == k).nonzero()) + 1 for k in range(5)]
    assert rows["next"].values["rank"].tolist() == places
    assert rows["next"].measures["rank"] == sorted(places)[2]
    assert rows["next"].measures["top10"] == sum(place <= 10 for place in places) / 5
    assert any("among 35 images" in note and "18" in note for note in rows["own"].notes)


def test_without_targets_partners_are_looked_for_among_the_truths():
    rows = compare({}, some_images(4, 1), some_images(4, 2))
    assert rows[1].measures["rank"] == 1
    assert any("among 4 images" in note for note in rows[1].notes)
    alone = compare({}, some_images(1, 1), some_images(1, 2))
    assert any("among 1 image; by chance its rank is 1." in note for note in alone[1].notes)


def test_distances_to_the_target_set_are_those_of_their_module():
    """1e-9: the same function of the same features."""
    source, targets = some_images(110, 1), some_images(130, 2)
    near = targets[:110]
    rows = by_name(compare({"near": near}, source, None, targets, times=5))
    reference = Reference.of(pixels(targets))
    for name, images in {"near": near, "copy": source}.items():
        sample = Sample(pixels(images), reference)
        assert rows[name].measures["frechet"] == pytest.approx(sample.frechet(), rel=1e-9)
        assert rows[name].measures["kernel"] == pytest.approx(sample.kernel(), rel=1e-9)
        assert rows[name].measures["frechet_error"] > 0
    assert rows["near"].measures["frechet"] < rows["copy"].measures["frechet"]
    assert not rows["near"].notes


@pytest.mark.parametrize(("count", "m"), [(99, 130), (110, 99)])
def test_few_images_have_no_distances_and_it_is_said(count, m):
    rows = compare({}, some_images(count, 1), None, some_images(m, 2))
    assert "frechet" not in rows[0].measures
    assert f"at least 100 images of each kind; there are {count} and {m}" in table(rows)


def test_features_of_a_network_are_taken_from_bytes_and_compared_by_angle():
    class Means(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.float().mean((2, 3))

    chosen = space(FeatureNet("Means", Means(), ""), batch=2)
    source, truth = some_images(3, 1), some_images(3, 2)
    assert chosen.metric == "cosine"
    torch.testing.assert_close(chosen.features(truth), to_bytes(truth).float().mean((2, 3)))
    row = compare({}, source, truth, None, chosen)[1]
    assert (row.space, row.measures["rank"]) == ("Means", 1)
    assert "rank Means" in table([row])


def test_a_plain_function_will_do_for_features():
    source, truth = some_images(3, 1), some_images(3, 2)
    by_function = compare({}, source, truth, None, pixels)
    by_space = compare({}, source, truth, None, Space("features", pixels))
    assert by_function[0].measures == by_space[0].measures == compare({}, source, truth, None, PIXELS)[0].measures


def test_clip_tells_of_each_image(clip):
    """The batch changes nothing but float32's rounding, 1e-5; the copy has no direction."""
    source, output = some_images(5, 1), some_images(5, 2)
    before, after = ["a cat"], ["a dog", "a mat", "a red dog", "a big dog", "a blue mat"]
    rows = by_name(compare({"a": output}, source, words=Words(clip, before, after), batch=2))
    torch.testing.assert_close(rows["a"].values["clip"], clip.similarity(output, after), rtol=1e-5, atol=1e-5)
    direction = clip.directional(source, output, "a cat", after)
    torch.testing.assert_close(rows["a"].values["directional"], direction, rtol=1e-5, atol=1e-5)
    assert rows["copy"].measures["directional"] == 0
    assert "CLIP direction" in table(list(rows.values()))


def test_lpips_is_taken_where_asked():
    source, truth = (torch.rand(2, 1, 32, 32) * 2 - 1 for _ in range(2))
    row = compare({}, source, truth, perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)))[0]
    assert row.measures["lpips"] == 0
    assert row.measures["truth_lpips"] == pytest.approx(float((source - truth).abs().mean()), rel=1e-5)


def test_small_images_are_compared_without_ssim():
    a, b = torch.rand(2, 2, 1, 6, 6)
    rows = compare({"a": a}, b)
    assert "ssim" not in rows[0].measures
    assert "SSIM is left out" in table(rows)
    assert "SSIM " not in table(rows).splitlines()[0]


def test_every_row_is_told_of():
    told = []
    compare({"a": some_images(2, 2)}, some_images(2, 1), some_images(2, 3), callback=told.append)
    assert told == ["copy", "truth", "a"]


@pytest.mark.parametrize(
    ("rows", "targets", "said"),
    [
        ({"a": torch.zeros(3, *SHAPE)}, None, r"images of a are \(3, 3, 12, 12\), those of the source \(2"),
        ({"a": torch.full((2, *SHAPE), torch.nan)}, None, "images of a are not all finite"),
        ({"copy": torch.zeros(2, *SHAPE)}, None, "call the method 'copy' by another name"),
        ({}, torch.zeros(9, 1, 12, 12), r"Targets are images of the shape \(3, 12, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused(rows, targets, said):
    with pytest.raises(PushforwardError, match=said):
        compare(rows, some_images(2), None, targets)


def test_a_table_is_of_one_feature_space():
    rows = compare({}, some_images(2)) + compare({}, some_images(2), features=Space("other", pixels))
    with pytest.raises(PushforwardError, match="pixels and other"):
        table(rows)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "other", "found"),
    [
        (["a", "b", "c"], ["c", "a", "x"], {0: 1, 2: 0}),
        (["cat/1", "dog/1"], ["dog/1", "cat/1"], {0: 1, 1: 0}),
        (["cats/a", "cats/b"], ["b", "a"], {0: 1, 1: 0}),
        (["0", "1", "2"], ["img/002", "img/000"], {0: 1, 2: 0}),
        (["a", "b"], ["c", "d"], {}),
    ],
)
def test_images_are_matched_by_name_then_stem_then_number(source, other, found):
    assert matches(source, other) == found


def test_names_that_are_not_unique_are_refused():
    with pytest.raises(PushforwardError, match=r"called 'a' \(x/a and y/a\)"):
        matches(["x/a", "y/a"], ["a"])


# -- the command ------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return runner.invoke(app, ["evaluate-translation", *(str(a) for a in arguments), "-q"])


def written(path, images, names=None):
    path.mkdir(parents=True)
    for k, image in enumerate(to_bytes(images)):
        name = names[k] if names else f"{k:03d}"
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path / f"{name}.png")
    return path


def test_folders_and_npz_files_give_a_table_and_a_report(tmp_path):
    source, truth, output = some_images(5, 1), some_images(5, 2), some_images(5, 3)
    here = written(tmp_path / "source", source)
    true, folder_out = (
        written(tmp_path / "truth", truth),
        written(tmp_path / "out", output[1:], ["001", "002", "003", "004"]),
    )
    arrays = tmp_path / "other.npz"
    np.savez(arrays, x_test=to_bytes(output).permute(0, 2, 3, 1).numpy())
    targets = written(tmp_path / "targets", torch.cat([truth, some_images(7, 4)]))
    report, text = tmp_path / "report.json", tmp_path / "table.txt"
    result = invoke(folder_out, arrays, "--source", here, "--truth", true, "--target-set", targets, "--json", report,
                    "--out", text)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{here}: 4 of 5 images used" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["method", "images"]
    assert [line.split()[0] for line in lines[1:5]] == ["copy", "truth", str(folder_out), str(arrays)]
    assert "rank pixels" in lines[0]
    assert text.read_text().rstrip() == result.stdout.rstrip()
    values = json.loads(report.read_text())
    assert values["count"] == 4
    assert values["images"] == ["001", "002", "003", "004"]
    rows = {row["name"]: row["measures"] for row in values["rows"]}
    truth_row = by_name(compare({"a": output[1:]}, source[1:], truth[1:], torch.cat([truth, some_images(7, 4)])))["a"]
    assert rows[str(folder_out)] == rows[str(arrays)]
    assert rows[str(folder_out)] == pytest.approx(dict(truth_row.measures), rel=1e-6)
    assert rows["copy"]["psnr"] is None  # infinite, which JSON cannot say
    assert any("among 12 images" in note for note in values["notes"])


def test_outputs_of_another_size_are_brought_to_the_sources_and_it_is_said(tmp_path):
    here = written(tmp_path / "source", some_images(2, 1))
    larger = written(tmp_path / "out", torch.rand(2, 1, 24, 24) * 2 - 1)
    result = invoke(larger, "--source", here)
    assert result.exit_code == 0, result.output
    assert "resized from 24x24 to 12x12" in result.stderr
    assert "made colour from grey" in result.stderr


def test_clip_by_the_command(tmp_path, clip_folder):
    here, out = written(tmp_path / "source", some_images(3, 1)), written(tmp_path / "out", some_images(3, 2))
    words = ("--clip", clip_folder, "--source-prompt", "a cat", "--target-prompt", "a dog")
    result = invoke(out, "--source", here, *words, "--json", "-")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["measures"] for row in json.loads(result.stdout)["rows"]}
    assert rows["copy"]["directional"] == 0
    assert abs(rows[str(out)]["directional"]) > 1e-3
    refused = invoke(out, "--source", here, *words[:4])
    assert "all of --clip, --source-prompt and --target-prompt" in str(refused.exception)


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["x", "y"], [], "No image of .*out has the name of one of .*source"),
        (["000", "001"], ["--features", "nothing"], "no feature network"),
        (["000", "001"], ["--truth", "missing"], "missing"),
        (["000", "001"], ["--lpips", "alex"], "LPIPS needs images of at least"),
    ],
)
def test_faults_are_one_sentence(tmp_path, names, options, said):
    here, out = written(tmp_path / "source", some_images(2, 1)), written(tmp_path / "out", some_images(2, 2), names)
    result = invoke(out, "--source", here, *options)
    assert isinstance(result.exception, PushforwardError)
    assert result.exit_code == 1
    with pytest.raises(PushforwardError, match=said):
        raise result.exception


def test_outputs_that_have_no_image_in_common_are_refused(tmp_path):
    here = written(tmp_path / "source", some_images(2, 1))
    one, two = written(tmp_path / "a", some_images(1), ["000"]), written(tmp_path / "b", some_images(1), ["001"])
    result = invoke(one, two, "--source", here)
    assert "all have one of" in str(result.exception)
    assert "named twice" in str(invoke(one, one, "--source", here).exception)
