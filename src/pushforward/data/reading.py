"""Reading one image file as 8-bit sRGB samples, and saying in words what was done to it.

An image is turned as its EXIF data say, converted to 8 bits per sample and to sRGB, put on white where it is
transparent, and fitted to the size and channels wanted. Of several frames or pages the first is read.

- *Bits.* 0 is black; the largest value that the file's samples can have is white, and values between are scaled and
  rounded. Samples of 32 bits mostly hold fewer: white is the first of 255, 65535 and the largest value that no sample
  exceeds. Floating-point samples are read if they lie in [0, 1]. (Pillow drops the lower 8 bits of 16-bit colours.)
- *Colour.* An ICC profile is applied by LittleCMS, with the perceptual intent; without one, grey and RGB samples are
  taken as sRGB, or as of the gamma that a PNG states. A profile that changes no colour by more than one level is sRGB's
  own, and changes nothing.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = ["FITS", "UNREADABLE", "Fit", "Note", "Notes", "explained", "read_image", "sentences", "shaped"]

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
UNREADABLE = (  # what decoders raise on files that are damaged or no images
    OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_Tell = Callable[["Note"], None]
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}  # mode: colour space of a profile for it
_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # of sRGB, its white first
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2  # sample format


@dataclass(frozen=True)
class Note:
    """Something that was done to an image.

    Args:
        what: words to follow "1 image", as "cropped from {} to 8x8".
        size: height and width to put in the place of {}.
    """

    what: str
    size: tuple[int, int] | None = None


Notes = Counter[Note]


def sentences(notes: Mapping[Note, int]) -> tuple[str, ...]:
    """Turn notes into sentences, one for each thing done, with the number of images it was done to."""
    lines = []
    for what in dict.fromkeys(note.what for note in notes):
        mine = {note: n for note, n in notes.items() if note.what == what}
        sizes = sorted({note.size for note in mine if note.size is not None}, key=lambda size: size[0] * size[1])
        ends = [f"{width}x{height}" for height, width in sizes]
        of = "".join(ends) if len(ends) < 2 else f"{len(ends)} sizes between {ends[0]} and {ends[-1]}"
        lines.append(f"{many(sum(mine.values()), 'image')} {what.format(of) if sizes else what}")
    return tuple(lines)


def explained(error: Exception) -> str:
    """Say on one line why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is of no format that is known"
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


def read_image(
    file: str | os.PathLike[str] | Any,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    background: str = "white",
    done: Notes | None = None,
) -> Tensor:
    """Read one image `(channels, height, width)`, uint8, upright, in sRGB, on white.

    Args:
        file: a file's name or an open `PIL.Image.Image`.
        size: height and width in pixels to fit the image to; by default its own.
        channels: 1 for grey, 3 for colour; by default the image's own.
        fit: how to fit to `size`. `crop` scales the image to cover it and cuts around the centre; `pad` scales the
            image to lie within, and fills the rest; `stretch` scales each side, which may distort the image.
        background: colour to use where the image is transparent or padded.
        done: counter of what is done to images, updated if the image can be read.

    Raises:
        PushforwardError: the fit is unknown.
        OSError: the file is not an image, or is damaged; other errors in `UNREADABLE` mean the same.
    """
    notes: list[Note] = []
    if isinstance(file, Image.Image):
        result = shaped(_plain(file, background, notes.append), size, channels, fit, background, notes.append)
    else:
        if stat.S_ISFIFO(os.stat(file).st_mode):
            raise OSError("it is a pipe, and nothing may ever come")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn about odd metadata in images that they read well
            # A stream, not a name: Pillow maps named TIFFs into memory, and scrambles those that EXIF turns by 90°.
            with open(file, "rb") as stream, Image.open(stream) as image:
                result = shaped(_plain(image, background, notes.append), size, channels, fit, background, notes.append)
    if done is not None:
        done.update(notes)
    return result


# -- to grey or RGB of 8 bits ------------------------------------------------------------------------------------------


