"""Locks, so that only one process at a time works on a result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pushforward.errors import PushforwardError

__all__ = ["alone"]

_LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"}  # what `torchrun` and its like set


@contextmanager
def alone(out: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from a result while the block runs.

    The operating system locks a file `.NAME.lock` beside the result, or in it if it is a folder whose parent cannot be
    written to. The lock ends with the process, however that ends. Under `torchrun` the first rank holds it for all. If
    no file can be locked, the block runs without a lock; the writer reports what cannot be written.

    Args:
        out: the file or folder of the result, which need not exist.

    Raises:
        PushforwardError: another process is working on it.
    """
    place = Path(out).resolve()
    rank = os.environ["RANK"] if os.environ.keys() >= _LAUNCHED else "0"
    if rank != "0" or (place.exists() and not place.is_dir() and not place.is_file()):
        yield
        return
    folder = place.parent
    if place.is_dir() and not os.access(folder, os.W_OK):
        folder = place
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        with _locked(folder / f".{place.name}.lock", out):
            yield
    finally:
        for one in new:  # unless something was written
            with suppress(OSError):
                one.rmdir()


@contextmanager
def _locked(path: Path, out: str | os.PathLike[str]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    with suppress(OSError, NotImplementedError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            while not path.exists():  # its last holder removed it after it was opened
                lock.release()
                lock.acquire()
        except Timeout:
            raise PushforwardError(
                f"Another process is at work on {out}; wait until it ends, or name another place for the results."
            ) from None
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                path.unlink()
            lock.release()
