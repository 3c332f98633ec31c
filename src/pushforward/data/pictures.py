"""Writing images: values in [-1, 1] to 8 bits, sheets of many images, and animations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import pad

from pushforward.data.files import atomic_path, check_suffix
from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = [
    "check_each", "check_pairs", "compared", "content_number", "from_bytes", "picture_suffixes", "read_mask",
    "save_animation", "save_each", "save_image", "sheet", "to_bytes",
]  # fmt: skip


def sheet(
    images: Tensor,
    *,
    columns: int | None = None,
    smallest: int = 96,
    title: str = "",
    heads: Sequence[str] = (),
    rows: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> Image.Image:
    """Arrange images side by side in rows, and name them; without any names they touch.

    Args:
        images: `(count, channels, height, width)` in [-1, 1], 1 or 3 channels; values outside are clipped.
        columns: number of columns; by default as many as make the sheet about square.
        smallest: images lower than this many pixels are enlarged by a whole factor, without blur.
        title: a text above all.
        heads: names of the columns, above them.
        rows: names of the rows, on their left.
        captions: texts below the images, one each; "" for none.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise PushforwardError(
            f"Pictures need images (count, 1 or 3 channels, height, width); got shape {tuple(images.shape)}."
        )
    array = to_bytes(images.detach()).cpu().numpy()
    count, channels, height, width = array.shape
    across = min(columns or round(count**0.5) or 1, count)
    down = -(-count // across)
    factor = max(1, smallest // height)
    canvas = np.full((down * across, channels, height, width), 255, dtype=np.uint8)
    canvas[:count] = array
    tiles = canvas.repeat(factor, axis=2).repeat(factor, axis=3).transpose(0, 2, 3, 1)
    tiles = tiles.reshape(down, across, *tiles.shape[1:])
    if title or heads or rows or captions:
        return _worded(tiles, title, heads, rows, captions)
    pixels = tiles.swapaxes(1, 2).reshape(down * height * factor, across * width * factor, channels)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def compared(
    versions: Sequence[Tensor],
    *,
    columns: int = 16,
    title: str = "",
    names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Arrange several versions of the same images, each image above its other versions.

    Args:
        versions: each `(count, channels, height, width)` in [-1, 1].
        columns: the most columns.
        title: a text above all.
        names: what to call the versions, on their left.
        captions: for each version, texts below its images; `()` for none.
    """
    columns = min(columns, len(versions[0]))
    parts = [part for group in zip(*(one.split(columns) for one in versions), strict=True) for part in group]
    filled = [pad(part, (0, 0, 0, 0, 0, 0, 0, columns - len(part)), value=1.0) for part in parts]
    groups = len(parts) // len(versions)
    texts = [""] * len(filled) * columns
    for k, own in enumerate(captions):
        for i, text in enumerate(own):
            texts[(i // columns * len(versions) + k) * columns + i % columns] = text
    return sheet(
        torch.cat(filled), columns=columns, title=title, rows=[*names] * groups, captions=texts if any(texts) else ()
    )


_LETTERS, _GAP, _LINES, _LEAST = 13, 6, 3, 300  # height of letters, space, lines per text, width of a title at least


def _worded(
    tiles: NDArray[np.uint8], title: str, heads: Sequence[str], rows: Sequence[str], captions: Sequence[str]
) -> Image.Image:
    """Images `(rows, columns, height, width, channels)` with a little space between them, and words beside them."""
    down, across, height, width, channels = tiles.shape
    font = _font()
    line = sum(font.getmetrics())

    def tall(texts: Sequence[str]) -> int:
        return max((line * (1 + text.count("\n")) + _GAP for text in texts if text), default=0)

    named = [_wrapped(text, 12 * _LETTERS, font) for text in rows]
    left = max((math.ceil(font.getlength(part)) + _GAP for text in named for part in text.splitlines()), default=0)
    inner = max(left + across * (width + _GAP) - _GAP, _LEAST if title else 0)
    above = _wrapped(title, inner, font, lines=9)
    over, under = ([_wrapped(text, width, font) for text in texts] for texts in (heads, captions))
    y = _GAP + tall([above])
    edges = []
    for i in range(down):
        y += tall(over) if i == 0 else 0
        edges.append(y)
        y += height + _GAP + tall(under[i * across : (i + 1) * across])
    picture = Image.new("RGB", (inner + 2 * _GAP, y), "white")
    write = partial(ImageDraw.Draw(picture).multiline_text, fill="black", font=font, spacing=0)
    write((_GAP, _GAP), above)
    places = [_GAP + left + j * (width + _GAP) for j in range(across)]
    for x, text in zip(places, over, strict=False):
        write((x, edges[0] - _GAP // 2), text, anchor="ld")
    for i, top in enumerate(edges):
        if i < len(named):
            write((_GAP, top + height // 2), named[i], anchor="lm")
        for j, x in enumerate(places):
            picture.paste(Image.fromarray(tiles[i, j, ..., 0] if channels == 1 else tiles[i, j]), (x, top))
            if i * across + j < len(under):
                write((x, top + height + _GAP // 2), under[i * across + j])
    return picture


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The font of matplotlib, which has the letters of most languages."""
    from matplotlib import get_data_path  # not for those who write no text

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _LETTERS)


def _wrapped(text: str, width: float, font: ImageFont.FreeTypeFont, lines: int = _LINES) -> str:
    """The text in lines of at most that width; what is too much is cut, with an ellipsis."""

    def cut(line: str) -> str:
        while line != "…" and font.getlength(line) > width:
            line = line.removesuffix("…")[:-1].rstrip() + "…"
        return line

    found: list[str] = []
    for paragraph in text.splitlines():
        words = paragraph.split() or [""]
        found.append(words[0])
        for word in words[1:]:
            if font.getlength(f"{found[-1]} {word}") <= width:
                found[-1] += f" {word}"
            else:
                found.append(word)
    if len(found) > lines:
        found = [*found[: lines - 1], f"{found[lines - 1]}…"]
    return "\n".join(map(cut, found))


def to_bytes(images: Tensor) -> Tensor:
    """Round values in [-1, 1] to uint8; values outside are clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def from_bytes(images: Tensor) -> Tensor:
    """Return uint8 images as values in [-1, 1], float32."""
    return images.float() / 127.5 - 1


def content_number(image: Tensor) -> int:
    """Return a number that goes by what an image shows, uint8 of any shape, to draw the same for it every time."""
    return crc32(image.contiguous().numpy().tobytes())


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


def check_each(folder: Path, count: int) -> None:
    """Raise if there are images that `save_each` wrote after so many: they would stand among the new ones.

    Raises:
        PushforwardError: there are; the message says what to do.
    """
    more = [file for file in folder.glob("[0-9]" * 5 + ".png") if int(file.stem) >= count]
    if more:
        raise PushforwardError(
            f"{folder} holds {many(len(more), 'numbered image')} beyond the {count:,} to be written, of an earlier run "
            f"({min(more).name}, for instance); name another folder, or remove it."
        )


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


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike[str]) -> None:
    """Write frames as a looping GIF or WebP of four seconds; the last frame stays for one and a half.

    Raises:
        PushforwardError: the suffix is neither.
    """
    check_suffix(path, {".gif", ".webp"}, "Animations")
    each = max(20, round(4000 / len(frames)))  # in milliseconds
    durations = [each] * (len(frames) - 1) + [1500]
    with atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def picture_suffixes() -> set[str]:
    """Return the suffixes of the formats in which pictures can be written."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
