"""Data sets of images: a folder, an `.npz` file or the name of a data set of the `datasets` library.

Whatever the source, the result is the same: 8-bit images of one size, `(count, channels, height, width)`, and a class
label each where the source has classes. A folder's classes are the names of its sub-folders; an image is turned as its
EXIF data say, transparency is put on white, 16-bit samples are brought to 8 bits, and every image is scaled to cover
the wanted size and cut to it around its centre. A file that cannot be read is left out and reported, not fatal, as long
as there are good ones.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pushforward.errors import PushforwardError

__all__ = ["ImageData", "load_images", "read_image"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif"}
_IMAGE_KEYS = {"train": ("x_train", "x", "images"), "test": ("x_test",)}
_LABEL_KEYS = {"train": ("y_train", "y", "labels"), "test": ("y_test",)}
_CAPTION_KEYS = {"train": ("captions_train", "captions"), "test": ("captions_test",)}
_CAPTION_COLUMNS = ("text", "caption")
_METADATA = "metadata.jsonl"


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size.

    Args:
        images: uint8, `(count, channels, height, width)`, channels 1 or 3.
        labels: int64 `(count,)`, or `None` without classes.
        classes: the classes' names; label `k` is `classes[k]`.
        skipped: files left out because they could not be read, each with the reason.
        captions: what each image shows, in words, of which a comma separates the parts.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    source: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    split: str = "train",
    on_skip: Callable[[str, str], None] | None = None,
) -> ImageData:
    """Read a data set.

    Args:
        source: a folder (searched recursively), an `.npz` file with images `x_train`, `x` or `images` (uint8,
            `(count, height, width, channels)` or without channels) and optional labels `y_train`, `y` or `labels`, or
            the name of a data set of the `datasets` library.
        size: side, or height and width; by default as the source has it, when that is the same for all.
        channels: 1 for grey, 3 for colour; by default grey where every image of the source is.
        split: `train` or `test`, for a source that has both.
        on_skip: called with the name of each unreadable file and the reason.

    Raises:
        PushforwardError: nothing there, nothing readable, or images that do not fit together.
    """
    height_width = _checked_size(size)
    if channels not in (None, 1, 3):
        msg = f"Images have 1 channel (grey) or 3 (colour); got channels={channels}."
        raise PushforwardError(msg)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, height_width, channels, on_skip or _ignore)
    if path.is_file():
        if path.suffix.lower() != ".npz":
            msg = f"{path} is neither a folder of images nor an .npz file."
            raise PushforwardError(msg)
        return _from_npz(path, height_width, channels, split)
    if path.suffix or path.is_absolute() or str(source).startswith((".", "~")):
        msg = f"There is no folder or .npz file {path}."
        raise PushforwardError(msg)
    return _from_datasets(str(source), height_width, channels, split, on_skip or _ignore)


def read_image(
    file: str | os.PathLike[str] | Any, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> Tensor:
    """One image, `(channels, height, width)`, uint8, upright and on white.

    Args:
        file: a file's name or an open `PIL.Image.Image`.
        size: height and width; the image is scaled to cover it and cut around the centre.
        channels: 1 for grey, 3 for colour; by default as the image has it.

    Raises:
        OSError: the file is not an image, or is damaged (also `ValueError`, `SyntaxError` from some decoders).
    """
    if isinstance(file, Image.Image):
        return _to_tensor(_upright_8bit(file), size, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn of odd metadata in images that they read well
        with Image.open(file) as image:
            return _to_tensor(_upright_8bit(image), size, channels)


def _ignore(name: str, reason: str) -> None:
    """The default of `on_skip`."""


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(pair) < 1:
        msg = f"The size of images must be positive; got {size}."
        raise PushforwardError(msg)
    return pair


# -- one image --------------------------------------------------------------------------------------------------------


def _upright_8bit(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, in mode L or RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a sample
        return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        msg = "floating-point samples have no agreed white"
        raise ValueError(msg)
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "1")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


def _to_tensor(image: Image.Image, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).contiguous()


# -- sources ----------------------------------------------------------------------------------------------------------


def _from_folder(
    folder: Path, size: tuple[int, int] | None, channels: int | None, on_skip: Callable[[str, str], None]
) -> ImageData:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )
    if not files:
        msg = f"There is no image in {folder}; its files must end in {', '.join(sorted(SUFFIXES))}."
        raise PushforwardError(msg)
    images, skipped = _read_all(((str(f), f) for f in files), size, channels, on_skip)
    if not images:
        msg = f"None of the {len(files)} images in {folder} can be read; {files[0]}: {skipped[0][1]}."
        raise PushforwardError(msg)
    parents = {file: file.relative_to(folder).parts[0] for file in files if file.parent != folder}
    good = [file for file in files if str(file) in images]
    tensor = _together(list(images.values()), str(folder))
    captions = _captions(folder, good)
    if not all(file in parents for file in good):
        return ImageData(tensor, skipped=tuple(skipped), captions=captions)
    classes = tuple(sorted({parents[file] for file in good}))
    labels = torch.tensor([classes.index(parents[file]) for file in good])
    return ImageData(tensor, labels, classes, tuple(skipped), captions)


def _captions(folder: Path, files: list[Path]) -> tuple[str, ...] | None:
    """The captions that `metadata.jsonl` has of the files, as data sets on the hub write them; `None` without it."""
    path = folder / _METADATA
    if not path.is_file():
        return None
    captions: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a caption may hold other ends of lines
    except UnicodeDecodeError as error:
        msg = f"{path} is no UTF-8 text ({error}); write it anew."
        raise PushforwardError(msg) from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.strip() else {}
            name, text = entry.get("file_name"), next((entry[key] for key in _CAPTION_COLUMNS if key in entry), None)
        except (ValueError, AttributeError):
            msg = f"Line {number} of {path} is no JSON object; write one with file_name and text for each image."
            raise PushforwardError(msg) from None
        if isinstance(name, str) and isinstance(text, str):
            captions[Path(name).as_posix()] = text
    if not captions:
        return None
    names = [file.relative_to(folder).as_posix() for file in files]
    missing = [name for name in names if name not in captions]
    if missing:
        few = f"{len(missing)} of {len(names)} images, {missing[0]} for one"
        msg = f"{path} has no text for {few}; add it, or remove the file."
        raise PushforwardError(msg)
    return tuple(captions[name] for name in names)


def _read_all(
    files: Iterable[tuple[str, Any]],
    size: tuple[int, int] | None,
    channels: int | None,
    on_skip: Callable[[str, str], None],
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The readable images by name, and the unreadable names with the reason."""
    images, skipped = {}, []
    for name, file in files:
        try:
            images[name] = read_image(file, size=size, channels=channels)
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            reason = str(error).replace("\n", " ") or type(error).__name__
            skipped.append((name, reason))
            on_skip(name, reason)
    return images, skipped