def _plain(image: Image.Image, background: str, tell: _Tell) -> Image.Image:
    """Make an image upright, opaque, sRGB, and of mode L or RGB."""
    if getattr(image, "is_animated", False):
        tell(Note("of several frames or pages, the first of which is read"))
    tags, profile, bits = getattr(image, "tag_v2", {}), image.info.get("icc_profile"), _bits(image)
    image = _upright(image, tell)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image, tags, bits, tell)
    elif bits > 8:
        tell(Note(f"brought from {bits} to 8 bits"))
    grey = image.mode in ("1", "L", "LA", "La")
    clear = None
    if image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
        image = image.convert("LA" if grey else "RGBA")
        clear = image.getchannel("A")
    if image.mode not in _SPACES:
        image = image.convert("L" if grey else "RGB")
    image = _srgb(image, profile, tell)
    if clear is None or clear.getextrema()[0] == 255:
        return image
    tell(Note(f"put on {background} where transparent"))
    return Image.composite(image, Image.new(image.mode, image.size, background), clear)


def _upright(image: Image.Image, tell: _Tell) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image)
    except UNREADABLE:
        image.load()  # raises if more than the EXIF data are damaged
        tell(Note("not turned, as the EXIF data cannot be read"))
        return image.copy()
    if turned:
        tell(Note("turned as their EXIF data say"))
    return upright


def _bits(image: Image.Image) -> int:
    """Return the bits per sample in the file; 32 for integers if no file says it."""
    if of_tiff := getattr(image, "tag_v2", {}).get(_BITS):
        return int(max(of_tiff))
    if image.mode == "I" and image.format is None:
        return 32
    raw = " ".join(str(part.args) for part in getattr(image, "tile", ()))
    return 16 if image.mode.startswith("I") or ";16" in raw else 8


def _grey(image: Image.Image, tags: Mapping[int, Any], bits: int, tell: _Tell) -> Image.Image:
    """Convert samples of more than 8 bits to mode L, or LA where one value means transparent."""
    samples = np.asarray(image)
    values = samples.astype(np.float64)
    if image.mode == "F":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"its floating-point samples go from {low:.3g} to {high:.3g}; they must lie between 0, black, "
                "and 1, white"
            )
        white = 1.0
        tell(Note("of floating-point samples, with 1 as white"))
    else:
        signed = tags.get(_FORMAT, (1,))[0] == _SIGNED if tags else bits == 32
        white = 2.0 ** (bits - signed) - 1
        if bits == 32:
            values = values if signed else values % 2**32  # Pillow reads them as signed
            white = next((most for most in (255.0, 65535.0) if values.max() <= most), white)
        tell(Note(f"brought from {bits} to 8 bits" + (f", with {white:.0f} as white" if bits == 32 else "")))
    if tags and tags.get(_PHOTOMETRIC, 0) == 0:  # Pillow does this itself for 8 bits
        values = white - values
    result = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        result.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return result


def _srgb(image: Image.Image, profile: bytes | None, tell: _Tell) -> Image.Image:
    """Convert a grey, RGB, CMYK or Lab image to sRGB, grey or RGB, by its profile if it has one."""
    grey = image.mode == "L"
    if profile:
        try:
            mode, transform, name = _transform(profile, image.mode)
        except (ImageCms.PyCMSError, ImportError, *UNREADABLE) as error:
            tell(Note(f"with an ICC profile that cannot be used ({explained(error)}), read without it"))
        else:
            if transform is None:
                return image
            tell(Note(f"converted to sRGB by their ICC profile ({name})"))
            converted = _applied(transform, image.convert(mode))
            return converted.convert("L") if grey else converted
    if image.mode == "LAB":
        tell(Note("converted to sRGB from Lab"))
        return _applied(_built(ImageCms.createProfile("LAB"), "LAB"), image)
    if image.mode == "CMYK":
        tell(Note("converted to sRGB from CMYK without a profile"))
        return image.convert("RGB")
    return image if profile or "srgb" in image.info else _without_gamma(image, tell)


