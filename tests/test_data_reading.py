"""Images of every kind as 8-bit sRGB: against the formulas of colour spaces, numpy's arithmetic and LittleCMS."""

import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pushforward.data.inputs import read_inputs
from pushforward.data.reading import FITS, UNREADABLE, read_image, sentences

SRGB = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06]])
ADOBE = np.array([[0.64, 0.33], [0.21, 0.71], [0.15, 0.06]])
P3 = np.array([[0.680, 0.320], [0.265, 0.690], [0.150, 0.060]])
D65, D50 = np.array([0.3127, 0.3290]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def adapted(white: np.ndarray) -> np.ndarray:
    """XYZ under a white to XYZ under D50, as ICC has it."""
    scale = np.diag(BRADFORD @ D50 / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD


def to_xyz(primaries: np.ndarray) -> np.ndarray:
    """Linear RGB to XYZ under D50, from chromaticities and the white D65."""
    columns = np.stack([primaries[:, 0], primaries[:, 1], 1 - primaries.sum(1)])
    white = np.array([D65[0] / D65[1], 1, (1 - D65.sum()) / D65[1]])
    return adapted(white) @ (columns * np.linalg.solve(columns, white))


def srgb_of(xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50 as 8-bit sRGB, by IEC 61966-2-1."""
    linear = np.clip(xyz @ np.linalg.inv(to_xyz(SRGB)).T, 0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * coded)


def profile(gamma: float, primaries: np.ndarray | None = None, name: str = "a space") -> bytes:
    """An ICC profile, version 2, of an RGB space with a gamma, or of grey without primaries."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    text = name.encode() + b"\0"
    words = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": words + bytes(-len(words) % 4), b"wtpt": xyz(D50)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip(b"rgb", to_xyz(primaries).T, strict=True):
            tags |= {bytes([letter]) + b"XYZ": xyz(column), bytes([letter]) + b"TRC": curve}
    place, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(data))
        body += data
    space = b"GRAY" if primaries is None else b"RGB "
    head = bytes(8) + b"\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(struct.pack(">i", round(float(v) * 65536)) for v in D50) + bytes(48)
    whole = head + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def noise(*shape: int, high: int = 256, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(kind)


def read(path: Path, **settings) -> tuple[np.ndarray, list[str]]:
    """`(height, width, channels)`, and what was said."""
    done: Counter = Counter()
    array = read_image(path, done=done, **settings).permute(1, 2, 0).numpy()
    return array, list(sentences(done))


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return np.abs(found.astype(float) - wanted).max()


# -- colour


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_adobe_rgb_is_converted_in_every_format(tmp_path, suffix):
    """LittleCMS has (60, 200, 60) of Adobe RGB as (0, 201, 37) of sRGB."""
    path = tmp_path / f"x.{suffix}"
    settings = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    image = Image.new("RGB", (8, 8), (60, 200, 60))
    image.save(path, icc_profile=profile(563 / 256, ADOBE, "Adobe RGB (1998)"), **settings)
    array, said = read(path)
    assert off(array, np.array([0, 201, 37])) <= (3 if suffix == "jpg" else 1)  # JPEG rounds its own colours
    assert said == ["1 image converted to sRGB by their ICC profile (Adobe RGB (1998))"]


@pytest.mark.parametrize(("gamma", "primaries"), [(563 / 256, ADOBE), (1.8, P3), (1.0, SRGB)])
def test_rgb_profiles_are_converted_as_the_formulas_say(tmp_path, gamma, primaries):
    colours = noise(16, 16, 3)
    Image.fromarray(colours).save(tmp_path / "x.png", icc_profile=profile(gamma, primaries))
    wanted = srgb_of((colours / 255.0) ** gamma @ to_xyz(primaries).T)
    assert off(read(tmp_path / "x.png")[0], wanted) <= 2  # LittleCMS works in 16 bits, and its white is D65 to 3 digits


def test_a_grey_profile_and_an_rgb_profile_of_a_grey_image(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = srgb_of(((ramp / 255.0) ** 1.0)[..., None] * D50)[..., :1]
    for own in (profile(1.0), profile(1.0, SRGB)):
        Image.fromarray(ramp).save(tmp_path / "x.png", icc_profile=own)
        array, said = read(tmp_path / "x.png")
        assert array.shape == (16, 16, 1)
        assert off(array, wanted) <= 1
        assert "by their ICC profile" in said[0]


def test_the_profile_of_srgb_changes_nothing_and_is_not_said(tmp_path):
    colours = noise(16, 16, 3)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(colours).save(tmp_path / "x.png", icc_profile=own)
    array, said = read(tmp_path / "x.png")
    assert (array == colours).all()
    assert said == []


@pytest.mark.parametrize("fault", ["noise", "cut", "of grey", "of RGB on CMYK"])
def test_a_profile_that_cannot_be_used_is_said_and_left_aside(tmp_path, fault):
    own = {"noise": b"no profile" * 20, "cut": profile(2.2, ADOBE)[:200], "of grey": profile(2.2)}
    image, path = Image.fromarray(noise(8, 8, 3)), tmp_path / "x.tif"
    if fault == "of RGB on CMYK":
        image = image.convert("CMYK")
    image.save(path, icc_profile=own.get(fault, profile(2.2, ADOBE)))
    array, said = read(path)
    assert (array == np.asarray(image.convert("RGB"))).all()
    assert said[0].startswith("1 image with an ICC profile that cannot be used (")
    assert "\n" not in said[0]


def test_colour_below_transparency_and_in_palettes_is_converted_too(tmp_path):
    own = profile(563 / 256, ADOBE)
    Image.new("RGBA", (4, 4), (60, 200, 60, 128)).save(tmp_path / "alpha.png", icc_profile=own)
    array, said = read(tmp_path / "alpha.png")
    share = 128 / 255
    assert off(array, share * np.array([0, 201, 37]) + (1 - share) * 255) <= 1.5
    assert len(said) == 2
    Image.new("RGB", (4, 4), (60, 200, 60)).quantize(2).save(tmp_path / "palette.png", icc_profile=own)
    assert off(read(tmp_path / "palette.png")[0], np.array([0, 201, 37])) <= 1


def test_lab_is_converted_by_the_formulas_of_cie(tmp_path):
    random = np.random.default_rng(0)
    light, a, b = random.integers(80, 200, (8, 8)), *random.integers(-30, 30, (2, 8, 8))
    Image.frombytes("LAB", (8, 8), np.stack([light, a, b], -1).astype(np.int8).tobytes()).save(tmp_path / "x.tif")
    y = (light / 2.55 + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    wanted = srgb_of(D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))
    array, said = read(tmp_path / "x.tif")
    assert off(array, wanted) <= 2
    assert said == ["1 image converted to sRGB from Lab"]


def test_the_gamma_of_a_png_is_applied_and_other_primaries_are_said(tmp_path):
    colours = noise(16, 16, 3)
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100000))
    white_and_primaries = [*D65, *P3.ravel()]
    info.add(b"cHRM", struct.pack(">8I", *(round(100000 * value) for value in white_and_primaries)))
    Image.fromarray(colours).save(tmp_path / "x.png", pnginfo=info)
    array, said = read(tmp_path / "x.png")
    linear = colours / 255.0
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert off(array, np.round(255 * coded)) == 0
    assert said == [
        "1 image with other primaries (PNG's cHRM), read as if they were those of sRGB",
        "1 image converted to sRGB from a gamma of 1",
    ]
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 45455))  # what most programs write of sRGB
    Image.fromarray(colours).save(tmp_path / "x.png", pnginfo=info)
    array, said = read(tmp_path / "x.png")
    assert (array == colours).all()
    assert said == []


