"""Work on many images that can be interrupted: a folder of results, one file an image.

Every result is written whole as soon as it is there. The same command goes on where it was stopped; a file that cannot
be read is named and left out, and stops nothing. With each result lies a key of what it was made of, the image and the
models by their content: where either is another by now, under whatever name, the result is made again.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count as count_from
from pathlib import Path
from shutil import rmtree
from typing import Any
from unicodedata import normalize

import torch
from PIL import Image
from torch import Tensor

from pushforward.cli._shared.options import ImageOptions
from pushforward.cli._shared.report import progress, write_json
from pushforward.data.files import atomic_path, digest
from pushforward.data.inputs import Input, list_inputs
from pushforward.data.pictures import content_number, from_bytes
from pushforward.data.reading import Notes, sentences
from pushforward.data.schema import read
from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = [
    "Item", "Outcome", "complete", "kept_key", "key_of", "list_items", "made_of", "open_folder", "read_items",
    "read_object", "removed_if_empty", "todo", "work_through",
]  # fmt: skip

SETTINGS, NAMES = "settings.json", "names.json"
FORMAT = "pushforward-result-1"  # another one, and all results are made again


@dataclass(frozen=True)
class Item:
    """One image to work on.

    Args:
        name: of its result, without the end: its place below the folder that was named, or one like it where another
            image has that, or has had it in this folder of results.
        source: what the user calls it.
        position: in the whole list.
        read: the image, uint8 `(channels, height, width)`; it adds what it did to a counter.
        origin: where it lies, in full.
    """

    name: str
    source: str
    position: int
    read: Callable[[Notes], Tensor]
    origin: str


@dataclass(eq=False)
class Outcome:
    """What became of the images.

    Args:
        done: results of this run, in order.
        before: how many an earlier run had left.
        stale: how many it had left that were of another image or model, and were to be made again.
        skipped: files that could not be read, with the reason.
        notes: what had to be done to the images, with how many.
        seconds: that this run took.
    """

    done: list[Item] = field(default_factory=list)
    before: int = 0
    stale: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        """All notes as sentences."""
        earlier = [f"there already: {many(self.before, 'result')}"] * bool(self.before)
        stale = [f"made again, as of other images, weights or texts: {many(self.stale, 'result')}"] * bool(self.stale)
        return [*earlier, *stale, *sentences(self.notes), *self.skipped.values()]


def list_items(
    sources: Sequence[Path], shape: tuple[int, int, int], inputs: ImageOptions, out: Path, *, folders: bool = False
) -> list[Item]:
    """The images of files, folders (searched recursively) and `.npz` files, none of them read yet.

    Args:
        sources: at least one.
        shape: channels, height and width that the images are brought to.
        inputs: which of them, and how they are brought to that shape.
        out: folder of the results; what lies there is no image to work on.
        folders: each one's result is a folder, not a picture.

    Raises:
        PushforwardError: nothing there, or the results would lie among the images.
    """
    channels, *size = shape
    place, found = out.resolve(), list[Input]()
    for source in sources:
        within = source.is_dir() and place.is_relative_to(source.resolve())
        if within and place == source.resolve():
            raise PushforwardError(
                f"The results cannot lie among the images in {source}; name another folder with --out."
            )
        listed = list_inputs(source, (size[0], size[1]), channels, split=inputs.split, fit=inputs.fit)
        found += [one for one in listed if not (within and Path(os.path.realpath(one.source)).is_relative_to(place))]
    if not found:
        raise PushforwardError("There is no image to work on: name at least one file, folder or .npz file.")
    names = _kept_names(out)
    taken = {_folded(name) for name in names.values()}
    times: Counter[str] = Counter()
    items = []
    for position, one in enumerate(found[: inputs.count]):
        origin = str(Path(one.source).parent.resolve() / Path(one.source).name)
        times[origin] += 1  # an image may be named twice
        origin += f" {times[origin]}" * (times[origin] > 1)
        if origin not in names:
            names[origin] = _free(one.name, taken, folder=folders)
            taken.add(_folded(names[origin]))
        items.append(Item(names[origin], one.source, position, one.read, origin))
    return items


def _free(name: str, taken: Set[str], *, folder: bool) -> str:
    """The name, or the first of `name-2`, `name-3` … that is free, to file systems that tell `a` from `A` or not."""
    *above, last = name.split("/")
    parts = [*map(_no_file, above), _no_file(last) if folder else last]
    tries = ("/".join(parts) + f"-{k}" * (k > 1) for k in count_from(1))
    return next(one for one in tries if _folded(one) not in taken)


def _folded(name: str) -> str:
    return normalize("NFC", normalize("NFC", name).casefold())


def _no_file(part: str) -> str:
    """A folder's name, which no file of results has."""
    return f"{part}_" if part.lower().endswith((".png", ".json")) else part


