"""Splits, captions and classes of a folder of images, in the layouts of `datasets` and the usual trainers.

- *Splits* are sub-folders `train`, `validation` and `test` (or `training`, `val`, `eval` …), of which one is read.
- *Captions* come from `metadata.jsonl`, `.csv` or `.parquet` with a column `file_name`, or from a text file beside each
  image (`x.txt` or `x.caption` beside `x.png`), whose lines are joined by commas.
- *Classes* come from a column `label` of the metadata, or from sub-folders: those that the images lie in, if all are
  equally deep and no name occurs twice, otherwise those at the top. A few images beside the sub-folders have no class.

Notes, each a part of a sentence, say what was found, how it was used and what was ignored.

References:
    `imagefolder` of `datasets`: https://huggingface.co/docs/datasets/image_load;
    `ImageFolder` of torchvision, whose classes are the sub-folders at the top;
    the text files of kohya's sd-scripts and of ai-toolkit.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pushforward.data.reading import explained
from pushforward.data.words import few, many
from pushforward.errors import PushforwardError

__all__ = [
    "SPLITS", "SUFFIXES", "Table", "beside", "by_folder", "caption_column", "caption_of", "label_column",
    "of_split", "said", "tables", "walk",
]  # fmt: skip

SUFFIXES = {
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BESIDE = (".txt", ".caption")


def walk(folder: Path) -> tuple[list[Path], list[Path], int]:
    """List the images in a folder and below it, list the other files, and count the hidden images.

    Each link is followed once. Names that begin with a dot are hidden, and so are files that macOS adds to archives.
    """
    images, others, hidden, seen = list[Path](), list[Path](), 0, set[str]()
    for place, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        parts = Path(place).relative_to(folder).parts
        for name in names:
            file = Path(place, name)
            image = file.suffix.lower() in SUFFIXES
            if any(part.startswith(".") or part == "__MACOSX" for part in (*parts, name)):
                hidden += image
            else:
                (images if image else others).append(file)
    if not images:
        but = f" ({many(hidden, 'hidden image')} not read)" if hidden else ""
        raise PushforwardError(f"There is no image in {folder}{but}; image files end in {', '.join(sorted(SUFFIXES))}.")
    return sorted(images), sorted(others), hidden


def of_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[str]]:
    """Select the files of a split if the folder has splits, or its only sub-folder, or that one's; otherwise all.

    Raises:
        PushforwardError: there are splits, but not this one.
    """
    of = {name: key for key, names in SPLITS.items() for name in names}
    base, splits = folder, set[str]()
    while tops := {parts[0] for file in files if len(parts := _below(file, base)) > 0}:
        splits = {of[top.lower()] for top in tops if top.lower() in of}
        if all(top.lower() in of for top in tops) or {"train", "test"} <= splits or {"train", "validation"} <= splits:
            break
        if len(tops) > 1:
            return files, []
        base /= tops.pop()
    else:
        return files, []
    if split not in splits:
        raise PushforwardError(
            f"{base} has no images of the split {split}, only of {', '.join(sorted(splits))}; name one of its folders."
        )
    mine = [file for file in files if (parts := _below(file, base)) and of.get(parts[0].lower()) == split]
    stray = [file for file in files if not (parts := _below(file, base)) or parts[0].lower() not in of]
    notes = [f"the split {split} of {', '.join(sorted(splits))}: {many(len(mine), 'image')}"]
    if stray:
        notes.append(f"{many(len(stray), 'image')} in no split, left out ({stray[0].relative_to(folder)})")
    return mine, notes


def _below(file: Path, base: Path) -> tuple[str, ...]:
    """List the folders between a base and a file; none if the file lies elsewhere."""
    return file.relative_to(base).parts[:-1] if file.is_relative_to(base) else ()


def by_folder(files: list[Path], lose: bool) -> tuple[dict[Path, str] | None, list[str]]:
    """Find the class of each file by its folder, or `None` without classes, and notes about it.

    Args:
        files: the images.
        lose: whether images without a class may be left out.
    """
    base = Path(os.path.commonpath([file.parent for file in files]))
    deeper = [file.parent for file in files if file.parent != base]
    if deeper:
        base = Path(os.path.commonpath(deeper))
    of = {file: parts for file in files if (parts := _below(file, base))}
    stray = [file for file in files if file not in of]
    equally_deep = len({len(parts) for parts in of.values()}) == 1
    unique = len({parts[-1] for parts in of.values()}) == len(set(of.values()))
    classes = {file: parts[-1 if equally_deep and unique else 0] for file, parts in of.items()}
    names = sorted(set(classes.values()))
    if len(names) < 2:
        return None, [f"no classes, because there is one sub-folder only ({base.name})"] * bool(deeper)
    if stray and (len(stray) >= len(of) or not lose):
        return None, [f"no classes, because of {many(len(stray), 'image')} beside the sub-folders ({few(names)})"]
    notes = [f"{len(names)} classes by sub-folder: {few(names)}"]
    if stray:
        where = stray[0].relative_to(base.parent) if stray[0].is_relative_to(base) else stray[0]
        notes.append(f"{many(len(stray), 'image')} left out, in no class's folder ({where})")
    return classes, notes


def beside(files: list[Path], others: list[Path]) -> tuple[dict[Path, str] | None, set[Path], list[str]]:
    """Read the captions in text files beside images, or `None` without; also the text files, and notes.

    Raises:
        PushforwardError: a file is not text.
    """
    there = set(others)
    found: dict[Path, Path] = {}
    for file in files:
        places = (place for end in _BESIDE for place in (file.with_suffix(end), file.with_name(file.name + end)))
        if text := next((place for place in places if place in there), None):
            found[file] = text
    if not found:
        return None, set(), []
    ends = " and ".join(sorted({text.suffix for text in found.values()}))
    lacking = len(files) - len(found)
    if lacking > len(found):
        return None, set(), [f"no captions, as {lacking} of {len(files)} images have no {ends} file beside them"]
    captions = {file: ", ".join(_lines(text)) for file, text in found.items()}
    note = f"captions from {many(len(found), f'{ends} file')}"
    return captions, set(found.values()), [note + f"; {many(lacking, 'image')} without" * bool(lacking)]


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty.

    Raises:
        PushforwardError: it is not text.
    """
    return [line.strip() for line in _decoded(path).split("\n") if line.strip()]


