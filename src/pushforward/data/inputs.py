"""Images that a user names: files, folders and `.npz` files, brought to a model's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pushforward.data.reading import Fit
from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.data.reading import Notes

__all__ = ["Images", "image_files", "read_file", "read_inputs", "read_like"]


@dataclass(frozen=True, eq=False)
class Images:
    """Images read for a model.

    Args:
        values: in [-1, 1], `(count, channels, height, width)`.
        names: of each, its file or its place in an `.npz` file.
        notes: what had to be done to them, one sentence each.
        skipped: files that could not be read, each with the reason.
    """

    values: Tensor
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def read_inputs(
    sources: Sequence[Path],
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "test",
    count: int | None = None,
    skip: bool = False,
    fit: Fit = "crop",
) -> Images:
    """Images from files, folders (searched recursively) and `.npz` files, in this order, brought to a model's shape.

    They are read as those of a training set (`data.reading.read_image`); `notes` says what was done to them.

    Args:
        sources: at least one.
        size: height and width.
        channels: 1 or 3.
        split: of `.npz` files, `train` or `test`.
        count: take the first of them only.
        skip: leave out files that cannot be read, as long as there are others.
        fit: how they are brought to `size`.

    Raises:
        PushforwardError: something is not there, is no image, or is damaged.
    """
    import torch

    from pushforward.data.datasets import brought, load_images
    from pushforward.data.reading import sentences

    skipped: list[tuple[str, str]] = []
    done: Notes = Counter()
    images: list[Tensor] = []
    names: list[str] = []
    for source in sources:
        room = None if count is None else count - len(images)
        if room == 0:
            break
        if source.suffix.lower() == ".npz" and source.is_file():
            some = list(brought(load_images(source, split=split).images[:room], size, channels, fit, done))
            own = [f"{source}[{i}]" for i in range(len(some))]
        else:
            some, own = [], []
            for file in image_files(source):
                if len(some) == room:
                    break
                try:
                    some.append(read_file(file, size, channels, done, fit))
                    own.append(str(file))
                except PushforwardError as error:
                    if not skip:
                        raise
                    skipped.append((str(file), str(error)))
        images += some
        names += own
    if not images and skipped:
        raise PushforwardError(skipped[0][1])
    if not images:
        raise PushforwardError("There is no image to work on: name at least one file, folder or .npz file.")
    return Images(torch.stack(images).float() / 127.5 - 1, tuple(names), sentences(done), tuple(skipped))


def image_files(source: Path) -> list[Path]:
    """The image files that a file or folder stands for, sorted.

    Raises:
        PushforwardError: there are none.
    """
    from pushforward.data import datasets
    from pushforward.data.imagefolder import SUFFIXES

    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise PushforwardError(f"{source} is no image: its name ends in {source.suffix!r}, not in one of {known}.")
        return [source]
    if not source.is_dir():
        raise PushforwardError(f"There is no file or folder {source}.")
    return datasets.image_files(source)


def read_like(path: Path, shape: tuple[int, ...], fit: Fit = "crop", background: str = "white") -> Tensor:
    """An image file in [-1, 1], brought to `shape`, `(channels, height, width)`."""
    return read_file(path, (shape[1], shape[2]), shape[0], Counter(), fit, background).float() / 127.5 - 1


def read_file(
    file: Path,
    size: tuple[int, int] | None,
    channels: int | None,
    done: Notes,
    fit: Fit = "crop",
    background: str = "white",
) -> Tensor:
    """One image as uint8 `(channels, height, width)`, see `data.reading.read_image`; what was done is counted.

    Raises:
        PushforwardError: the file is no image, or damaged; no such fit.
    """
    from pushforward.data.reading import UNREADABLE, explained, read_image

    try:
        return read_image(file, size=size, channels=channels, fit=fit, background=background, done=done)
    except PushforwardError:
        raise
    except UNREADABLE as error:
        raise PushforwardError(
            f"{file} cannot be read as an image ({explained(error)}); mend it or leave it out."
        ) from None