# -- bits


def tiff(path: Path, samples: np.ndarray, order: str = ">", photometric: int = 1) -> Path:
    """An uncompressed grey TIFF, written here: samples of any bits and order, signed or not, or floating-point."""
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape
    long, short = 4, 3
    entries = [
        (256, long, width), (257, long, height), (258, short, 8 * samples.dtype.itemsize), (259, short, 1),
        (262, short, photometric), (273, long, 8), (277, short, 1), (278, long, height), (279, long, len(data)),
        (339, short, kind),
    ]  # fmt: skip
    table = struct.pack(order + "H", len(entries))
    for tag, size, value in entries:
        table += struct.pack(order + "HHI", tag, size, 1) + struct.pack(order + ("I" if size == long else "Hxx"), value)
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(head + data + table + bytes(4))
    return path


@pytest.mark.parametrize(
    ("values", "white", "said"),
    [
        (np.array([[0, 1, 255, 70, 65535, 40000]], ">u2"), 65535, "brought from 16 to 8 bits"),
        (np.array([[0, -5, 255, 70, 32767, 20000]], ">i2"), 32767, "brought from 16 to 8 bits"),
        (np.array([[0, -5, 2**31 - 1, 10**9, 70000]], ">i4"), 2**31 - 1, "with 2147483647 as white"),
        (np.array([[0, 257, 65535, 40000]], ">i4"), 65535, "brought from 32 to 8 bits, with 65535 as white"),
        (np.array([[0, 1, 200, 255]], ">i4"), 255, "with 255 as white"),
        (np.array([[0.0, 0.25, 0.5, 1.0]], ">f4"), 1, "of floating-point samples, with 1 as white"),
    ],
    ids=["16 bits", "16 signed bits", "32 bits", "16 of 32 bits", "8 of 32 bits", "floating point"],
)
def test_deep_samples_are_scaled_to_what_is_white(tmp_path, values, white, said):
    array, notes = read(tiff(tmp_path / "x.tif", values))
    wanted = np.round(255 * np.clip(values.astype(np.float64) / white, 0, 1))
    assert off(array[..., 0], wanted) == 0
    assert said in notes[0]


