"""Work on many images that can be interrupted: a folder of results, one file an image.

Every result is written whole as soon as it is there. The same command goes on where it was stopped; a file that cannot
be read is named and left out, and stops nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from pushforward.cli.common import image_files, progress, read_file, write_json
from pushforward.errors import PushforwardError
from pushforward.reading import Fit, sentences

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.reading import Notes

__all__ = ["Item", "Outcome", "list_items", "open_folder", "read_items", "work_through"]

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Item:
    """One image to work on.

    Args:
        name: of its result, without the end: its place below the folder that was named.
        source: what the user calls it.
        position: in the whole list.
        read: the image, uint8 `(channels, height, width)`; it adds what it did to a counter.
    """

    name: str
    source: str
    position: int
    read: Callable[[Notes], Tensor]


@dataclass(eq=False)
class Outcome:
    """What became of the images.

    Args:
        done: results of this run, in order.
        before: how many an earlier run had left.
        skipped: files that could not be read, with the reason.
        notes: what had to be done to the images, with how many.
    """

    done: list[Item] = field(default_factory=list)
    before: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=Counter)

    @property
    def lines(self) -> list[str]:
        """All notes as sentences."""
        earlier = [f"{self.before} results were there already"] * bool(self.before)
        return [*earlier, *sentences(self.notes), *self.skipped.values()]


def list_items(
    sources: Sequence[Path],
    shape: tuple[int, int, int],
    *,
    out: Path | None = None,
    split: str = "test",
    count: int | None = None,
    fit: Fit = "crop",
) -> list[Item]:
    """The images of files, folders (searched recursively) and `.npz` files, none of them read yet.

    Args:
        sources: at least one.
        shape: channels, height and width that the images are brought to.
        out: folder of the results; what lies there is no image to work on.
        split: of `.npz` files.
        count: the first of them only.
        fit: how they are brought to that height and width.

    Raises:
        PushforwardError: nothing there, or the results would lie among the images.
    """
    from pushforward.data import brought, load_images

    channels, *size = shape
    found: list[tuple[str, str, Callable[[Notes], Tensor]]] = []
    for source in sources:
        if source.suffix.lower() == ".npz" and source.is_file():
            for i, image in enumerate(load_images(source, split=split).images):

                def take(done: Notes, image: Tensor = image) -> Tensor:
                    return brought(image[None], (size[0], size[1]), channels, fit, done)[0]

                found.append((f"{source.stem}-{i:05d}", f"{source}[{i}]", take))
            continue
        mine = out is not None and source.is_dir() and out.resolve().is_relative_to(source.resolve())
        if out is not None and mine and out.resolve() == source.resolve():
            msg = f"The results cannot lie among the images in {source}; name another folder with --out."
            raise PushforwardError(msg)
        for file in image_files(source):
            if out is not None and mine and file.resolve().is_relative_to(out.resolve()):
                continue  # a result of an earlier run
            below = file.relative_to(source) if source.is_dir() else Path(file.name)
            name = below.with_suffix("").as_posix()

            def read(done: Notes, file: Path = file) -> Tensor:
                return read_file(file, (size[0], size[1]), channels, done, fit)

            found.append((name, str(file), read))
    taken: set[str] = set()
    items = []
    for position, (name, source_name, read_it) in enumerate(found[:count]):
        unique = next(n for k in count_from(1) if (n := name if k == 1 else f"{name}-{k}") not in taken)
        taken.add(unique)
        items.append(Item(unique, source_name, position, read_it))
    if not items:
        msg = "There is no image to work on: name at least one file, folder or .npz file."
        raise PushforwardError(msg)
    return items


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder of results, or go on with one that was made with the same settings.

    Raises:
        PushforwardError: it has results of other settings.
    """
    path, mine = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if path.is_file() and any(other.name != SETTINGS for other in folder.iterdir()):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        changed = sorted(key for key in {*before, *mine} if before.get(key) != mine.get(key))
        if changed:
            msg = f"{folder} holds results of other settings ({', '.join(changed)} differ); name another folder."
            if changed == ["images"]:
                msg = (
                    f"{folder} holds results of other images; name another folder, or the images' own folder each time."
                )
            raise PushforwardError(msg)
    else:
        write_json(mine, str(path))


def read_items(items: Sequence[Item], outcome: Outcome) -> tuple[list[Item], Tensor | None, list[int]]:
    """Those that can be read, their images in [-1, 1], and a number for each, by what it shows."""
    import torch

    kept, images = [], []
    for item in items:
        try:
            images.append(item.read(outcome.notes))
            kept.append(item)
        except PushforwardError as error:
            outcome.skipped[item.source] = str(error)
    if not kept:
        return [], None, []
    numbers = [crc32(image.contiguous().numpy().tobytes()) for image in images]
    return kept, torch.stack(images).float() / 127.5 - 1, numbers


def work_through(
    items: Sequence[Item],
    work: Callable[[list[Item], Tensor, list[int]], None],
    finished: Callable[[Item], bool],
    *,
    label: str,
    batch: int,
    quiet: bool,
) -> Outcome:
    """Do all items that are not finished, batch after batch, with a progress bar.

    Args:
        items: in order.
        work: given the items of a batch, their images in [-1, 1] and a number for each; it writes the results.
        finished: whether an item's result is there.
        label: of the progress bar.
        batch: items at a time.
        quiet: without the bar.

    Raises:
        PushforwardError: not one of the images can be read.
    """
    todo = [item for item in items if not finished(item)]
    outcome = Outcome(before=len(items) - len(todo))
    with progress(label, total=len(todo), unit="image", quiet=quiet) as bar:
        for first in range(0, len(todo), batch):
            some = todo[first : first + batch]
            kept, images, numbers = read_items(some, outcome)
            if images is not None:
                work(kept, images, numbers)
                outcome.done += kept
            bar.update(len(some))
    if outcome.skipped and not outcome.done and not outcome.before:
        raise PushforwardError(next(iter(outcome.skipped.values())))
    return outcome