def _without_gamma(image: Image.Image, tell: _Tell) -> Image.Image:
    """Convert samples that are the power `gamma` of the light, as a PNG may say, to sRGB."""
    gamma, primaries = image.info.get("gamma") or 1 / 2.2, image.info.get("chromaticity") or _PRIMARIES
    if max(abs(a - b) for a, b in zip(primaries, _PRIMARIES, strict=False)) > 0.01:
        tell(Note("with other primaries (PNG's cHRM), read as if they were those of sRGB"))
    if abs(2.2 * gamma - 1) < 0.05:
        return image
    tell(Note(f"converted to sRGB from a gamma of {gamma:.3g}"))
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point([round(255 * value) for value in coded.tolist()] * len(image.getbands()))


def _built(profile: Any, mode: str) -> ImageCms.ImageCmsTransform:
    # LittleCMS uses a coarse table for most transforms, except of RGB spaces; with it, dark greys are 10 levels off.
    flags = ImageCms.Flags.NONE if mode in ("RGB", "CMYK") else ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None
    return result


@lru_cache(maxsize=32)
def _transform(data: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None, str]:
    """Read a profile: the mode of image it takes, the transform (`None` for sRGB), and its name."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    space = profile.profile.xcolor_space.strip()
    if (mode, space) == ("L", "RGB"):
        mode = "RGB"  # grey images often have the profile of an RGB space
    if space != _SPACES[mode]:
        raise ValueError(f"it is for {space} colours")
    transform = _built(profile, mode)
    name = " ".join(ImageCms.getProfileDescription(profile).split()) or "without a name"
    if mode in ("L", "RGB"):
        ramp = np.arange(256, dtype=np.uint8)[None]
        lattice = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3, indexing="ij"), -1)
        probe = Image.fromarray(ramp if mode == "L" else lattice.reshape(1, -1, 3)).convert("RGB")
        seen = _applied(transform, probe.convert(mode))
        if np.abs(np.asarray(seen, dtype=int) - np.asarray(probe, dtype=int)).max() <= 1:
            return mode, None, name
    return mode, transform, name


# -- to a size and channels --------------------------------------------------------------------------------------------


def shaped(
    image: Image.Image,
    size: tuple[int, int] | None,
    channels: int | None,
    fit: Fit,
    background: str,
    tell: _Tell,
) -> Tensor:
    """Fit a grey or RGB image to a size, as uint8 `(channels, height, width)`; see `read_image`.

    Raises:
        PushforwardError: the fit is unknown.
    """
    if fit not in FITS:
        raise PushforwardError(f"The fit of an image to a size is one of {', '.join(FITS)}; got {fit!r}.")
    mode = image.mode if channels is None else "L" if channels == 1 else "RGB"
    if mode != image.mode:
        tell(Note("made grey" if mode == "L" else "made colour from grey"))
        image = image.convert(mode)
    if size is not None and (image.height, image.width) != size:
        image = _fitted(image, size, fit, background, tell)
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).contiguous()


def _fitted(image: Image.Image, size: tuple[int, int], fit: Fit, background: str, tell: _Tell) -> Image.Image:
    height, width = size
    ratios = height / image.height, width / image.width
    inner = [max(1, round(min(ratios) * side)) for side in (image.height, image.width)]
    if image.height * width == image.width * height:
        what = "resized"
    elif fit == "stretch":
        what = "stretched"
    elif fit == "pad":
        what = f"padded with {background}" if min(ratios) == 1 else f"resized and padded with {background}"
    else:
        what = "cropped around the centre" if max(ratios) == 1 else "cropped around the centre and resized"
    tell(Note(f"{what} from {{}} to {width}x{height}", (image.height, image.width)))
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new(image.mode, (width, height), background)
    canvas.paste(
        image.resize((inner[1], inner[0]), Image.Resampling.LANCZOS),
        ((width - inner[1]) // 2, (height - inner[0]) // 2),
    )
    return canvas
