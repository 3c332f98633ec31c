"""Measures of image pairs, ranks of partners, and CLIP, against what they must be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pushforward.errors import PushforwardError
from pushforward.evaluation.pairs import greatest, l2, pixels, psnr, ranks, ssim
from pushforward.vision import lpips as perception
from pushforward.vision.clip import alignment, load_clip
from pushforward.vision.lpips import lpips
from support.helpers import normal
from support.packages import without

SIDE = 12
WORDS = ["a red cat", "a blue dog", "a photo of a big red cat on a mat"]


def some_images(count=3, channels=3, height=SIDE, width=SIDE, seed=0):
    return normal(count, channels, height, width, seed=seed).float().clamp(-1, 1)


# -- pairs of images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_l2_and_greatest_are_their_formulas_image_by_image(channels):
    """1e-5: some roundings of float32 in a sum over 432 squares, in dB of about 5."""
    a, b = some_images(4, channels, seed=1), some_images(4, channels, seed=2)
    error = (a.double() - b.double()).numpy().reshape(4, -1)
    mean = (error**2).mean(1)
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(4 / mean), rtol=1e-5)
    np.testing.assert_allclose(l2(a, b), np.sqrt(mean), rtol=1e-5)
    np.testing.assert_allclose(greatest(a, b), np.abs(error).max(1), rtol=1e-5)
    shift = torch.full((1, channels, SIDE, SIDE), -0.5)
    assert psnr(shift, shift + 0.2).item() == pytest.approx(20.0, abs=1e-4)  # a tenth of the range


def test_an_image_is_as_near_as_can_be_to_itself():
    a = some_images()
    assert psnr(a, a).isinf().all()
    assert torch.equal(l2(a, a), torch.zeros(3))
    assert torch.equal(greatest(a, a), torch.zeros(3))
    assert ssim(a, a).min() > 1 - 1e-5


@pytest.mark.parametrize(("x", "y"), [(-1.0, 1.0), (-0.5, 0.5), (-0.2, -0.1)])
def test_ssim_of_flat_images_is_its_luminance_term_on_values_from_0_to_1(x, y):
    """Without contrast, SSIM is `(2 m m' + c) / (m^2 + m'^2 + c)`, c = 1e-4."""
    one, two = (x + 1) / 2, (y + 1) / 2
    truth = (2 * one * two + 1e-4) / (one**2 + two**2 + 1e-4)
    found = ssim(torch.full((2, 1, SIDE, SIDE), x), torch.full((2, 1, SIDE, SIDE), y))
    assert found.tolist() == pytest.approx([truth] * 2, abs=1e-6)


def test_ssim_of_an_image_and_its_negative_is_minus_one_but_for_its_constants():
    """Equal means and opposite contrasts give `(c2 - 2 v) / (c2 + 2 v)`, c2 = 9e-4, v = 0.25; 2e-3 for the window."""
    board = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 2.0 - 1
    image = board.expand(1, 1, -1, -1).contiguous()
    assert ssim(image, -image).item() == pytest.approx((9e-4 - 0.5) / (9e-4 + 0.5), abs=2e-3)


def test_ssim_is_that_of_the_paper():
    """Wang et al., equation 13, window by window as their program goes, which sees nothing beyond the border."""
    one, two = some_images(2, 3, 14, 17, seed=1), some_images(2, 3, 14, 17, seed=2)
    two = 0.7 * one + 0.3 * two
    kernel = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2

    def window(x, y):
        mx, my = (kernel * x).sum(), (kernel * y).sum()
        vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
        both = (kernel * (x - mx) * (y - my)).sum()
        return (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))

    def one_image(x, y):
        values = [window(p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11])
                  for p, q in zip(x, y, strict=True) for i in range(4) for j in range(7)]  # fmt: skip
        return float(np.mean(values))

    expected = [one_image(*pair) for pair in zip(*((x.double().numpy() + 1) / 2 for x in (one, two)), strict=True)]
    assert ssim(one, two).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("measure", [psnr, ssim, l2, greatest])
def test_each_image_is_measured_alone(measure):
    """1e-5: the order of a convolution's sums may depend on the batch."""
    a, b = some_images(5, seed=3), some_images(5, seed=4)
    alone = torch.cat([measure(a[k : k + 1], b[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(measure(a, b), alone, rtol=1e-5, atol=1e-5)
    assert measure(a, b).shape == (5,)


@pytest.mark.parametrize("measure", [psnr, ssim, l2, greatest, lpips])
@pytest.mark.parametrize("other", [(2, 3, SIDE, SIDE), (3, 1, SIDE, SIDE), (3, 3, SIDE, 13)])
def test_images_of_different_shapes_are_refused(measure, other):
    with pytest.raises(PushforwardError, match="of one shape"):
        measure(some_images(), torch.zeros(other))


def test_small_images_have_no_ssim_and_no_lpips():
    tiny = some_images(height=10)
    with pytest.raises(PushforwardError, match=r"at least 11x11; got 10x12"):
        ssim(tiny, tiny)
    with pytest.raises(PushforwardError, match=r"at least 32x32; got 12x12"):
        lpips(some_images(), some_images())


def test_lpips_hands_colour_pairs_to_its_network_in_batches():
    calls = []

    def network(one, two):
        calls.append(tuple(one.shape))
        return (one - two).square().mean((1, 2, 3), keepdim=True)

    a, b = some_images(5, 1, 32, 40, seed=1), some_images(5, 1, 32, 40, seed=2)
    found = lpips(a, b, network, batch=2)
    assert calls == [(2, 3, 32, 40), (2, 3, 32, 40), (1, 3, 32, 40)]
    torch.testing.assert_close(found, l2(a, b).square())


def test_missing_packages_are_named(monkeypatch):
    a = some_images(2, 3, 32, 32)
    perception._network.cache_clear()
    with pytest.raises(PushforwardError, match="networks alex, vgg and squeeze; got 'resnet'"):
        lpips(a, a, "resnet")
    without(monkeypatch, "torchmetrics", "transformers")
    with pytest.raises(PushforwardError, match=r"LPIPS needs `pip install 'pushforward\[evaluate\]' torchvision`"):
        lpips(a, a)
    assert psnr(a, a).isinf().all()
    assert (ssim(a, a) == 1).all()
    with pytest.raises(PushforwardError, match=r"CLIP needs `pip install 'pushforward\[diffusers\]'`"):
        load_clip("somewhere")


def test_lpips_without_torchvision_names_it(monkeypatch):
    pytest.importorskip("torchmetrics")
    without(monkeypatch, "torchvision")
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", False)
    perception._network.cache_clear()
    with pytest.raises(PushforwardError, match="torchvision"):
        lpips(some_images(2, 3, 32, 32), some_images(2, 3, 32, 32))


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_are_places_by_distance():
    targets = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    points = torch.tensor([[0.9], [0.9], [6.0], [100.0]])
    found = ranks(points, targets, torch.tensor([1, 0, 3, 0]))
    assert found.tolist() == [1, 2, 1, 4]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ranks_agree_with_sorting(metric):
    """Against an argsort of all distances in NumPy; no ties, as the features are random. Equal, as both are float64."""
    points, targets = normal(300, 5, seed=1), normal(40, 5, seed=2)
    truth = torch.randint(40, (300,), generator=torch.Generator().manual_seed(3))
    x, y = points.numpy(), targets.numpy()
    if metric == "cosine":
        distance = -(x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    else:
        distance = np.linalg.norm(x[:, None] - y, axis=2)
    order = distance.argsort(1)
    places = [int(np.flatnonzero(order[k] == truth[k].item())[0]) + 1 for k in range(300)]
    assert ranks(points, targets, truth, metric).tolist() == places


def test_cosine_ranks_forget_lengths():
    points, targets = torch.tensor([[3.0, 0.3]]), torch.tensor([[0.1, 0.0], [3.0, 1.0]])
    assert ranks(points, targets, torch.tensor([0]), "cosine").tolist() == [1]
    assert ranks(points, targets, torch.tensor([0]), "euclidean").tolist() == [2]


def test_features_that_tell_nothing_apart_rank_by_chance():
    same = torch.ones(6, 4)
    assert ranks(same, torch.ones(9, 4), torch.arange(6)).tolist() == [5.0] * 6


def test_ranks_refuse_what_says_nothing():
    x = torch.ones(2, 3)
    for points, targets, truth, said in (
        (x, torch.ones(2, 4), [0, 1], r"got \(2, 3\) and \(2, 4\)"),
        (x * torch.nan, x, [0, 1], "not finite"),
        (x, x, [0, 2], "number of its partner, below 2"),
        (x, x, [0], "for each of 2 images"),
    ):
        with pytest.raises(PushforwardError, match=said):
            ranks(points, targets, torch.tensor(truth))


def test_pixels_are_means_over_a_grid():
    image = torch.arange(16.0 * 16).view(1, 1, 16, 16)
    found = pixels(image)
    assert found.shape == (1, 64)
    assert found[0, 0].item() == pytest.approx((0 + 1 + 16 + 17) / 4)
    assert found[0, 9].item() == pytest.approx((34 + 35 + 50 + 51) / 4)


# -- CLIP -------------------------------------------------------------------------------------------------------------


def theirs(clip_folder, images):
    """What `transformers` makes of uint8 images and the words: unit vectors of both."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind.from_pretrained(clip_folder)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(
        WORDS, padding=True, truncation=True, max_length=20
    )
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    seen = torch.as_tensor(np.stack(processor(images=pictures)["pixel_values"]))
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, pixel_values=seen)
    return seen, found.image_embeds, found.text_embeds


def test_clip_is_the_model_of_transformers(clip_folder, clip):
    """1e-5: float32 through two layers, values near 1."""
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    values = images.float() / 127.5 - 1
    seen, of_images, of_words = theirs(clip_folder, images)
    torch.testing.assert_close(clip.pixels(values), seen.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.images(values), of_images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.texts(WORDS), of_words, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.similarity(values, WORDS), (of_images * of_words).sum(1), rtol=1e-5, atol=1e-5)
    assert (of_words[0] - of_words[1]).norm() > 0.1  # words are told apart
    assert (of_images[0] - of_images[1]).norm() > 0.03


@pytest.mark.parametrize(("height", "width"), [(40, 40), (50, 36), (37, 64), (9, 12)])
def test_images_of_other_sizes_are_scaled_as_the_processor_scales_them(clip_folder, clip, height, width):
    """Within one step of 8 bits (to which the processor rounds) over the deviation 0.25, where nothing overshoots."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    smooth = torch.stack([(x + y).sin(), (x * y / 3).cos(), (x - y).sin()]) * 0.8
    images = ((smooth[None] + 1) * 127.5).round().byte()
    seen, _, _ = theirs(clip_folder, images)
    found = clip.pixels(images.float() / 127.5 - 1)
    assert found.shape == (1, 3, 16, 16)
    assert (found - seen).abs().max() < 1.01 / 255 / 0.25


def test_grey_images_are_seen_in_colour(clip):
    grey = some_images(2, 1, 16, 16)
    assert torch.equal(clip.images(grey), clip.images(grey.expand(-1, 3, -1, -1)))


def test_a_batch_is_its_images_one_by_one(clip):
    """1e-5: float32 sums in another order."""
    a, b = some_images(3, 3, 20, 18, seed=1), some_images(3, 3, 20, 18, seed=2)
    before = ["a cat", "a dog", "a red mat on a dog"]
    whole = clip.directional(a, b, before, WORDS)
    alone = [clip.directional(a[k : k + 1], b[k : k + 1], before[k], WORDS[k]) for k in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-5)
    alone = [clip.similarity(a[k : k + 1], WORDS[k]) for k in range(3)]
    torch.testing.assert_close(clip.similarity(a, WORDS), torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.similarity(a, "a cat"), clip.similarity(a, ["a cat"] * 3), rtol=1e-5, atol=1e-5)


def test_directional_similarity_is_its_equation(clip):
    """1e-5 for float32."""
    a, b = some_images(2, 3, 16, 16, seed=1), some_images(2, 3, 16, 16, seed=2)
    moved = (clip.images(b) - clip.images(a)).double().numpy()
    said = (clip.texts(["a dog"]) - clip.texts(["a cat"])).double().numpy()[0]
    truth = moved @ said / np.linalg.norm(moved, axis=1) / np.linalg.norm(said)
    found = clip.directional(a, b, "a cat", "a dog")
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(clip.directional(a, a, "a cat", "a dog"), torch.zeros(2))
    np.testing.assert_allclose(clip.directional(a, b, "a dog", "a cat"), -truth, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_images(clip_folder):
    """Against central differences in float64, step 1e-5: 1e-6 of the largest slope."""
    import transformers

    clip = load_clip(clip_folder)
    clip = replace(
        clip, model=transformers.CLIPModel.from_pretrained(clip_folder).double().eval().requires_grad_(False)
    )
    before = 0.5 * normal(2, 3, 18, 21, seed=1)
    image = (0.5 * normal(2, 3, 18, 21, seed=2)).requires_grad_()

    def loss(x):
        return (clip.similarity(x, "a cat") + clip.directional(before, x, "a cat", "a dog")).sum()

    loss(image).backward()
    for seed in range(3):
        way, step = normal(2, 3, 18, 21, seed=10 + seed), 1e-5
        slope = (loss(image.detach() + step * way) - loss(image.detach() - step * way)) / (2 * step)
        along = (image.grad * way).sum()
        assert abs(slope - along) < 1e-6 * (image.grad.norm() * way.norm())
        assert abs(slope) > 1e-3 * image.grad.norm()  # a slope that is there
    assert image.grad[..., 3:15, 3:15].abs().min() > 0
    assert all(not p.requires_grad for p in clip.model.parameters())


def test_what_does_not_fit_is_said(clip):
    a = some_images(3, 3, 16, 16)
    with pytest.raises(PushforwardError, match="For 3 images give as many prompts, or one; got 2"):
        clip.similarity(a, ["a cat", "a dog"])
    with pytest.raises(PushforwardError, match="got 2 and 3"):
        clip.directional(a, a[:2], "a cat", "a dog")
    with pytest.raises(PushforwardError, match="prompts that differ"):
        clip.directional(a, a, ["a cat", "a dog", "a mat"], ["a dog", "a dog", "a cat"])
    with pytest.raises(PushforwardError, match="got shape"):
        clip.images(a[0])
    assert alignment(torch.eye(2), torch.eye(2)).tolist() == [1, 1]


def test_long_prompts_are_cut(clip):
    long = " ".join(["abc"] * 40)
    torch.testing.assert_close(clip.texts([long]), clip.texts([long + " xyz"]))


@pytest.mark.parametrize("fault", ["nothing", "kind", "no preprocessor", "no mean", "size"])
def test_folders_that_are_no_clip_are_refused(clip_folder, tmp_path, fault):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config, preprocessor = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    values = json.loads(preprocessor.read_text())
    if fault == "nothing":
        for file in tmp_path.iterdir():
            file.unlink()
    elif fault == "kind":
        config.write_text(json.dumps({"model_type": "bert"}))
    elif fault == "no preprocessor":
        preprocessor.unlink()
    elif fault == "no mean":
        preprocessor.write_text(json.dumps({k: v for k, v in values.items() if k != "image_mean"}))
    else:
        preprocessor.write_text(json.dumps({**values, "size": 8}))
    said = {
        "nothing": "cannot be read as a CLIP model",
        "kind": "of kind 'bert', not clip",
        "no preprocessor": "preprocessor_config.json",
        "no mean": "lacks size, image_mean",
        "size": "scales images to 8",
    }
    with pytest.raises(PushforwardError, match=said[fault]) as caught:
        load_clip(tmp_path)
    assert "\n" not in str(caught.value)
