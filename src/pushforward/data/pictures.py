"""Writing images: values in [-1, 1] to 8 bits, sheets of many images, and animations."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import pad

from pushforward.data.files import atomic_path
from pushforward.errors import PushforwardError

__all__ = [
    "check_pairs", "check_suffix", "compared", "picture_suffixes", "read_mask",
    "save_animation", "save_image", "sheet", "to_bytes",
]  # fmt: skip


def sheet(images: Tensor, *, columns: int | None = None, smallest: int = 64) -> Image.Image:
    """Arrange images side by side in rows.

    Args:
        images: `(count, channels, height, width)` in [-1, 1], 1 or 3 channels; values outside are clipped.
        columns: number of columns; by default as many as make the sheet about square.
        smallest: images lower than this many pixels are enlarged by a whole factor.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise PushforwardError(
            f"Pictures need images (count, 1 or 3 channels, height, width); got shape {tuple(images.shape)}."
        )
    array = to_bytes(images.detach()).cpu().numpy()
    count, channels, height, width = array.shape
    columns = min(columns or round(count**0.5) or 1, count)
    rows = -(-count // columns)
    canvas = np.full((rows * columns, channels, height, width), 255, dtype=np.uint8)
    canvas[:count] = array
    pixels = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * height, columns * width, channels)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    factor = max(1, smallest // height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def compared(rows: Sequence[Tensor], *, columns: int = 16) -> Image.Image:
    """Arrange several versions of the same images, each image above its other versions.

    Args:
        rows: the versions, each `(count, channels, height, width)` in [-1, 1].
        columns: the most columns.
    """
    columns = min(columns, len(rows[0]))
    parts = [part for group in zip(*(row.split(columns) for row in rows), strict=True) for part in group]
    filled = [pad(part, (0, 0, 0, 0, 0, 0, 0, columns - len(part)), value=1.0) for part in parts]
    return sheet(torch.cat(filled), columns=columns)


def to_bytes(images: Tensor) -> Tensor:
    """Round values in [-1, 1] to uint8; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def check_pairs(images: Tensor, others: Tensor) -> None:
    """Raise unless `images` and `others` are two batches of images of the same shape.

    Raises:
        PushforwardError: they are not.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape != others.shape or 0 in images.shape:
        raise PushforwardError(
            "Measures compare two batches of images (count, 1 or 3, height, width) of one shape; got "
            f"{tuple(images.shape)} and {tuple(others.shape)}."
        )


def read_mask(path: Path, read: Callable[[Path], Tensor]) -> Tensor:
    """Read a mask `(height, width)`, true where the picture is nearer to white than to black.

    Args:
        path: the picture.
        read: a function that reads a picture in [-1, 1], `(channels, height, width)`, at the size wanted.

    Raises:
        PushforwardError: the picture has transparent pixels, which could mean either, or no white ones; or `read`
            raises it.
    """
    image = read(path)
    with Image.open(path) as picture:
        clear = picture.has_transparency_data
    white = image.mean(0) > 0
    if clear or not bool(white.any()):
        what = "is transparent in places" if clear else "has no white pixel"
        raise PushforwardError(f"The mask {path} {what}; draw it in black and white.")
    return white


def save_each(images: Tensor, folder: Path) -> None:
    """Write every image `(count, channels, height, width)` in [-1, 1] as a PNG of its own, numbered from 0."""
    for i, image in enumerate(images):
        save_image(sheet(image[None], smallest=0), folder / f"{i:05d}.png")


def save_image(picture: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> None:
    """Write a picture atomically, in the format of the path's suffix.

    Args:
        picture: the picture.
        path: the file to write.
        text: further entries for a PNG, which `picture.info` then has.

    Raises:
        PushforwardError: no format has that suffix.
    """
    check_suffix(path, picture_suffixes())
    with atomic_path(path) as temporary:
        entries = PngInfo()
        for name, value in (text or {}).items():
            entries.add_text(name, value)
        picture.save(temporary, pnginfo=entries)


def save_animation(
    frames: Sequence[Image.Image], path: str | os.PathLike[str], *, seconds: float = 4.0, hold: float = 1.5
) -> None:
    """Write frames as a looping GIF or WebP of `seconds` seconds; the last frame stays for `hold` seconds.

    Raises:
        PushforwardError: the suffix is neither.
    """
    check_suffix(path, {".gif", ".webp"})
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [round(1000 * hold)]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def picture_suffixes() -> set[str]:
    """Return the suffixes of the formats in which pictures can be written."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}


def check_suffix(path: str | os.PathLike[str], known: set[str]) -> None:
    """Raise unless a file of this suffix can be written; call it before long work.

    Raises:
        PushforwardError: the suffix is unknown.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in known:
        shown = ", ".join(sorted(known if len(known) < 9 else {".png", ".jpg", ".webp", ".gif", ".tiff"}))
        raise PushforwardError(f"Cannot write {path}: no picture format has the suffix {suffix!r}; use one of {shown}.")
