"""`translate`, `edit`, `encode`, `decode` and `interpolate` as a user runs them, on images as they come off a disk."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pushforward import cli
from pushforward.data.datasets import read_image
from pushforward.data.locks import alone
from pushforward.errors import PushforwardError
from pushforward.evaluation.pairs import ssim
from pushforward.linear import VP
from pushforward.maps.spec import parse
from pushforward.maps.storage import load_codes, save_codes
from pushforward.model import load_model, save_model
from pushforward.plan import save_plan
from support.cli import invoke, refused
from support.models import reading, saved
from support.pictures import pixels, places

SIDE = 12
TEXTS = ["--source-prompt", "a cat", "--target-prompt", "a dog"]
LIMIT = 1e-4  # what a code may lose of an image by rounding


def main(monkeypatch, *arguments):
    """The exit code of the real command line."""
    monkeypatch.setattr("sys.argv", ["pushforward", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two that read, one with classes, and one that reads and makes images too small for SSIM."""
    root = tmp_path_factory.mktemp("models")
    one, other = reading(side=SIDE), reading(side=SIDE)
    with torch.no_grad():
        for p in other.module.parameters():
            p.mul_(1.1)
    for name, model in (("one", one), ("other", other), ("small", reading())):
        save_model(model, root / name)
    saved(VP(), root / "classes")
    return {folder.name: folder for folder in root.iterdir()}