def _together(images: list[Tensor], source: str) -> Tensor:
    """One tensor; grey images become colour ones where the source has both."""
    channels = max(image.shape[0] for image in images)
    images = [image.expand(channels, -1, -1) for image in images]
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) > 1:
        a, b = sorted(sizes)[0], sorted(sizes)[-1]
        msg = f"The images of {source} have different sizes, from {a[0]}x{a[1]} to {b[0]}x{b[1]}; give the size wanted."
        raise PushforwardError(msg)
    return torch.stack(images)


def _from_npz(path: Path, size: tuple[int, int] | None, channels: int | None, split: str) -> ImageData:
    if split not in _IMAGE_KEYS:
        msg = f"An .npz file has the splits train and test; got {split!r}."
        raise PushforwardError(msg)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                key: file[key]
                for key in (*_IMAGE_KEYS[split], *_LABEL_KEYS[split], *_CAPTION_KEYS[split], "classes")
                if key in file.files
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        msg = f"{path} cannot be read as an .npz file: {error}."
        raise PushforwardError(msg) from error
    x = next((arrays[key] for key in _IMAGE_KEYS[split] if key in arrays), None)
    if x is None:
        msg = f"{path} has no array {' or '.join(_IMAGE_KEYS[split])}."
        raise PushforwardError(msg)
    tensor = _fitted(_checked_array(x, path), size, channels)
    said = next((arrays[key] for key in _CAPTION_KEYS[split] if key in arrays), None)
    captions = None if said is None else tuple(_text(value) for value in said.ravel())
    if captions is not None and len(captions) != len(tensor):
        msg = f"{path} has {len(captions)} captions of {len(tensor)} images; give one for each."
        raise PushforwardError(msg)
    y = next((arrays[key] for key in _LABEL_KEYS[split] if key in arrays), None)
    if y is None:
        return ImageData(tensor, captions=captions)
    y = _checked_labels(y, len(tensor), path)
    names = arrays.get("classes")
    count = int(y.max()) + 1
    classes = tuple(str(k) for k in (range(count) if names is None or len(names) < count else names))
    return ImageData(tensor, torch.from_numpy(y), classes, captions=captions)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _checked_array(x: np.ndarray, path: Path) -> Tensor:
    """`(count, channels, height, width)` from what the file has."""
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape:
        msg = (
            f"The images of {path} must be uint8 of shape (count, height, width, 1 or 3); "
            f"they are {x.dtype} of shape {x.shape}."
        )
        raise PushforwardError(msg)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _checked_labels(y: np.ndarray, count: int, path: Path) -> np.ndarray:
    if y.shape != (count,) or y.dtype.kind not in "iu" or y.min() < 0:
        msg = f"The labels of {path} must be {count} whole numbers from 0; they are {y.dtype} of shape {y.shape}."
        raise PushforwardError(msg)
    return y.astype(np.int64)


def _fitted(images: Tensor, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """Array images brought to the wanted size and channels, as files would be."""
    have = images.shape[1]
    if (size is None or size == tuple(images.shape[2:])) and channels in (None, have):
        return images
    arrays = (image[0].numpy() if have == 1 else image.permute(1, 2, 0).numpy() for image in images)
    return torch.stack([_to_tensor(Image.fromarray(array), size, channels) for array in arrays])


def _from_datasets(
    name: str, size: tuple[int, int] | None, channels: int | None, split: str, on_skip: Callable[[str, str], None]
) -> ImageData:
    try:
        import datasets
    except ImportError as error:
        msg = f"There is no folder or .npz file {name!r}; a data set by name needs `pip install 'pushforward[train]'`."
        raise PushforwardError(msg) from error
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        reason = str(error).partition("\n")[0]
        msg = f"{name!r} is no folder, no .npz file and no data set to load: {reason}"
        raise PushforwardError(msg) from error
    column = next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        msg = f"The data set {name!r} has no column of images; it has {', '.join(data.features)}."
        raise PushforwardError(msg)
    images, skipped = _read_all(((str(k), data[k][column]) for k in range(len(data))), size, channels, on_skip)
    if not images:
        msg = f"No image of the data set {name!r} can be read."
        raise PushforwardError(msg)
    tensor = _together(list(images.values()), name)
    key = next((key for key, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    said = next((name for name in _CAPTION_COLUMNS if name in data.features), None)
    captions = None if said is None else tuple(str(data[said][int(k)]) for k in images)
    if key is None:
        return ImageData(tensor, skipped=tuple(skipped), captions=captions)
    every = data[key]
    labels = torch.tensor([int(every[int(k)]) for k in images])
    return ImageData(tensor, labels, tuple(data.features[key].names), tuple(skipped), captions)
