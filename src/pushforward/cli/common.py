"""What several commands share: their common options, reports and progress."""

import json
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pushforward.files import atomic_path

__all__ = ["JsonOption", "QuietOption", "progress", "write_json"]

JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write a report as JSON to PATH, or to stdout for '-'.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def write_json(report: Mapping[str, Any], destination: str | None) -> None:
    """Write a report to a file, to stdout for `-`, or nowhere for `None`.

    Numbers that JSON cannot say (NaN, infinities) become `null`, paths become strings.
    """
    if destination is None:
        return
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    if destination == "-":
        typer.echo(text)
        return
    with atomic_path(destination) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case os.PathLike():
            return os.fspath(value)
        case _:
            return value


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
