"""`--fit` where commands read images, and `--size` where they open models whose images may have any."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pushforward.data.reading import FITS, read_image
from pushforward.linear import VP
from pushforward.maps.storage import load_codes
from support.cli import invoke, refused
from support.models import SIZE, saved

SAID = {
    "crop": "cropped around the centre and resized from 40x20 to 8x8",
    "pad": "resized and padded with white from 40x20 to 8x8",
    "stretch": "stretched from 40x20 to 8x8",
}


def report(*arguments):
    result = invoke(*arguments, "-q", "--json", "-")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with classes, wide pictures, and a mask as wide, white at its left."""
    folder = tmp_path_factory.mktemp("shapes")
    saved(VP(), folder / "model")
    (folder / "in").mkdir()
    draw = np.random.default_rng(0)
    for k in range(2):
        Image.fromarray(draw.integers(0, 256, (20, 40), dtype=np.uint8)).save(folder / "in" / f"{k}.png")
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def options(command, files, out):
    few = ["--solver", "ddim", "--steps", 3]
    return {
        "encode": [files / "model", files / "in", *few, "--out", out / "c.safetensors"],
        "invert": [files / "model", files / "in", "--steps", 6, "--end", 0.05, "--out", out / "c.safetensors"],
        "inpaint": [files / "model", files / "in", "--mask", files / "mask.png", "--steps", 3, "--out", out],
        "translate": [files / "in", "--source", files / "model", "--source-label", "a", "--target-label", "b", *few,
                      "--out", out],
        "train": [out, "--data", files / "in", "--size", 8, "--network", "tiny", "--steps", 1, "--sample-every", 0],
    }[command]  # fmt: skip


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("command", ["encode", "invert", "inpaint", "translate", "train"])
def test_every_command_fits_images_as_it_is_told_and_says_so(files, tmp_path, command, fit):
    found = report(command, *options(command, files, tmp_path / "out"), "--fit", fit)
    assert f"2 images {SAID[fit]}" in found["notes"]


@pytest.mark.parametrize("fit", FITS)
def test_what_is_encoded_is_the_image_fitted(files, tmp_path, fit):
    """The code decodes to the picture that the reader makes."""
    report("encode", *options("encode", files, tmp_path), "--fit", fit)
    assert invoke("decode", tmp_path / "c.safetensors", "--out", tmp_path / "x.png", "--each", tmp_path).exit_code == 0
    wanted = read_image(files / "in" / "0.png", size=(SIZE, SIZE), channels=1, fit=fit).int()
    found = read_image(tmp_path / "00000.png").int()
    assert (found - wanted).abs().max() <= 1


def test_a_mask_is_fitted_as_its_image_and_what_pads_it_is_kept(files, tmp_path):
    report("inpaint", *options("inpaint", files, tmp_path), "--fit", "pad")
    given = read_image(files / "in" / "0.png", size=(SIZE, SIZE), channels=1, fit="pad")[0]
    painted = read_image(tmp_path / "images" / "0.png")[0]
    changed = painted != given
    assert changed[2:6, :4].any()
    assert not changed[:2].any()
    assert not changed[6:].any()
    assert not changed[:, 4:].any()


def test_an_unknown_fit_is_a_wrong_usage(files, tmp_path):
    result = invoke("encode", *options("encode", files, tmp_path), "--fit", "cover")
    assert result.exit_code == 2
    assert "crop" in result.output


# -- sizes of models


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A folder of `diffusers` whose network, being convolutional, takes images of any size; 8 x 8 by itself."""
    return _unet(tmp_path_factory.mktemp("unet"), 1)


def _unet(folder, channels):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    net.save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return folder


def test_a_size_of_ones_own_is_drawn_encoded_and_decoded(unet, tmp_path):
    few = ["--solver", "ddim", "--steps", 3]
    for size, shape in (("8x16", (8, 16)), ("16", (16, 16))):
        each = tmp_path / size
        assert report("sample", unet, *few, "--count", 1, "--size", size, "--each", each, "--out", tmp_path / "s.png")
        assert read_image(each / "00000.png").shape[1:] == shape
        codes = tmp_path / f"{size}.safetensors"
        report("encode", unet, each, *few, "--size", size, "--out", codes)
        assert load_codes(codes)[0].start.shape[2:] == shape
        assert invoke("decode", codes, "--out", tmp_path / "again.png", "--each", tmp_path / "again").exit_code == 0
        difference = read_image(tmp_path / "again" / "00000.png").int() - read_image(each / "00000.png").int()
        assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    "command",
    [["sample"], ["watermark", "embed", "--key", "key"], ["guide", "--energy", "chi"]],
    ids=lambda words: words[0],
)
def test_what_is_no_picture_is_refused_before_it_is_made(command, tmp_path):
    out = tmp_path / ("out.png" if command == ["sample"] else "out")
    result = invoke(*command, _unet(tmp_path / "rgba", 4), "--out", out, "-q")
    refused(result, "makes arrays of shape (4, 8, 8), and pictures have 1 or 3 channels, height and width")
    assert not out.exists()


@pytest.mark.parametrize(
    ("which", "size", "said"),
    [
        ("unet", "large", "--size is a side in pixels, or HEIGHTxWIDTH"),
        ("unet", "8x8x8", "--size is a side in pixels, or HEIGHTxWIDTH"),
        ("unet", "0", "--size is a side in pixels, or HEIGHTxWIDTH"),
        ("own", "16", "makes images of 8x8 only: leave the size out"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(files, unet, tmp_path, which, size, said):
    result = invoke("sample", unet if which == "unet" else files / "model", "--size", size, "--out", tmp_path / "x.png")
    assert said in str(result.exception)
    assert (
        invoke(
            "sample", files / "model", "--size", 8, "--steps", 1, "--count", 1, "--out", tmp_path / "x.png"
        ).exit_code
        == 0
    )