def test_unsigned_samples_of_32_bits_and_white_as_zero(tmp_path):
    values = np.array([[0, 2**31, 2**32 - 1, 3 * 10**9]], np.uint32)
    path = tmp_path / "x.tif"
    assert off(read(tiff(path, values, "<"))[0][..., 0], np.round(255 * (values / (2**32 - 1)))) == 0
    deep = np.array([[0, 65535, 12345]], np.uint16)
    assert off(read(tiff(path, deep, "<", photometric=0))[0][..., 0], np.round(255 * (1 - deep / 65535))) == 0


@pytest.mark.parametrize("values", [[0.0, 700.0], [-1.0, 1.0], [0.0, np.nan], [0.0, np.inf]])
def test_floating_point_samples_outside_0_to_1_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match="they must lie between 0, black, and 1, white"):
        read_image(tiff(tmp_path / "x.tif", np.array([values], ">f4")))


def test_a_16_bit_png_with_a_clear_value_and_a_pgm(tmp_path):
    deep = np.array([[0, 257], [128 * 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png", transparency=0)
    array, said = read(tmp_path / "x.png")
    assert array[..., 0].tolist() == [[255, 1], [128, 255]]
    assert said == ["1 image brought from 16 to 8 bits", "1 image put on white where transparent"]
    (tmp_path / "x.pgm").write_bytes(b"P5 2 2 65535\n" + deep.astype(">u2").tobytes())
    assert read(tmp_path / "x.pgm")[0][..., 0].tolist() == [[0, 1], [128, 255]]


def test_colour_of_16_bits_is_said(tmp_path):
    deep = noise(4, 4, 3, high=65536, kind=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    array, said = read(tmp_path / "x.png")
    assert off(array, deep / 257) <= 1
    assert said == ["1 image brought from 16 to 8 bits"]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16B"]
)
def test_an_open_image_of_any_mode_is_read(mode):
    """A mid grey, half transparent where there is transparency, is nearly the same in all."""
    opaque = mode not in ("LA", "La", "PA", "RGBA", "RGBa")
    image = Image.new("RGBA", (4, 4), (100, 100, 100, 255 if opaque else 128))
    if mode == "I;16B":
        image = Image.frombytes("I;16B", (4, 4), np.full((4, 4), 100 * 257, ">u2").tobytes())
    elif mode == "PA":
        image = image.convert("RGB").convert("P").convert("PA")
        image.putalpha(128)
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode, dither=Image.Dither.NONE)
    wanted = {"1": 0.0}.get(mode, 100.0 if opaque else 100 * 128 / 255 + 127)
    assert off(read_image(image).numpy(), np.array(wanted)) <= 3


# -- frames, EXIF, transparency


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_read_and_it_is_said(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    settings = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **settings)
    array, said = read(tmp_path / f"x.{suffix}")
    assert (array == [255, 0, 0]).all()
    assert "1 image of several frames or pages, the first of which is read" in said


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(tmp_path, suffix, orientation):
    """What EXIF asks for, by numpy: rows and columns as the standard's table has them."""
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 255
    turn = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.T, 6: lambda x: x[::-1].T, 7: lambda x: x[::-1, ::-1].T, 8: lambda x: x[:, ::-1].T,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif, **settings)
    wanted = turn(stored)
    array, said = read(tmp_path / f"x.{suffix}", channels=1, size=wanted.shape)
    assert off(array[..., 0], wanted) <= 8
    assert ("1 image turned as their EXIF data say" in said) == (orientation > 1)
    assert not any("from" in note for note in said)


def test_broken_exif_does_not_lose_the_image(tmp_path):
    colours = noise(8, 8, 3)
    Image.fromarray(colours).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30)
    assert (read(tmp_path / "x.png")[0] == colours).all()