def _decoded(path: Path) -> str:
    """Read a text file, keeping its line ends."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PushforwardError(f"{path} is not UTF-8 text ({error}); write it again.") from None


# -- metadata ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The content of a metadata file.

    Args:
        path: the file.
        captions: the caption of each image.
        labels: the class of each image, a number or a name.
        note: how the file was used.
    """

    path: Path
    captions: Mapping[Path, str]
    labels: Mapping[Path, int | str]
    note: str


def tables(others: Sequence[Path], files: Sequence[Path]) -> list[Table]:
    """Read the metadata in the images' folders or above; of several files in one folder, the first of `_METADATA`.

    Raises:
        PushforwardError: a file is damaged.
    """
    places = {place for file in files for place in file.parents}
    chosen: dict[Path, Path] = {}
    for name in _METADATA:
        for file in others:
            if file.name == name and file.parent in places:
                chosen.setdefault(file.parent, file)
    return [_table(chosen[place]) for place in sorted(chosen)]


def _table(path: Path) -> Table:
    """Read a metadata file.

    Raises:
        PushforwardError: it is damaged.
    """
    rows = _rows(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [key for key in ("file_name", *columns) if key in columns and key.endswith("file_name")]
    if not names:
        return Table(path, {}, {}, f"{path.name} has no column file_name, and is ignored")
    rows = [row for row in rows if isinstance(row.get(names[0]), str)]
    columns.remove(names[0])
    texts = [key for key in columns if any(caption_of(row.get(key)) is not None for row in rows)]
    prose = [key for key in texts if 2 * sum(" " in (caption_of(row.get(key)) or "") for row in rows) >= len(rows)]
    caption, label = caption_column(texts, prose), label_column(columns)
    captions: dict[Path, str] = {}
    labels: dict[Path, int | str] = {}
    again = 0
    for row in rows:
        file = Path(os.path.normpath(path.parent / row[names[0]].replace("\\", "/")))
        again += file in captions or file in labels
        if caption is not None and (text := caption_of(row.get(caption))) is not None:
            captions.setdefault(file, text)
        if label is not None and isinstance(value := row.get(label), int | str):
            labels.setdefault(file, int(value) if str(value).isdecimal() else str(value))
    taken = [f"{what} from its column {key}" for what, key in (("captions", caption), ("classes", label)) if key]
    note = f"{path.name}: {' and '.join(taken) or 'no column of captions or classes'}"
    if left := [key for key in columns if key not in (caption, label)]:
        note += f"; not read: {few(left)}"
    if again:
        note += f"; {many(again, 'more row')} of the same images not read"
    return Table(path, captions, labels, note)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metadata file.

    Raises:
        PushforwardError: it is damaged, or its format needs a package that is not installed.
    """
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
        except ImportError as error:
            raise PushforwardError(
                f"{path} needs the package pyarrow: pip install pyarrow, or write {_METADATA[0]} instead."
            ) from error
        try:
            return list(parquet.read_table(path).to_pylist())
        except (ArrowException, OSError, ValueError) as error:
            raise PushforwardError(f"{path} cannot be read as Parquet ({explained(error)}); write it again.") from None
    text = _decoded(path)
    if path.suffix == ".csv":
        try:
            return [{key: value for key, value in row.items() if key} for row in csv.DictReader(io.StringIO(text))]
        except csv.Error as error:
            raise PushforwardError(f"{path} cannot be read as CSV ({error}); write it again.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # a caption may contain other line ends
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise PushforwardError(
                f"Line {number} of {path} is not a JSON object; write one with file_name and text for each image."
            )
        rows.append(row)
    return rows


def caption_of(value: Any) -> str | None:
    """Return a caption, or the first of several."""
    if isinstance(value, list | tuple):
        value = next((one for one in value if isinstance(one, str)), None)
    return value if isinstance(value, str) else None


def caption_column(texts: Sequence[str], prose: Sequence[str] = ()) -> str | None:
    """Find the column of captions: by its name, or because it alone has sentences."""
    known = [key for name in _CAPTION_COLUMNS for key in texts if key.lower() == name]
    known += [key for key in texts if "caption" in key.lower()]
    if not known and len(prose) == 1:
        known = [*prose]
    return known[0] if known else None


def label_column(columns: Sequence[str]) -> str | None:
    """Find the column of classes by its name."""
    return next((key for name in _LABEL_COLUMNS for key in columns if key.lower() == name), None)


def said(files: Sequence[Path], tables: Sequence[Table], what: Literal["captions", "labels"]) -> dict[Path, Any] | None:
    """Look up every image in the metadata, the nearest file first; `None` if there are no entries.

    Raises:
        PushforwardError: only some images have an entry.
    """
    those = [table for table in tables if getattr(table, what)]
    if not those:
        return None
    every = {file: value for table in those for file, value in getattr(table, what).items()}
    place = {file: Path(os.path.normpath(file)) for file in files}
    missing = [file for file in files if place[file] not in every]
    if missing:
        one = os.path.relpath(missing[0], those[0].path.parent)
        word = "text" if what == "captions" else "label"
        few = f"{len(missing)} of {len(files)} images, {one} for one"
        raise PushforwardError(f"{those[0].path} has no {word} for {few}; add it, or remove the file.")
    return {file: every[place[file]] for file in files}