def noise(*shape, seed=0, kind=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Seven pictures of the models' size, two of them in a folder of their own."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    for i in range(7):
        Image.fromarray(noise(SIDE, SIDE, 3, seed=i)).save(folder / ("deep" if i > 4 else ".") / f"{i}.png")
    return folder


NAMES = ["0", "1", "2", "3", "4", "deep/5", "deep/6"]


@pytest.fixture
def translating(models, tmp_path):
    """Run `translate` to a folder, and hand back its report."""

    def run(images, *options, out=None, source=None, texts=TEXTS):
        out = out or tmp_path / "out"
        report = tmp_path / "report.json"
        source = models["one"] if source is None else source
        result = invoke("translate", images, "--source", source, "--steps", 3, *texts, "--out", out, "--json", report,
                        "-q", *options)  # fmt: skip
        assert result.exit_code == 0, result.exception
        return json.loads(report.read_text())

    return run


def results(folder):
    found = sorted(path for path in (folder / "images").rglob("*.png"))
    names = {path.relative_to(folder / "images").with_suffix("").as_posix(): path for path in found}
    return {name: path for name, path in names.items() if not path.name.startswith(".")}  # left where one was killed


# -- translate


def test_translate_writes_images_a_sheet_and_a_report(models, pictures, translating, tmp_path):
    report = translating(pictures, "--target", models["other"])
    out = tmp_path / "out"
    assert list(results(out)) == NAMES
    assert (report["count"], report["done_before"], report["skipped"], report["notes"]) == (7, 0, {}, [])
    assert (report["nfe"], report["rounds"], report["method"]) == (3 + 3, 1 + 3, "stochastic")
    assert len(report["times"]) == 3 + 1  # .85 of three steps is three
    assert [row["name"] for row in report["images"]] == NAMES
    for row in report["images"]:
        given, found = pixels(pictures / f"{row['name']}.png"), pixels(out / "images" / f"{row['name']}.png")
        expected = 10 * math.log10(255**2 / ((given - found) ** 2).mean())
        assert row["psnr_to_source"] == pytest.approx(expected, abs=1e-6)
        assert given.shape == found.shape == (SIDE, SIDE, 3)
        assert abs(given - found).max() > 5
    sheet = pixels(out / "sheet.png")
    above, below = (places(sheet, pixels(path), 96 // SIDE) for path in (pictures / "0.png", out / "images" / "0.png"))
    assert len(above) == len(below) == 1
    assert above[0][1] == below[0][1]  # one column
    assert above[0][0] + 96 <= below[0][0]


@pytest.mark.parametrize("method", ["stochastic", "independent", "deterministic", "sdedit"])
def test_an_image_does_not_depend_on_its_batch_or_place(pictures, translating, tmp_path, method):
    """Float32 rounding may carry a value over the edge between two of 256 levels, no further.

    Of an inversion, what it allows itself (1e-4) times what a few coarse steps make of it.
    """
    for size in (7, 2, 1):
        translating(pictures, "--method", method, "--batch", size, "--refine", 0.4, out=tmp_path / str(size))
    translating(pictures / "deep" / "6.png", "--method", method, "--refine", 0.4, out=tmp_path / "alone")
    whole = {name: pixels(path) for name, path in results(tmp_path / "7").items()}
    for size in (2, 1):
        for name, path in results(tmp_path / str(size)).items():
            assert abs(pixels(path) - whole[name]).max() <= 1
    assert abs(pixels(tmp_path / "alone" / "images" / "6.png") - whole["deep/6"]).max() <= 1


def test_another_seed_gives_another_translation(pictures, translating, tmp_path):
    for seed in (0, 1):
        translating(pictures / "0.png", "--seed", seed, out=tmp_path / str(seed))
    one, other = (pixels(tmp_path / str(seed) / "images" / "0.png") for seed in (0, 1))
    assert abs(one - other).max() > 5


def test_an_interrupted_translation_goes_on_and_comes_out_the_same(pictures, translating, tmp_path):
    """One image at a time, so that not a bit differs."""
    translating(pictures, "--batch", 1)
    found = results(tmp_path / "out")
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in found.items()}
    for name in ("2", "deep/5"):
        found[name].unlink()
    (tmp_path / "out" / "sheet.png").unlink()
    report = translating(pictures, "--batch", 1)
    assert report["done_before"] == 5
    assert report["count"] == 7
    assert report["notes"] == ["there already: 5 results"]
    for name, path in results(tmp_path / "out").items():
        assert path.read_bytes() == before[name][0]
        assert (path.stat().st_mtime_ns == before[name][1]) is (name not in ("2", "deep/5"))
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert translating(pictures, "--batch", 1)["done_before"] == 7


@pytest.mark.parametrize(
    ("options", "which"),
    [
        (["--seed", 1], "seed"), (["--start", 0.5], "sampler"), (["--target-guidance", 2], "target_guidance"),
        (["--method", "sdedit"], "method"), (["--refine", 0.4], "refine"),
    ],
)  # fmt: skip
def test_results_of_other_settings_are_not_mixed(models, pictures, translating, tmp_path, options, which):
    translating(pictures / "0.png")
    again = ["translate", pictures / "0.png", "--source", models["one"], "--steps", 3, *TEXTS, "-q"]
    before = (tmp_path / "out" / "images" / "0.png").read_bytes()
    refused(invoke(*again, "--out", tmp_path / "out", *options), f"results of other settings ({which} differ)")
    assert (tmp_path / "out" / "images" / "0.png").read_bytes() == before


def test_results_of_other_images_are_not_mixed(models, pictures, translating, tmp_path):
    """An image of the same name is another one."""
    (tmp_path / "more").mkdir()
    shutil.copy(pictures / "1.png", tmp_path / "more" / "0.png")
    translating(pictures / "0.png")
    again = ["translate", tmp_path / "more" / "0.png", "--source", models["one"], "--steps", 3, *TEXTS, "-q"]
    refused(invoke(*again, "--out", tmp_path / "out"), "holds results of other images")


def test_a_folder_in_which_nothing_was_made_may_be_used_again(models, pictures, translating, tmp_path):
    """What was wrong was said, and is mended by the next command."""
    wrong = ["translate", pictures, "--source", models["one"], "--steps", 3, *TEXTS, "-q", "--out", tmp_path / "out"]
    refused(invoke(*wrong, "--eta", 0), "has no noises to find")
    assert translating(pictures / "0.png")["count"] == 1


def shown(folder):
    return {name: pixels(path).tobytes() for name, path in results(folder).items()}


@pytest.fixture
def mine(models, tmp_path):
    """A model and pictures of one's own, to change behind their names."""
    shutil.copytree(models["one"], tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name, seed in {"a.png": 30, "c.png": 31}.items():
        Image.fromarray(noise(SIDE, SIDE, 3, seed=seed)).save(tmp_path / "in" / name)
    return tmp_path


def stretched(folder, by=1.05):
    """Other weights in the place of a model's."""
    path = folder / "model.safetensors"
    save_file({name: by * tensor for name, tensor in load_file(path).items()}, path)


def test_an_image_overwritten_with_another_is_translated_again(mine, translating):
    """Alone, in place, and as if for the first time; the same pixels in another file are the same image."""
    options = ["--source", mine / "model", "--batch", 1]
    translating(mine / "in", *options)
    before = shown(mine / "out")
    Image.fromarray(noise(SIDE, SIDE, 3, seed=32)).save(mine / "in" / "a.png")
    with Image.open(mine / "in" / "c.png") as picture:
        picture.copy().save(mine / "in" / "c.png", compress_level=0)
    report = translating(mine / "in", *options)
    assert (report["done_before"], report["count"]) == (1, 2)
    assert "made again, as of other images, weights or texts: 1 result" in report["notes"]
    translating(mine / "in", *options, out=mine / "fresh")
    assert shown(mine / "out") == shown(mine / "fresh")
    assert shown(mine / "out")["c"] == before["c"]
    assert shown(mine / "out")["a"] != before["a"]


def test_results_of_replaced_weights_are_made_again(mine, translating):
    options = ["--source", mine / "model", "--batch", 1]
    translating(mine / "in", *options)
    before = shown(mine / "out")
    stretched(mine / "model")
    assert translating(mine / "in", *options)["done_before"] == 0
    translating(mine / "in", *options, out=mine / "fresh")
    assert shown(mine / "out") == shown(mine / "fresh")
    assert all(shown(mine / "out")[name] != before[name] for name in before)
    assert translating(mine / "in", *options)["done_before"] == 2


def test_each_image_keeps_its_result_whatever_images_come(mine, translating):
    """Each result is what its image gives alone: the same stem, case, folder or normal form is another image."""
    options = ["--source", mine / "model", "--batch", 1]
    translating(mine / "in", *options)
    before = {name: path.stat().st_mtime_ns for name, path in results(mine / "out").items()}
    names = ["A.png", "a.bmp", "a-2.png", "sub/a.png", "sub_a.png", "\u00e9.png", "e\u0301.png", "d.png/x.png", "d.bmp"]
    for seed, name in enumerate(names):
        (mine / "in" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(SIDE, SIDE, 3, seed=40 + seed)).save(mine / "in" / name)
    report = translating(mine / "in", *options)
    assert report["done_before"] == 2
    found = {row["name"]: row["source"] for row in report["images"]}
    assert len(found) == len(names) + 2
    assert len({name.casefold() for name in found}) == len(found)
    assert (found["a"], found["c"]) == (str(mine / "in" / "a.png"), str(mine / "in" / "c.png"))
    for name, source in found.items():
        (alone := mine / "alone").mkdir(exist_ok=True)
        shutil.copy(source, alone / f"x{Path(source).suffix}")
        translating(alone, *options, out=mine / "each")
        assert shown(mine / "each")["x"] == shown(mine / "out")[name], (name, source)
        shutil.rmtree(alone), shutil.rmtree(mine / "each")
    for name, time in before.items():
        assert results(mine / "out")[name].stat().st_mtime_ns == time
    assert translating(mine / "in", *options)["done_before"] == len(found)


def test_results_that_tell_nothing_of_themselves_are_made_again(mine, translating):
    """As earlier versions left them, or another program has."""
    translating(mine / "in", "--source", mine / "model")
    Image.fromarray(noise(SIDE, SIDE, 3, seed=50)).save(mine / "out" / "images" / "a.png")
    (mine / "out" / "images" / "c.png").write_bytes(b"")
    report = translating(mine / "in", "--source", mine / "model")
    assert (report["done_before"], report["count"]) == (0, 2)
    translating(mine / "in", "--source", mine / "model", out=mine / "fresh")
    assert shown(mine / "out") == shown(mine / "fresh")
    (mine / "out" / "names.json").write_text("[")
    (mine / "out" / "settings.json").unlink()
    assert translating(mine / "in", "--source", mine / "model")["done_before"] == 2


def test_a_result_that_is_cut_off_is_made_again(mine, translating):
    """As a disk leaves it that lost its power: what it was made of can be read, and the picture cannot."""
    translating(mine / "in", "--source", mine / "model")
    whole, path = shown(mine / "out"), mine / "out" / "images" / "a.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert translating(mine / "in", "--source", mine / "model")["done_before"] == 1
    assert shown(mine / "out") == whole


def test_a_killed_translation_goes_on(mine, translating):
    """By SIGKILL, which lets nothing be tidied; its lock is gone with it, and while it lives it is alone."""
    for seed in range(12):
        Image.fromarray(noise(SIDE, SIDE, 3, seed=seed)).save(mine / "in" / f"{seed:02d}.png")
    command = ["translate", mine / "in", "--source", mine / "model", "--steps", 3, *TEXTS, "--batch", 1, "-q", "--out",
               mine / "out"]  # fmt: skip
    with subprocess.Popen([sys.executable, "-m", "pushforward", *map(str, command)]) as running:
        while running.poll() is None and len(results(mine / "out")) < 2:
            sleep(0.01)
        refused(invoke(*command), "Another process is at work on")
        running.kill()
    left = len(results(mine / "out"))
    assert 2 <= left < 14
    assert translating(mine / "in", "--source", mine / "model", "--batch", 1)["done_before"] == left
    translating(mine / "in", "--source", mine / "model", "--batch", 1, out=mine / "fresh")
    assert shown(mine / "out") == shown(mine / "fresh")


COMMANDS = {
    "translate": ["x.png", "--source", "m"], "edit": ["x.png", "--model", "m", "--source", "a", "--target", "b"],
    "inpaint": ["m", "x.png", "--mask", "x.png"], "guide": ["m", "--energy", "chi"], "evaluate": ["m", "--data", "d"],
    "encode": ["m", "x.png"], "decode": ["c.safetensors"], "sample": ["m"], "invert": ["m", "x.png"],
    "interpolate": ["c.safetensors"], "plot-plan": ["m"], "train": ["--data", "d"],
    "evaluate-translation": ["x", "--source", "y"], "watermark-embed": ["m", "--key", "k"],
    "learn-plan": ["m"],
}  # fmt: skip


@pytest.mark.parametrize("command", cli.command_names())
def test_no_command_writes_where_another_process_is_at_work(tmp_path, monkeypatch, command):
    if command in ("likelihood", "models", "studio", "watermark-read"):
        pytest.skip("it writes nothing")
    monkeypatch.chdir(tmp_path)
    place = [] if command == "train" else ["--out"]
    with alone(tmp_path / "out"):
        refused(invoke(command, *COMMANDS[command], *place, "out"), "Another process is at work on out")
    assert not list(tmp_path.iterdir())


def test_results_among_the_images_are_not_translated_again(models, pictures, translating, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    for done in (0, 7):
        report = translating(mine, out=mine / "translated")
        assert (report["count"], report["done_before"]) == (7, done)
    again = ["translate", mine, "--source", models["one"], "--steps", 3, *TEXTS, "-q", "--out", mine]
    refused(invoke(*again), "The results cannot lie among the images")


def test_images_of_one_name_get_results_of_their_own(pictures, translating, tmp_path):
    files = [tmp_path / place for place in ("a/x.png", "b/x.png", "c/x-2.png", "d/x.jpg")]
    for i, file in enumerate(files):
        file.parent.mkdir()
        Image.fromarray(noise(SIDE, SIDE, 3, seed=20 + i)).save(file)
    report = translating(files[0], *files[1:])
    assert len(results(tmp_path / "out")) == len({row["name"] for row in report["images"]}) == 4
    assert [row["source"] for row in report["images"]] == [str(file) for file in files]


def picture_file(folder, kind):
    """A picture as it may lie on a disk."""
    path = folder / "x.png"
    match kind:
        case "another size":
            Image.fromarray(noise(30, 41, 3)).save(path)
        case "alpha":
            Image.fromarray(noise(SIDE, SIDE, 4)).save(path)
        case "palette":
            Image.fromarray(noise(SIDE, SIDE, 3)).quantize(16).save(path)
        case "clear palette":
            Image.fromarray(noise(SIDE, SIDE, 3)).quantize(4).save(path, transparency=1)
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray(noise(SIDE, 2 * SIDE, 3)).save(path, exif=exif)
        case "16 bits":
            Image.fromarray(noise(SIDE, SIDE, kind=np.uint16)).save(path)
        case "CMYK":
            path = folder / "x.jpg"
            Image.fromarray(noise(SIDE, SIDE, 3)).convert("CMYK").save(path)
        case "grey":
            Image.fromarray(noise(SIDE, SIDE)).save(path)
        case "black and white":
            Image.fromarray(noise(SIDE, SIDE)).convert("1").save(path)
        case "animation":
            path = folder / "x.gif"
            frames = [Image.fromarray(noise(SIDE, SIDE, 3, seed=seed)) for seed in (0, 1)]
            frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("another size", ["1 image cropped around the centre and resized from 41x30 to 12x12"]),
        ("alpha", ["1 image put on white where transparent"]),
        ("palette", []),
        ("clear palette", ["1 image put on white where transparent"]),
        ("turned", ["1 image turned as their EXIF data say", "1 image cropped around the centre from 12x24 to 12x12"]),
        ("16 bits", ["1 image brought from 16 to 8 bits", "1 image made colour from grey"]),
        ("CMYK", ["1 image converted to sRGB from CMYK without a profile"]),
        ("grey", ["1 image made colour from grey"]),
        ("black and white", ["1 image made colour from grey"]),
        ("animation", ["1 image of several frames or pages, the first of which is read"]),
    ],
)
def test_images_of_all_kinds_are_taken_for_what_they_show(translating, tmp_path, kind, notes):
    """The result is that of the same image as a plain file, and what had to be done is said."""
    (tmp_path / "in").mkdir()
    path = picture_file(tmp_path / "in", kind)
    report = translating(path)
    assert report["notes"] == notes
    plain = read_image(path, size=(SIDE, SIDE), channels=3).permute(1, 2, 0).numpy()
    Image.fromarray(plain).save(tmp_path / "plain.png")
    assert translating(tmp_path / "plain.png", out=tmp_path / "again")["notes"] == []
    assert np.array_equal(pixels(tmp_path / "out/images/x.png"), pixels(tmp_path / "again/images/plain.png"))


def broken_file(folder, kind, good):
    path = folder / "broken.png"
    match kind:
        case "truncated":
            path.write_bytes(good.read_bytes()[:200])
        case "text":
            path.write_text("this is no picture\n")
        case "empty":
            path.write_bytes(b"")
        case "truncated jpeg":
            path = folder / "broken.jpg"
            Image.fromarray(noise(64, 64, 3)).save(path)
            path.write_bytes(path.read_bytes()[:-500])
        case "floating point":
            path = folder / "broken.tif"
            Image.fromarray(noise(SIDE, SIDE).astype(np.float32)).save(path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "truncated jpeg", "floating point"])
def test_a_broken_file_is_named_and_stops_nothing(models, pictures, translating, tmp_path, monkeypatch, capsys, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    path = broken_file(folder, kind, pictures / "0.png")
    command = ["translate", folder, "--source", models["one"], "--steps", 3, *TEXTS, "--out", tmp_path / "none"]
    refused(invoke(*command, "-q"), f"{path} cannot be read as an image")
    assert main(monkeypatch, *command) == 1
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].startswith(f"pushforward: {path} cannot be read as an image")
    assert said.out == ""
    for name in ("a.png", "z.png"):
        shutil.copy(pictures / "0.png", folder / name)
    report = translating(folder, "--batch", 1)
    assert report["count"] == 2
    assert list(report["skipped"]) == [str(path)]
    assert list(results(tmp_path / "out")) == ["a", "z"]
    result = invoke(*command[:-1], tmp_path / "told")
    assert result.exit_code == 0
    assert f"{path} cannot be read as an image" in result.stdout


def test_a_file_that_breaks_after_it_was_translated_stops_nothing(pictures, translating, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    translating(mine)
    for file in mine.rglob("*.png"):
        file.write_text("no more")
    assert translating(mine)["done_before"] == 7


def test_an_npz_file(translating, tmp_path):
    np.savez(tmp_path / "data.npz", x_test=noise(3, SIDE, SIDE, 3), x_train=noise(2, SIDE, SIDE, 3, seed=1))
    report = translating(tmp_path / "data.npz", "--count", 2)
    assert [row["name"] for row in report["images"]] == ["data-00000", "data-00001"]
    report = translating(tmp_path / "data.npz", "--split", "train", out=tmp_path / "train")
    assert report["count"] == 2


def test_from_class_to_class(models, translating, tmp_path):
    Image.fromarray(noise(8, 8)).save(tmp_path / "x.png")
    made = {}
    for name in ("a", "b", "0"):
        texts = ["--source-label", "a" if name == "b" else "b", "--target-label", name]
        out = tmp_path / f"to-{name}"
        report = translating(tmp_path / "x.png", out=out, source=models["classes"], texts=texts)
        assert report["target_label"] == name
        made[name] = pixels(out / "images" / "x.png")
    assert made["a"].shape == (8, 8)
    assert np.array_equal(made["a"], made["0"])
    assert not np.array_equal(made["a"], made["b"])


def test_the_last_stage_begins_at_the_share_of_the_time():
    """As the translation itself does, where no grid is named (100 to 150 of 1000 steps, in the paper)."""
    from pushforward.cli.translate import _refiner
    from pushforward.maps.spec import SamplerSpec

    sampler = SamplerSpec("ddim", 100)
    plan = _refiner(sampler.diffusion(reading()), sampler, 0.1).plan
    assert float(plan.times[0]) == pytest.approx(0.1, abs=0.002)
    assert len(plan.noises) == 10 - 1  # the last step takes none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-prompt", "a cat"], "Source and target are the same"),
        (["--source-label", "a"], "Give labels or prompts, not both"),
        (["--source-prompt", "", "--source-label", "a"], "has no classes; give a --prompt instead"),
        (["--source-prompt", "", "--source-guidance", 2], "has no effect on model 'one' without a prompt"),
        (["--method", "odd"], "Unknown way 'odd' to translate; known are stochastic, independent"),
        (["--method", "deterministic", "--solver", "ddpm"], "is stochastic: it has no inverse"),
        (["--method", "deterministic", "--end", 0], "ends at time 0"),
        (["--solver", "heun"], "has no noises to find"),
        (["--solver", "odd"], "Unknown solver 'odd'"),
        (["--solver", "rk45"], "chooses its own settings"),
        (["--start", 0], "The start is a share"),
        (["--start", 1.1], "The start is a share"),
        (["--refine", 0], "The start is a share"),
        (["--eta", 2], "eta must lie in [0, 1]"),
        (["--source", "no-such"], "No model 'no-such'"),
        (["--target", "classes"], "reads no prompts; leave --prompt out"),
        (["--target", "classes", "--target-prompt", ""], "translate between models of one shape"),
        (["--device", "cuda:7"], "cannot be used"),
        (["--out", "file"], "file"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_bad_requests_are_refused_in_a_sentence(models, pictures, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    options = [models.get(option, option) for option in options]
    command = ["translate", pictures / "0.png", "--source", models["one"], "--steps", 3, *TEXTS, "--out", "out", "-q"]
    assert main(monkeypatch, *command, *options) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("pushforward: ")
    assert message in said
    assert "\n" not in said
    assert "Error" not in said
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("command", ["translate", "edit"])
def test_images_that_are_not_there_are_refused(models, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("hello")
    texts = TEXTS if command == "translate" else ["--source", "a cat", "--target", "a dog"]
    own = ["--source" if command == "translate" else "--model", models["one"], "--steps", 3, *texts]
    for name, message in [
        ("missing.png", "There is no file or folder"),
        ("empty", "There is no image in"),
        ("x.txt", "is no image: its name ends in '.txt'"),
    ]:
        refused(invoke(command, tmp_path / name, *own, "--out", tmp_path / "out", "-q"), message)
    assert not (tmp_path / "out").exists()


# -- edit

EDIT = ["--source", "a cat", "--target", "a dog", "--steps", 3, "--trials", 2, "--guidance", "1,3", "--skip", "0.3"]


@pytest.fixture
def editing(models, tmp_path):
    """Run `edit` to a folder, and hand back its report."""

    def run(images, *options, model="one", out=None):
        report = tmp_path / "report.json"
        result = invoke("edit", images, "--model", models.get(model, model), *EDIT, "--out", out or tmp_path / "out",
                        "--json", report, "-q", *options)  # fmt: skip
        assert result.exit_code == 0, result.exception
        return json.loads(report.read_text())

    return run


def candidates(folder):
    return json.loads((folder / "candidates.json").read_text())["candidates"]


@pytest.mark.parametrize("select", ["likelihood", "none"])
def test_edit_keeps_all_candidates_in_order(pictures, editing, tmp_path, select):
    report = editing(pictures / "deep", "--select", select)
    assert (report["count"], report["candidates"]) == (2, 4)
    for row, name in zip(report["images"], "56", strict=True):
        folder = tmp_path / "out" / name
        ranked = candidates(folder)
        files = {f"skip0.3-guidance{g}-trial0{t}.png" for g in (1, 3) for t in (0, 1)}
        assert {one["file"] for one in ranked} == files
        assert {path.name for path in folder.iterdir()} == files | {"best.png", "ranking.png", "candidates.json"}
        scores = [one["selected_by"] for one in ranked]
        assert scores == ([None] * 4 if select == "none" else sorted(scores, reverse=True))
        assert np.array_equal(pixels(folder / "best.png"), pixels(folder / ranked[0]["file"]))
        assert (row["best"], row["selected_by"]) == (ranked[0]["file"], scores[0])
        given, ranking = pixels(pictures / "deep" / f"{name}.png"), pixels(folder / "ranking.png")
        shown = [given, *(pixels(folder / one["file"]) for one in ranked)]
        corners = [places(ranking, image, 96 // SIDE)[0] for image in shown]
        assert corners == sorted(corners)  # in one row
        for one in ranked:
            error = ((pixels(folder / one["file"]) - given) ** 2).mean()
            assert one["reported"]["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=0.5)  # unrounded
            assert -1 <= one["reported"]["ssim"] <= 1


def test_an_interrupted_edit_goes_on_and_comes_out_the_same(pictures, editing, tmp_path):
    editing(pictures / "deep", "--select", "none")
    out = tmp_path / "out"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.*")}
    (out / "6" / "candidates.json").unlink()
    report = editing(pictures / "deep", "--select", "none")
    assert (report["count"], report["done_before"]) == (2, 1)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content, path
        assert (path.stat().st_mtime_ns == time) is (path.parent != out / "6"), path


def test_an_edit_depends_on_what_the_image_shows_alone(pictures, editing, tmp_path):
    """Neither on its place nor on the batch, but for a level of rounding."""
    editing(pictures / "deep", "--batch", 16, "--select", "none")
    editing(pictures / "deep" / "6.png", "--batch", 1, "--select", "none", out=tmp_path / "alone")
    for one in candidates(tmp_path / "out" / "6"):
        pair = [pixels(tmp_path / place / "6" / one["file"]) for place in ("out", "alone")]
        assert abs(pair[0] - pair[1]).max() <= 1


def test_an_edit_of_another_image_or_model_is_made_again(mine, editing, tmp_path):
    shutil.copytree(mine / "model", tmp_path / "kept")
    for change in ("image", "weights"):
        editing(mine / "in", "--select", "none", model=mine / "model")
        if change == "image":
            Image.fromarray(noise(SIDE, SIDE, 3, seed=32)).save(mine / "in" / "a.png")
        else:
            stretched(mine / "model")
        report = editing(mine / "in", "--select", "none", model=mine / "model")
        assert report["done_before"] == (1 if change == "image" else 0)
        editing(mine / "in", "--select", "none", model=mine / "model", out=tmp_path / change)
        for path in (tmp_path / change).rglob("*.png"):
            assert np.array_equal(pixels(path), pixels(tmp_path / "out" / path.relative_to(tmp_path / change)))


def test_the_figures_of_edits_are_those_of_their_pictures(pictures, editing, tmp_path):
    """Random networks lead far out of [-1, 1]; what is written is clipped and rounded, and so is what is measured."""
    editing(pictures / "0.png", "--select", "none")
    wanted = pixels(pictures / "0.png").astype(float)
    for one in candidates(tmp_path / "out" / "0"):
        made = pixels(tmp_path / "out" / "0" / one["file"])
        psnr = 10 * math.log10(255**2 / np.square(made - wanted).mean())
        assert one["reported"]["psnr"] == pytest.approx(psnr, abs=1e-3)
        both = (torch.from_numpy(x / 127.5 - 1).permute(2, 0, 1)[None] for x in (made, wanted))
        assert one["reported"]["ssim"] == pytest.approx(float(ssim(*both)), abs=1e-5)


def test_a_broken_file_does_not_stop_an_edit(pictures, editing, tmp_path):
    mine = shutil.copytree(pictures / "deep", tmp_path / "mine")
    (mine / "5.png").write_text("no picture")
    report = editing(mine)
    assert list(report["skipped"]) == [str(mine / "5.png")]
    assert [row["name"] for row in report["images"]] == ["6"]


def test_images_too_small_for_ssim_are_edited_without(tmp_path, editing):
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "x.png")
    report = editing(tmp_path / "x.png", model="small")
    assert set(report["images"][0]["reported"]) == {"psnr"}


@pytest.mark.parametrize("method", ["deterministic", "uni-inv", "direct"])
def test_an_edit_by_the_only_code_makes_one_of_each_combination(models, pictures, tmp_path, method):
    words = [word for word in EDIT if word not in ("--trials", 2)]
    result = invoke("edit", pictures / "0.png", "--model", models["one"], *words, "--method", method, "--out",
                    tmp_path / "out", "-q")  # fmt: skip
    assert result.exit_code in (0, 1), result.exception  # 1: a code misses the tolerance in three steps
    assert [one["file"][-11:] for one in candidates(tmp_path / "out" / "0")] == ["trial00.png"] * 2


def test_settings_named_twice_are_tried_once(pictures, editing):
    assert editing(pictures / "0.png", "--guidance", "2,2.0,1", "--trials", 1)["candidates"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "classes"], "has no class 'a dog'; it has a, b"),
        (["--guidance", "two"], "--guidance is one number or several, as 1,2,3; got 'two'"),
        (["--guidance", "1,nan"], "--guidance is one number or several"),
        (["--guidance", ""], "--guidance is one number or several"),
        (["--skip", "1"], "skips from 0 up to below 1"),
        (["--skip", ".1;.2"], "--skip is one number or several"),
        (["--skip", "0.9"], "A skip of 0.9 leaves none of the 3 steps"),
        (["--method", "deterministic"], "take 1 trial"),
        (["--method", "odd"], "Unknown way 'odd' to edit"),
        (["--select", "odd"], "--select is one of likelihood, directional-clip, clip, none"),
        (["--select", "clip"], "--select clip needs --clip"),
        (["--select", "clip", "--clip", "x", "--judge", "x"], "--judge must not be the network that selects"),
        (["--judge", "no-such-folder"], "cannot be read as a CLIP model"),
        (["--eta", 0], "has no noises to find"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_bad_edits_are_refused_in_a_sentence(models, pictures, tmp_path, options, message):
    options = [models.get(option, option) for option in options]
    command = ["edit", pictures / "0.png", "--model", models["one"], *EDIT, "--out", tmp_path / "out", "-q"]
    refused(invoke(*command, *options), message)
    assert not list(tmp_path.rglob("*.png"))


# -- encode, decode, interpolate


def encoded(models, images, folder, *options, model="one"):
    codes, report = folder / "codes.safetensors", folder / "encoded.json"
    result = invoke("encode", models[model], images, "--steps", 4, "--out", codes, "--json", report, "-q", *options)
    assert result.exit_code == 0, result.exception
    return codes, json.loads(report.read_text())


def decoded(codes, folder, *options):
    result = invoke("decode", codes, "--out", folder / "decoded.png", "--each", folder / "each", "-q", *options)
    assert result.exit_code == 0, result.exception
    return [pixels(path) for path in sorted((folder / "each").iterdir())]


@pytest.mark.parametrize(
    "options",
    [
        [], ["--prompt", "a cat", "--prompt", "a dog", "--guidance", 1.5, "--negative", "rain"], ["--independent"],
        ["--sequential"], ["--start", 0.5], ["--solver", "gddim", "--noise", 0.5], ["--end", 0, "--solver", "ddpm"],
    ],
    ids=lambda x: " ".join(map(str, x)),
)  # fmt: skip
def test_codes_decode_to_the_images(models, pictures, tmp_path, options):
    codes, report = encoded(models, pictures, tmp_path, *options, "--batch", 3)
    assert report["max_abs_error"] <= LIMIT
    assert report["count"] == 7
    assert report["rounds"] == (4 if "--sequential" in options else 1)
    for found, name in zip(decoded(codes, tmp_path, "--batch", 2), NAMES, strict=True):
        assert np.array_equal(found, pixels(pictures / f"{name}.png"))
    code, info = load_codes(codes)
    assert (code.end is None) is ("--end" in options) is (code.residual is not None)
    if "--prompt" in options:
        assert info["labels"] == ["a cat", "a dog"] * 3 + ["a cat"]
        assert (info["negative"], info["guidance"]) == ("rain", 1.5)


def test_codes_of_a_class_model(models, tmp_path):
    Image.fromarray(noise(8, 8)).save(tmp_path / "x.png")
    options = ["--label", "b", "--guidance", 2]
    codes, report = encoded(models, tmp_path / "x.png", tmp_path, *options, model="classes")
    assert report["labels"] == [1]
    assert report["max_abs_error"] <= LIMIT
    assert "negative" not in load_codes(codes)[1]
    assert np.array_equal(decoded(codes, tmp_path)[0], pixels(tmp_path / "x.png"))
    refused(invoke("decode", codes, "--label", "a", "--label", "b", "--out", tmp_path / "y.png", "-q"),
            "--label has no effect here: 2 are given for 1 image")  # fmt: skip


@pytest.mark.parametrize("change", [{"negative": "snow"}, {"labels": ["a fish"]}, {"guidance": 4.0}], ids=str)
def test_a_code_is_nothing_without_what_was_said(models, pictures, tmp_path, change):
    """Another prompt, negative prompt or guidance, and the codes decode to another image."""
    options = ["--prompt", "a cat", "--guidance", 2, "--negative", "rain"]
    codes, _ = encoded(models, pictures / "0.png", tmp_path, *options)
    code, info = load_codes(codes)
    save_codes(codes, code, {**info, **change})
    assert abs(decoded(codes, tmp_path)[0] - pixels(pictures / "0.png")).max() > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: {"times": info["times"][:-1]}, "The plan takes 3 noises, the code has 4"),
        (lambda info: {"times": [1.0, 0.9, *info["times"][1:]]}, "The plan takes 5 noises, the code has 4"),
        (lambda info: {"times": info["times"][::-1]}, "must strictly decrease"),
        (lambda info: {"times": []}, "at least two times"),
        (lambda info: {"times": [2.0, *info["times"][1:]]}, "Grid times must lie in"),
        (lambda info: {"settings": {"eta": 0.0}}, "The plan takes 0 noises, the code has 4"),
        (lambda info: {"solver": "odd"}, "Unknown solver 'odd'"),
        (lambda info: {"labels": [0]}, "give prompts, not labels"),
        (lambda info: {"process": {**info["process"], "beta_max": 12.0}}, "'vp' with other parameters"),
    ],
)
def test_codes_of_another_plan_are_refused(models, pictures, tmp_path, change, message):
    codes, _ = encoded(models, pictures / "0.png", tmp_path)
    code, info = load_codes(codes)
    save_codes(codes, code, {**info, **change(info)})
    refused(invoke("decode", codes, "--out", tmp_path / "x.png", "-q"), message)
    assert not (tmp_path / "x.png").exists()


def test_the_share_of_steps_is_taken_from_the_solver(pictures, translating):
    """All ten, where the solver says so, and not the default of .85."""
    report = translating(pictures / "0.png", "--solver", "ddim:start=1", "--steps", 10)
    assert len(report["times"]) == 10 + 1


@pytest.mark.parametrize("command", ["encode", "translate"])
def test_a_plan_in_a_file_is_taken_as_it_is(models, pictures, tmp_path, command):
    """It has all its settings, so that no default of the command's own is one too many."""
    plan = parse("ddim:eta=1:steps=4:end=0.01:start=0.5").plan(load_model(models["one"]))
    save_plan(plan, tmp_path / "own.plan")
    what = {"encode": [models["one"], "--out", tmp_path / "x.safetensors"],
            "translate": ["--source", models["one"], *TEXTS, "--out", tmp_path / "out"]}[command]  # fmt: skip
    report = tmp_path / "report.json"
    result = invoke(command, *what, pictures / "0.png", "--solver", tmp_path / "own.plan", "--json", report, "-q")
    assert result.exit_code == 0, result.exception
    assert json.loads(report.read_text())["times"] == plan.times.tolist()


def test_encode_leaves_broken_files_out_and_takes_as_many_as_asked(models, pictures, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    (mine / "0.png").write_text("no picture")
    _, report = encoded(models, mine, tmp_path, "--count", 2)
    assert list(report["skipped"]) == [str(mine / "0.png")]
    assert [row["name"] for row in report["images"]] == [str(mine / "1.png"), str(mine / "2.png")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "heun"], "has no noises to find"),
        (["--eta", 0], "has no noises to find"),
        (["--solver", "auto"], "no way leads back"),
        (["--label", "a"], "has no classes; give a --prompt instead"),
        (["--label", "a", "--prompt", "a cat"], "Give labels or prompts, not both"),
        (["--guidance", 2], "without a prompt"),
        (["--start", 0.01], "The start is a share"),
        (["--out", "codes.png"], "ends in .safetensors"),
        (["--picture", "x.mp3"], "got x.mp3"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_bad_encodings_are_refused_in_a_sentence(models, pictures, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    refused(invoke("encode", models["one"], pictures, "--steps", 4, "-q", *options), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "encode"])
def test_words_for_a_model_that_reads_none_are_refused(models, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(8, 8)).save(tmp_path / "x.png")
    own = [command, models["classes"], *(["x.png"] if command == "encode" else ["--count", 1]), "--steps", 2, "-q"]
    refused(invoke(*own, "--prompt", "a cat"), "reads no prompts; leave --prompt out")
    refused(invoke(*own, "--negative", "rain"), "reads no prompts; leave --negative out")


def test_between_codes_the_ends_are_the_images(models, pictures, tmp_path):
    """Through all frames, from each image to the next; prompts change halfway."""
    codes, _ = encoded(models, pictures, tmp_path, "--prompt", "a cat", "--prompt", "a dog", "--guidance", 1.5)
    out, save, report = tmp_path / "between.png", tmp_path / "new.safetensors", tmp_path / "between.json"
    result = invoke("interpolate", codes, "--between", "0,3,1", "--frames", 4, "--out", out, "--save", save, "--json",
                    report, "-q")  # fmt: skip
    assert result.exit_code == 0, result.exception
    again, sheet = decoded(save, tmp_path), pixels(out)
    corners = [places(sheet, image, 96 // SIDE, tolerance=1) for image in again]
    assert [len(each) for each in corners] == [1, 1, 1, 2, 2, 1, 1, 1]  # image 3 ends a row, and begins one
    for row, (a, b) in zip((again[:4], again[4:]), [(0, 3), (3, 1)], strict=True):
        for image, name in ((row[0], a), (row[-1], b)):
            assert abs(image - pixels(pictures / f"{name}.png")).max() <= 1
        assert abs(row[1] - row[0]).max() > 5 < abs(row[1] - row[2]).max()
    values = json.loads(report.read_text())
    assert (values["images"], values["frames"], values["count"]) == ([0, 3, 1], 4, 8)
    assert [(pair["from"], pair["to"]) for pair in values["similarity"]] == [(0, 3), (3, 1)]
    code, info = load_codes(save)
    assert len(code) == 8
    assert values["labels"] == info["labels"] == ["a cat"] * 2 + ["a dog"] * 2 + ["a dog"] * 4
    assert invoke("decode", codes, "--out", out, "--json", report, "-q").exit_code == 0
    assert json.loads(report.read_text()).keys() < values.keys()  # it says of codes all that decode says


def test_the_middle_of_all_codes(models, pictures, tmp_path):
    codes, _ = encoded(models, pictures, tmp_path)
    out = tmp_path / "middle.png"
    assert invoke("interpolate", codes, "--average", "--out", out, "-q").exit_code == 0
    assert pixels(out).shape == (96, 96, 3)


def test_codes_say_when_the_model_is_another_by_now(mine, tmp_path):
    """On stderr and in the report, and they are decoded all the same; codes of earlier versions cannot say."""
    codes, _ = encoded({"one": mine / "model"}, mine / "in", tmp_path)

    def told(command):
        report = tmp_path / "told.json"
        result = invoke(command, codes, "--out", tmp_path / "x.png", "--json", report, "-q")
        assert result.exit_code == 0, result.exception
        notes = json.loads(report.read_text())["notes"]
        assert result.stderr == "".join(f"pushforward: {note}\n" for note in notes)
        return notes

    assert told("decode") == told("interpolate") == []
    shutil.move(mine / "model", mine / "moved")
    stretched(shutil.copytree(mine / "moved", mine / "model"))
    assert told("decode") == told("interpolate") != []
    assert "another model than 'model' is now" in told("decode")[0]
    saved_codes = tmp_path / "new.safetensors"
    assert invoke("interpolate", codes, "--out", tmp_path / "x.png", "--save", saved_codes, "-q").exit_code == 0
    assert invoke("decode", saved_codes, "--out", tmp_path / "x.png", "-q").stderr == ""
    assert invoke("decode", codes, "--model", mine / "moved", "--out", tmp_path / "x.png", "-q").stderr == ""
    code, info = load_codes(codes)
    save_codes(codes, code, {key: value for key, value in info.items() if key != "digest"})
    assert told("decode") == []


@pytest.mark.parametrize("between", ["0", "0,7", "-1,0", "a,b", "0;1", ""])
def test_images_that_have_no_code_are_refused(models, pictures, tmp_path, between):
    codes, _ = encoded(models, pictures, tmp_path)
    result = invoke("interpolate", codes, "--between", between, "--out", tmp_path / "x.png", "-q")
    refused(result, "--between names 2 or more of the 7 images from 0 to 6")


def test_one_code_has_no_way_to_another(models, pictures, tmp_path):
    codes, _ = encoded(models, pictures / "0.png", tmp_path)
    result = invoke("interpolate", codes, "--out", tmp_path / "x.png", "-q")
    refused(result, "fewer than 2 codes, and the file has 1 code")
    assert invoke("interpolate", codes, "--average", "--out", tmp_path / "x.png", "-q").exit_code == 0


def test_a_file_of_codes_says_all_that_is_needed(models, pictures, tmp_path):
    """It is read by nothing but safetensors and JSON."""
    codes, _ = encoded(models, pictures / "0.png", tmp_path, "--prompt", "a cat", "--seed", 5)
    with safe_open(codes, "pt") as file:
        head = json.loads(file.metadata()["pushforward"])
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    shape = (1, 3, SIDE, SIDE)
    assert shapes == {"start": shape, "noises": (4, *shape), "end": shape}
    assert (head["model"], head["solver"], head["settings"]) == (str(models["one"]), "ddim", {"eta": 0.1})
    assert (head["seed"], head["labels"], head["images"]) == (5, ["a cat"], [str(pictures / "0.png")])
    assert head["times"][-1] == VP().t_min


def test_a_wrong_number_of_labels_is_refused():
    """From Python, where nothing else has counted them."""
    import pushforward as pf

    model = reading()
    plan = pf.SOLVERS["ddim"](VP(), pf.grid.uniform(VP(), 2, end=0.1), eta=0.5)
    sampler = pf.Diffusion(model, plan)
    given = torch.zeros(3, 3, 8, 8)
    code = sampler.encode(given).code
    for labels in (["a cat"] * 2, ["a cat"] * 4):
        for call in (
            lambda labels=labels: sampler.given(labels).encode(given),
            lambda labels=labels: sampler.given(labels).decode(code),
        ):
            with pytest.raises(
                PushforwardError, match=f"For 3 images give as many labels or prompts, or one; got {len(labels)}"
            ):
                call()
    every = sampler.given(["cat"] * 3).encode(given).code
    torch.testing.assert_close(sampler.given("cat").encode(given).code.start, every.start)
    torch.testing.assert_close(sampler.given("cat").decode(code), sampler.given(["cat"] * 3).decode(code))
