"""Reports as JSON, and progress on stderr."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import typer

from pushforward.data.files import atomic_path

if TYPE_CHECKING:
    from pushforward.data.datasets import ImageData

__all__ = ["command_line", "plain", "progress", "remark", "tell_notes", "waiting", "write_json"]


def remark(text: str) -> None:
    """Write a line to stderr, as one of the program itself."""
    typer.echo(f"pushforward: {text}", err=True)


def write_json(report: Mapping[str, Any], destination: str | None) -> None:
    """Write a report to a file, to stdout for `-`, or nowhere for `None`.

    Numbers that JSON cannot say (NaN, infinities) become `null`, paths become strings.
    """
    if destination is None:
        return
    text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    if destination == "-":
        typer.echo(text)
        return
    with atomic_path(destination) as temporary:  # a name that is no text is written as JSON escapes it
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def plain(value: Any) -> Any:
    """A value as a report gives it back."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case os.PathLike():
            return os.fspath(value)
        case _:
            return value


def command_line() -> str:
    """The command as it was typed, for reports."""
    return shlex.join(["pushforward", *sys.argv[1:]])


def tell_notes(data: ImageData, *prefix: str, quiet: bool = False) -> None:
    """Write to stderr which images of a data set were left out, and, unless quiet, what was done to the others."""
    for note in () if quiet else data.notes:
        remark(": ".join([*prefix, note]))
    for name, reason in data.skipped:
        remark(f"left out {name}: {reason}")


def progress(label: str, *, total: int | None = None, unit: str = "round", quiet: bool = False) -> Any:
    """A progress bar on stderr.

        with progress("sampling", total=rounds, quiet=quiet) as bar:
            sample(..., callback=lambda _: bar.update())

    Args:
        label: What is under way.
        total: How many steps there will be, if that is known.
        unit: What one step is.
        quiet: Show nothing.

    Returns:
        A `tqdm` bar, to be used as a context so that its line ends before anything else is written.
    """
    from tqdm import tqdm

    return tqdm(desc=label, total=total, unit=unit, disable=quiet)


@contextmanager
def waiting(label: str, *, quiet: bool = False) -> Iterator[None]:
    """Show on stderr for how long the block has run, if that is longer than a second.

    Args:
        label: What is under way.
        quiet: Show nothing.
    """
    from tqdm import tqdm

    done = Event()

    def show() -> None:
        if done.wait(1):
            return
        with tqdm(desc=label, bar_format="{desc} ... {elapsed}") as bar:
            while not done.wait(1):
                bar.refresh()

    shown = Thread(target=show, daemon=True)
    if not quiet:
        shown.start()
    try:
        yield
    finally:
        done.set()
        if not quiet:
            shown.join()