def test_an_opaque_alpha_changes_nothing_and_is_not_said(tmp_path):
    colours = np.concatenate([noise(8, 8, 3), np.full((8, 8, 1), 255, np.uint8)], -1)
    Image.fromarray(colours).save(tmp_path / "x.png")
    array, said = read(tmp_path / "x.png")
    assert (array == colours[..., :3]).all()
    assert said == []


# -- fit


def test_crop_pad_and_stretch_by_arithmetic(tmp_path):
    """Blocks of 4 x 4 pixels, so that halving leaves their insides as they are."""
    stripes = np.repeat(np.arange(4, dtype=np.uint8) * 60, 8)[None].repeat(16, 0)  # 16 high, 32 wide
    Image.fromarray(stripes).save(tmp_path / "x.png")
    cropped, said = read(tmp_path / "x.png", size=(16, 16))
    assert (cropped[..., 0] == stripes[:, 8:24]).all()
    assert said == ["1 image cropped around the centre from 32x16 to 16x16"]
    padded, said = read(tmp_path / "x.png", size=(32, 32), fit="pad")
    assert (padded[8:24, :, 0] == stripes).all()
    assert (padded[:8] == 255).all()
    assert (padded[24:] == 255).all()
    assert said == ["1 image padded with white from 32x16 to 32x32"]
    assert (read(tmp_path / "x.png", size=(32, 32), fit="pad", background="black")[0][:8] == 0).all()
    stretched, said = read(tmp_path / "x.png", size=(16, 16), fit="stretch")
    assert off(stretched[..., 0], np.repeat(np.arange(4) * 60, 4)[None]) < 20  # Lanczos rings beside an edge
    assert said == ["1 image stretched from 32x16 to 16x16"]
    for fit in FITS:
        array, said = read(tmp_path / "x.png", size=(8, 16), fit=fit)
        assert said == ["1 image resized from 32x16 to 16x8"]
        assert off(array[..., 0], np.repeat(np.arange(4) * 60, 4)[None]) < 20


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (3, 2)])
def test_every_fit_takes_any_proportions(tmp_path, fit, shape):
    Image.fromarray(noise(*shape, 3)).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", size=(8, 8), channels=1, fit=fit)[0].shape == (8, 8, 1)


def test_many_sizes_are_one_sentence(tmp_path):
    done: Counter = Counter()
    for side in (20, 30, 40):
        Image.fromarray(noise(side, 2 * side)).save(tmp_path / "x.png")
        read_image(tmp_path / "x.png", size=(8, 8), done=done)
    assert sentences(done) == (
        "3 images cropped around the centre and resized from 3 sizes between 40x20 and 80x40 to 8x8",
    )


def test_a_damaged_file_is_counted_for_nothing(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:3000])
    done: Counter = Counter()
    with pytest.raises(UNREADABLE):
        read_image(tmp_path / "x.png", size=(8, 4), done=done)
    assert not done


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    found = read_inputs([tmp_path], (4, 4), 1, skip=True)
    assert len(found.values) == 1
    assert "it is a pipe" in found.skipped[0][1]


def test_why_a_file_is_no_image_is_said_in_words(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (4, 4)).save(tmp_path / "c.png")
    found = read_inputs([tmp_path], (4, 4), 1, skip=True)
    reasons = [reason.partition("read as an image ")[2] for _, reason in found.skipped]
    assert reasons == [
        "(it is of no format that is known); repair it or leave it out.",
        "(No such file or directory); repair it or leave it out.",
    ]