def open_folder(folder: Path, settings: Mapping[str, Any], items: Sequence[Item] = ()) -> None:
    """Make a folder of results, or go on with one that was made with the same settings.

    Args:
        folder: folder of the results.
        settings: as the user gave them.
        items: whose names are kept, so that each finds its result again whatever images are added.

    Raises:
        PushforwardError: it has results of other settings.
    """
    path, mine = folder / SETTINGS, _plain(settings)
    if path.is_file() and any(
        other.name not in (SETTINGS, NAMES) and other.name[0] != "." for other in folder.iterdir()
    ):
        before = read(path, dict, "name another folder, or remove this one")
        changed = sorted(key for key in {*before, *mine} if before.get(key) != mine.get(key))
        if changed:
            msg = f"{folder} holds results of other settings ({', '.join(changed)} differ); name another, or remove it."
            if changed == ["images"]:
                msg = (
                    f"{folder} holds results of other images; name another folder, or the images' own folder each time."
                )
            raise PushforwardError(msg)
    else:
        write_json(mine, str(path))
    kept = _kept_names(folder)
    names = kept | {item.origin: item.name for item in items}
    if names != kept:
        with atomic_path(folder / NAMES) as temporary:
            temporary.write_text(json.dumps(names, indent=0) + "\n", encoding="ascii")  # whatever bytes they have


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that the block has made if the block fails before any result is there."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new and folder.is_dir() and {file.name for file in folder.iterdir()} <= {SETTINGS, NAMES}:
            rmtree(folder)
        raise


def _kept_names(folder: Path) -> dict[str, str]:
    """The names that results of images have had in a folder, by the images' `origin`."""
    return {origin: name for origin, name in read_object(folder / NAMES).items() if isinstance(name, str)}


def read_object(path: Path) -> dict[str, Any]:
    """What was written there; nothing, where that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_items(items: Sequence[Item], outcome: Outcome) -> tuple[list[Item], list[Tensor]]:
    """Those that can be read, and their images."""
    kept, images = [], []
    for item in items:
        try:
            images.append(item.read(outcome.notes))
            kept.append(item)
        except PushforwardError as error:
            outcome.skipped[item.source] = str(error)
    return kept, images


# -- what a result was made of -----------------------------------------------------------------------------------------


def made_of(settings: Mapping[str, Any], *parts: object) -> str:
    """The settings that results of one command are made with, and all else that counts besides the image.

    Args:
        settings: as for `open_folder`; where the images lie does not count.
        parts: digests of models, prompts …
    """
    return digest(FORMAT, {key: value for key, value in _plain(settings).items() if key != "images"}, *parts)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def key_of(made: str, image: Tensor) -> str:
    """What is kept with a result: by it, one that was made of the same is known again."""
    return f"{made[:32]}-{digest(image)[:32]}"


def kept_key(path: Path) -> str | None:
    """The key in a picture of results, if it is there, whole, and has one."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.info.get(FORMAT)
    except (OSError, ValueError, SyntaxError):
        return None


def todo(
    items: Sequence[Item], kept: Callable[[Item], str | None], made: Callable[[Item], str]
) -> tuple[list[Item], Outcome]:
    """The items whose results are not there, or were made of something else; what can be said of the others.

    A result whose image cannot be read any more stays, and is named.

    Args:
        items: all.
        kept: the key that lies with an item's result; `None` without a result.
        made: what the item's result is made with (`made_of`).
    """
    left, outcome = [], Outcome()
    for item in items:
        found = kept(item)
        same = found is not None and found.partition("-")[0] == made(item)[:32]
        if same:
            kept_items, images = read_items([item], Outcome(skipped=outcome.skipped))
            same = not kept_items or found == key_of(made(item), images[0])
        if same:
            outcome.before += 1
        else:
            outcome.stale += found is not None
            left.append(item)
    return left, outcome


def complete(
    items: Sequence[Item],
    kept: Callable[[Item], str | None],
    work: Callable[[list[Item], Tensor, list[int], list[str]], None],
    made: Callable[[Item], str],
    *,
    label: str,
    batch: int,
    quiet: bool,
) -> Outcome:
    """Make all results that are not there yet; see `todo` and `work_through` for the arguments.

    Raises:
        PushforwardError: not one of the images can be read.
    """
    started = time.perf_counter()
    left, outcome = todo(items, kept, made)
    work_through(left, outcome, work, made, label=label, batch=batch, quiet=quiet)
    outcome.seconds = time.perf_counter() - started
    return outcome


def work_through(
    items: Sequence[Item],
    outcome: Outcome,
    work: Callable[[list[Item], Tensor, list[int], list[str]], None],
    made: Callable[[Item], str],
    *,
    label: str,
    batch: int,
    quiet: bool,
) -> None:
    """Do what is left, batch after batch, with a progress bar.

    Args:
        items: whose results are to be made, in order.
        outcome: is told what became of them.
        work: given the items of a batch, their images in [-1, 1], a number for each by what it shows, and the keys to
            be kept with the results; it writes them.
        made: what the item's result is made with (`made_of`).
        label: label of the progress bar.
        batch: items at a time.
        quiet: without the bar.

    Raises:
        PushforwardError: not one of the images can be read.
    """
    with progress(label, total=len(items), unit="image", quiet=quiet) as bar:
        for first in range(0, len(items), batch):
            some = items[first : first + batch]
            kept, images = read_items(some, outcome)
            if kept:
                numbers = [content_number(image) for image in images]
                keys = [key_of(made(item), image) for item, image in zip(kept, images, strict=True)]
                work(kept, from_bytes(torch.stack(images)), numbers, keys)
                outcome.done += kept
            bar.update(len(some))
    if outcome.skipped and not outcome.done and not outcome.before:
        raise PushforwardError(next(iter(outcome.skipped.values())))
