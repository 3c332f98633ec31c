"""Data sets of images: a folder, an `.npz` file or the name of a data set of the `datasets` library.

Whatever the source, the result is the same: 8-bit images of one size, `(count, channels, height, width)`, each with a
class label or a caption where the source has them. `reading` reads the images, `imagefolder` the folders. A file that
cannot be read is skipped and reported; it is an error only if no file can be read. `ImageData.notes` says what was
found, how it was used and what was ignored.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pushforward.data import imagefolder
from pushforward.data.hub import check_hub
from pushforward.data.imagefolder import SPLITS, caption_column, caption_of, label_column
from pushforward.data.memory import check_memory
from pushforward.data.reading import (
    UNREADABLE,
    Fit,
    Note,
    Notes,
    explained,
    read_image,
    sentences,
    shaped,
)
from pushforward.data.words import few, many
from pushforward.errors import PushforwardError

__all__ = ["ImageData", "brought", "image_files", "load_images", "read_image"]

# Arrays of an .npz file that hold images, labels and captions, by split; the last belong to no split.
_ARRAYS = {
    "train": (("x_train", "train_images"), ("y_train", "train_labels"), ("captions_train",)),
    "validation": (("x_val", "val_images"), ("y_val", "val_labels"), ("captions_val",)),
    "test": (("x_test", "test_images"), ("y_test", "test_labels"), ("captions_test",)),
    "": (("x", "images", "arr_0"), ("y", "labels", "arr_1"), ("captions",)),
}
_CLASSES = 1024  # up to this many classes are accepted, even if few of them occur
_LARGEST = 2**15  # pixels of a side


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size.

    Args:
        images: uint8, `(count, channels, height, width)`, channels 1 or 3.
        labels: int64 `(count,)`, or `None` without classes.
        classes: the classes' names; label `k` is `classes[k]`.
        skipped: files that could not be read, each with the reason.
        captions: what each image shows, in words; commas separate the parts. Empty where there is no caption.
        notes: how the source was read, what was done to its images and what was ignored, one sentence each.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class _Shape:
    """The size, channels and fit wanted; see `load_images`."""

    size: tuple[int, int] | None
    channels: int | None
    fit: Fit


def load_images(
    source: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str = "train",
    fit: Fit = "crop",
) -> ImageData:
    """Read a data set.

    Args:
        source: a folder (searched recursively), an `.npz` file, or the name of a data set of the `datasets` library.
            The file has images `x_train`, `train_images`, `x`, `images` or `arr_0` (uint8, `(count, height, width,
            channels)` or without channels), and may have labels `y_train`, `train_labels`, `y`, `labels` or `arr_1`
            (numbers from 0 or names, `(count,)` or `(count, 1)`) and captions `captions_train` or `captions`.
        size: side, or height and width, in pixels; by default that of the source's images, if all are equal.
        channels: 1 for grey, 3 for colour; by default 1 if every image of the source is grey.
        split: which split to read if the source has several: `train`, `validation` or `test`. A data set of the
            `datasets` library may have splits of other names.
        fit: how to fit images to `size`, see `read_image`.

    Raises:
        PushforwardError: the source does not exist, none of it can be read, its images differ in size and `size` is not
            given, or the fit is unknown.
    """
    shape = _Shape(_checked_size(size), channels, fit)
    if channels not in (None, 1, 3):
        raise PushforwardError(f"Images have 1 channel (grey) or 3 (colour); got channels={channels}.")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, shape, _split(split))
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise PushforwardError(f"{path} is neither a folder of images nor an .npz file.")
        return _from_npz(path, shape, _split(split))
    if path.suffix or path.is_absolute() or str(source).startswith((".", "~")):
        raise PushforwardError(f"There is no folder or .npz file {path}.")
    return _from_datasets(str(source), shape, split)


def image_files(folder: Path) -> list[Path]:
    """List the image files in a folder and below it, sorted, without hidden ones.

    Raises:
        PushforwardError: there are none.
    """
    return imagefolder.walk(folder)[0]


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    check_memory(3 * pair[0] * pair[1], f"An image of {pair[0]}x{pair[1]}")
    if min(pair) < 1 or max(pair) > _LARGEST:
        raise PushforwardError(f"The size of images must be positive, and at most {_LARGEST}; got {size}.")
    return pair


def _split(name: str) -> str:
    """Return a split's main name."""
    for split, names in SPLITS.items():
        if name in names:
            return split
    raise PushforwardError(f"A folder or .npz file has the splits {', '.join(SPLITS)}; got {name!r}.")


