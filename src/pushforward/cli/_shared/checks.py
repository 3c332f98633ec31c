"""What is checked of options before the work: that none is given in vain, and that results can be written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pushforward.cli._shared.report import remark
from pushforward.data.files import check_writable
from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = ["check_outputs", "check_split", "given", "in_vain", "noted", "spare", "tell_in_vain"]

_GIVEN: ContextVar[frozenset[str]] = ContextVar("given", default=frozenset())


@contextmanager
def noted(names: Collection[str]) -> Iterator[None]:
    """While the block runs, these are the parameters that the user has given on the command line."""
    before = _GIVEN.set(frozenset(names))
    try:
        yield
    finally:
        _GIVEN.reset(before)


def given(name: str) -> bool:
    """Whether the user has given a value for a parameter of the command, be it the default."""
    return name in _GIVEN.get()


def in_vain(options: Mapping[str, str | None]) -> None:
    """Raise if an option was given that has no effect.

        in_vain({"iterations": None if method == "optimise" else "only --method optimise iterates"})

    Args:
        options: why it has none, or `None` if it has one, by the name of the parameter.

    Raises:
        PushforwardError: the first of them that was given.
    """
    for msg in _without_effect(options):
        raise PushforwardError(msg)


def tell_in_vain(options: Mapping[str, str | None]) -> None:
    """As `in_vain`, where the option may stand for what it says of the images: it is told, and the work goes on."""
    for msg in _without_effect(options):
        remark(msg)


def _without_effect(options: Mapping[str, str | None]) -> Iterator[str]:
    for name, why in options.items():
        if why is not None and given(name):
            yield f"--{name.strip('_').replace('_', '-')} has no effect here: {why}; leave it out."


def check_split(sources: Iterable[str | Path]) -> None:
    """Raise if `--split` was given, and no source has splits: folders and files of images have none.

    Raises:
        PushforwardError: the option has no effect.
    """
    places = [Path(source) for source in sources]
    if all(place.exists() and (place.is_dir() or place.suffix.lower() != ".npz") for place in places):
        in_vain({"split": f"only .npz files and data sets have splits, and {places[0]} is neither"})


def spare(count: int, **lists: Sequence[str] | None) -> None:
    """Raise if an option was repeated more often than there are images to take its values in turn.

    Raises:
        PushforwardError: the option has no effect.
    """
    in_vain(
        {
            k: f"{len(v)} are given for {many(count, 'image')}" if v and len(v) > count else None
            for k, v in lists.items()
        }
    )


def check_outputs(
    files: Mapping[str, str | Path | None],
    folders: Mapping[str, Path | None] | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Raise unless all results can be written, before the work for them is done.

    Args:
        files: to be written, by the option that names them; `-` is standard output.
        folders: to be written into.
        inputs: files that are read, which no result may replace.

    Raises:
        PushforwardError: two results have one name, or a result has that of an input.
        OSError: one cannot be written.
    """
    taken = {os.path.realpath(path): "an input" for path in inputs if path is not None}
    for option, path in {**files, **(folders or {})}.items():
        if path is None or str(path) == "-" or _device(path):
            continue
        place = os.path.realpath(path)
        if place in taken:
            raise PushforwardError(f"{option} {path} is {taken[place]}, too; name another.")
        taken[place] = f"that of {option}"
    for path in files.values():
        if path is not None and str(path) != "-":
            check_writable(Path(path))
    for path in (folders or {}).values():
        if path is not None:
            try:
                check_writable(path / "0.png")
            except OSError as error:  # a file that nobody named is of no use to a user
                raise OSError(error.errno, error.strerror, str(path)) from None


def _device(path: str | Path) -> bool:
    """Whether something is there that is neither a file nor a folder, as /dev/null, which takes many results."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
