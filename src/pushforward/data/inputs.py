"""Images that a user names: files, folders and `.npz` files, fitted to a model's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pushforward.data.reading import Fit
from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.data.reading import Notes

__all__ = ["Images", "Input", "image_files", "list_inputs", "read_file", "read_inputs", "read_like"]


@dataclass(frozen=True, eq=False)
class Images:
    """Images read for a model.

    Args:
        values: the images in [-1, 1], `(count, channels, height, width)`.
        names: each image's file, or its place in an `.npz` file.
        notes: what was done to the images, one sentence each.
        skipped: files that could not be read, each with the reason.
    """

    values: Tensor
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Input:
    """An image that a user names, not read yet.

    Args:
        name: its place below the folder that was named, without its end; of an `.npz` file, that file and a number.
        source: its file, or its place in an `.npz` file.
        read: reads it as uint8 `(channels, height, width)`, and adds what it did to a counter.
    """

    name: str
    source: str
    read: Callable[[Notes], Tensor]


def list_inputs(
    source: Path, size: tuple[int, int] | None, channels: int | None, *, split: str = "test", fit: Fit = "crop"
) -> Iterator[Input]:
    """List the images of a file, a folder (searched recursively) or an `.npz` file; see `read_inputs`.

    Raises:
        PushforwardError: it does not exist, or holds no image.
    """
    from pushforward.data.datasets import brought, load_images

    if source.suffix.lower() == ".npz" and source.is_file():
        for i, image in enumerate(load_images(source, split=split).images):

            def take(done: Notes, image: Tensor = image) -> Tensor:
                return brought(image[None], size, channels, fit, done)[0]

            yield Input(f"{source.stem}-{i:05d}", f"{source}[{i}]", take)
        return
    for file in image_files(source):
        below = file.relative_to(source) if source.is_dir() else Path(file.name)
        read = partial(read_file, file, size, channels, fit=fit)
        yield Input(below.with_suffix("").as_posix(), str(file), read)


def read_inputs(
    sources: Sequence[Path],
    size: tuple[int, int] | None,
    channels: int | None,
    *,
    split: str = "test",
    count: int | None = None,
    skip: bool = False,
    fit: Fit = "crop",
) -> Images:
    """Read images from files, folders (searched recursively) and `.npz` files, in this order, for a model.

    They are read like those of a training set (`data.reading.read_image`); `notes` says what was done to them.

    Args:
        sources: at least one file or folder.
        size: height and width in pixels; `None` if all are alike, and stay as they are.
        channels: 1 for grey, 3 for colour; `None` likewise.
        split: which split of `.npz` files to read, `train` or `test`.
        count: read only this many images; by default all.
        skip: skip files that cannot be read, as long as there are others.
        fit: how to fit images to `size`.

    Raises:
        PushforwardError: a source does not exist, is not an image, or is damaged.
    """
    import torch

    from pushforward.data.pictures import from_bytes
    from pushforward.data.reading import sentences

    images: list[Tensor] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    done: Notes = Counter()
    for one in chain.from_iterable(list_inputs(source, size, channels, split=split, fit=fit) for source in sources):
        try:
            images.append(one.read(done))
            names.append(one.source)
        except PushforwardError as error:
            if not skip:
                raise
            skipped.append((one.source, str(error)))
        if len(images) == count:
            break
    if not images and skipped:
        raise PushforwardError(skipped[0][1])
    if not images:
        raise PushforwardError("There are no images to work on; name at least one file, folder or .npz file.")
    return Images(from_bytes(torch.stack(images)), tuple(names), sentences(done), tuple(skipped))


def image_files(source: Path) -> list[Path]:
    """List the image files that a file or folder stands for, sorted.

    Raises:
        PushforwardError: there are none.
    """
    from pushforward.data import datasets
    from pushforward.data.imagefolder import SUFFIXES

    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise PushforwardError(f"{source} is no image: its name ends in {source.suffix!r}, not in any of {known}.")
        return [source]
    if not source.is_dir():
        raise PushforwardError(f"There is no file or folder {source}.")
    return datasets.image_files(source)


def read_like(path: Path, shape: tuple[int, ...], fit: Fit = "crop", background: str = "white") -> Tensor:
    """Read an image file in [-1, 1], fitted to `shape`, `(channels, height, width)`."""
    from pushforward.data.pictures import from_bytes

    return from_bytes(read_file(path, (shape[1], shape[2]), shape[0], Counter(), fit, background))


def read_file(
    file: Path,
    size: tuple[int, int] | None,
    channels: int | None,
    done: Notes,
    fit: Fit = "crop",
    background: str = "white",
) -> Tensor:
    """Read one image as uint8 `(channels, height, width)` and count what was done to it; see `data.reading.read_image`.

    Raises:
        PushforwardError: the file is not an image or is damaged, or the fit is unknown.
    """
    from pushforward.data.reading import UNREADABLE, explained, read_image

    try:
        return read_image(file, size=size, channels=channels, fit=fit, background=background, done=done)
    except PushforwardError:
        raise
    except UNREADABLE as error:
        raise PushforwardError(
            f"{file} cannot be read as an image ({explained(error)}); repair it or leave it out."
        ) from None