def _read_all(
    files: Iterable[tuple[str, Any]], shape: _Shape, done: Notes
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The readable images by name, and the unreadable names with the reason."""
    images, skipped = {}, []
    for name, file in files:
        try:
            images[name] = read_image(file, size=shape.size, channels=shape.channels, fit=shape.fit, done=done)
        except PushforwardError:
            raise
        except UNREADABLE as error:
            skipped.append((name, explained(error)))
    return images, skipped


def _together(images: list[Tensor], source: str) -> Tensor:
    """One tensor; grey images become colour ones where the source has both."""
    channels = max(image.shape[0] for image in images)
    images = [image.expand(channels, -1, -1) for image in images]
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        a, b = sorted(sizes)[0], sorted(sizes)[-1]
        raise PushforwardError(
            f"The images of {source} have different sizes, from {a[0]}x{a[1]} to {b[0]}x{b[1]}; say which size to use."
        )
    return torch.stack(images)


# -- folders ----------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, shape: _Shape, split: str) -> ImageData:
    every, others, hidden = imagefolder.walk(folder)
    files, notes = imagefolder.of_split(folder, every, split)
    tables = imagefolder.tables(others, files)
    if shape.size is not None:
        what = f"{len(files):,} images of {shape.size[0]}x{shape.size[1]}"
        check_memory(2 * len(files) * (shape.channels or 1) * math.prod(shape.size), what)
    done: Notes = Counter()
    images, skipped = _read_all(((str(file), file) for file in files), shape, done)
    if not images:
        raise PushforwardError(f"No image in {folder} can be read, of {len(files)}; {files[0]}: {skipped[0][1]}.")
    good = [file for file in files if str(file) in images]
    notes += [table.note for table in tables]
    used = {table.path for table in tables}
    captions = imagefolder.said(good, tables, "captions")
    if captions is None:
        captions, texts, more = imagefolder.beside(good, others)
        used |= texts
        notes += more
    of = imagefolder.said(good, tables, "labels")
    if of is None:
        of, more = imagefolder.by_folder(good, lose=captions is None)
        notes += more
    kept = good if of is None else [file for file in good if file in of]
    tensor = _together([images[str(file)] for file in kept], str(folder))
    labels, classes = (None, ()) if of is None else _numbered([of[file] for file in kept], str(folder))
    left = Counter(file.suffix.lower() or file.name for file in others if file not in used)
    if left:
        notes.append(f"not read: {few(many(n, f'{end} file') for end, n in sorted(left.items()))}")
    if hidden:
        notes.append(f"not read: {many(hidden, 'hidden image')}")
    said = None if captions is None else tuple(captions.get(file, "") for file in kept)
    return ImageData(tensor, labels, classes, tuple(skipped), said, (*notes, *sentences(done)))


# -- arrays and data sets ----------------------------------------------------------------------------------------------


def _from_npz(path: Path, shape: _Shape, split: str) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            images, labels, captions = (_array(names, kind, split) for kind in range(3))
            if images is None:
                known = " or ".join([_ARRAYS[split][0][0], *_ARRAYS[""][0], *_ARRAYS[split][0][1:]])
                raise PushforwardError(f"{path} has no array {known}; it has {few(names) or 'none'}.")
            arrays = {key: file[key] for key in (images, labels, captions, *{"classes"}.intersection(names)) if key}
            for key, value in arrays.items():
                if not isinstance(value, np.ndarray):  # numpy gives the bytes of what it did not write
                    raise ValueError(f"its {key} is no array of numpy")
    except PushforwardError:
        raise
    except (*UNREADABLE, RuntimeError, zipfile.BadZipFile) as error:
        raise PushforwardError(f"{path} cannot be read as an .npz file: {error}.") from error
    done: Notes = Counter()
    tensor = brought(_checked_array(arrays[images], path), shape.size, shape.channels, shape.fit, done)
    said = None
    if captions is not None:
        said = tuple(_decoded(value) for value in arrays[captions].ravel())
        if len(said) != len(tensor):
            raise PushforwardError(f"{path} has {len(said)} captions for {len(tensor)} images; give one per image.")
    numbers, classes = None, tuple[str, ...]()
    if labels is not None:
        numbers, classes = _checked_labels(arrays[labels], len(tensor), path)
        if arrays[labels].dtype.kind not in "SU" and len(given := np.ravel(arrays.get("classes", ()))) >= len(classes):
            classes = tuple(_decoded(name) for name in given)
    of_splits = {name for kinds in _ARRAYS.values() for kind in kinds for name in kind}
    left = [name for name in names if name not in arrays and name not in of_splits]
    taken = {"images": images, "labels": labels, "captions": captions}
    notes = [", ".join(f"{what} from {name}" for what, name in taken.items() if name)]
    notes += [f"not read: {few(f'array {name}' for name in left)}"] * bool(left)
    return ImageData(tensor, numbers, classes, captions=said, notes=(*notes, *sentences(done)))


def _array(names: Sequence[str], kind: int, split: str) -> str | None:
    """Name a split's array of images, labels or captions; arrays of no split are for training, or all if alone."""
    mine = [name for name in _ARRAYS[split][kind] if name in names]
    alone = not any(name in names for other in SPLITS for name in _ARRAYS[other][0])
    if split == "train" or alone:
        mine += [name for name in _ARRAYS[""][kind] if name in names]
    return mine[0] if mine else None


def _decoded(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _checked_array(x: np.ndarray, path: Path) -> Tensor:
    """`(count, channels, height, width)` from what the file has."""
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape:
        raise PushforwardError(
            f"The images of {path} must be uint8 of shape (count, height, width, 1 or 3); "
            f"they are {x.dtype} of shape {x.shape}."
        )
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _checked_labels(y: np.ndarray, count: int, path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers from 0 and the names of classes, from numbers or names, `(count,)` or `(count, 1)`, or one-hot rows."""
    given = y
    one_hot = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf" and set(np.unique(y)) <= {0, 1}
    if one_hot and bool((y.sum(1) == 1).all()):
        y = y.argmax(1)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    whole = y.dtype.kind in "iu" or (y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.floor(y)).all()))
    if y.shape != (count,) or not (y.dtype.kind in "SU" or (whole and y.min() >= 0)):
        raise PushforwardError(
            f"The labels of {path} must be {count} whole numbers from 0, or names; they are {given.dtype} of shape "
            f"{given.shape}."
        )
    values = [_decoded(value) for value in y] if y.dtype.kind in "SU" else [int(value) for value in y]
    return _numbered(values, str(path))


def _numbered(values: Sequence[int | str], source: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as numbers from 0, and the classes' names; numbers stand for themselves.

    Raises:
        PushforwardError: numbers with large gaps.
    """
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        count, occurring = max(numbers) + 1, len(set(numbers))
        if count > max(_CLASSES, 2 * occurring):
            raise PushforwardError(
                f"The labels of {source} go up to {count - 1}, which makes {count:,} classes, but only {occurring:,} "
                "occur; number them from 0 without large gaps."
            )
        return torch.tensor(numbers, device="cpu"), tuple(str(k) for k in range(count))
    classes = tuple(sorted({str(value) for value in values}))
    place = {name: k for k, name in enumerate(classes)}
    return torch.tensor([place[str(value)] for value in values], device="cpu"), classes


def brought(
    images: Tensor, size: tuple[int, int] | None, channels: int | None, fit: Fit = "crop", done: Notes | None = None
) -> Tensor:
    """Fit the images of an array, uint8 `(count, channels, height, width)`, to a size and channels, as files are.

    Raises:
        PushforwardError: no such fit.
    """
    have = images.shape[1]
    if (size is None or size == tuple(images.shape[2:])) and channels in (None, have):
        return images
    check_memory(len(images) * (channels or have) * math.prod(size or (1,)), f"{len(images):,} images of size {size}")
    notes: list[Note] = []
    arrays = (image[0].numpy() if have == 1 else image.permute(1, 2, 0).numpy() for image in images)
    result = torch.stack([shaped(Image.fromarray(a), size, channels, fit, "white", notes.append) for a in arrays])
    if done is not None:
        done.update(notes)
    return result


def _from_datasets(name: str, shape: _Shape, split: str) -> ImageData:
    try:
        import datasets
    except ImportError as error:
        raise PushforwardError(
            f"There is no folder or .npz file {name!r}; a data set by name needs `pip install 'pushforward[train]'`."
        ) from error
    try:
        if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
            check_hub(name, "dataset")
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        reason = str(error).partition("\n")[0]
        raise PushforwardError(
            f"{name!r} is neither a folder nor an .npz file, and cannot be loaded as a data set: {reason}"
        ) from error
    column = next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise PushforwardError(f"The data set {name!r} has no column of images; it has {', '.join(data.features)}.")
    done: Notes = Counter()
    images, skipped = _read_all(((str(k), data[k][column]) for k in range(len(data))), shape, done)
    if not images:
        raise PushforwardError(f"No image of the data set {name!r} can be read.")
    tensor, kept = _together(list(images.values()), name), [int(k) for k in images]
    rest = [key for key in data.features if key != column]
    said = caption_column([key for key in rest if caption_of(data[kept[0]][key]) is not None])
    captions = None if said is None else tuple(caption_of(value) or "" for value in map(data[said].__getitem__, kept))
    key = next((key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels, classes = None, tuple[str, ...]()
    if key is not None:
        every = data[key]
        labels, classes = torch.tensor([int(every[k]) for k in kept], device="cpu"), tuple(data.features[key].names)
    elif (key := label_column(rest)) is not None and all(isinstance(value, int | str) for value in data[key]):
        labels, classes = _numbered([data[key][k] for k in kept], name)
    unlabelled = 0 if labels is None else int((labels < 0).sum())
    if unlabelled:
        labels, classes = None, ()
    taken = {"images": column, "captions": said, "classes": key if labels is not None else None}
    notes = [f"no classes, as {many(unlabelled, 'image')} have none"] * bool(unlabelled)
    notes += [", ".join(f"{what} from the column {of}" for what, of in taken.items() if of)]
    if left := [of for of in data.features if of not in taken.values()]:
        notes.append(f"not read: {few(f'column {of}' for of in left)}")
    return ImageData(tensor, labels, classes, tuple(skipped), captions, (*notes, *sentences(done)))
