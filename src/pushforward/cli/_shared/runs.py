"""Long runs that go on where they were stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pushforward.cli._shared.report import remark
from pushforward.data.files import digest
from pushforward.data.schema import check
from pushforward.guidance.chains import Chains
from pushforward.guidance.checkpoints import save_checkpoint
from pushforward.guidance.posterior import Descents

__all__ = ["Kept"]

_SAVE_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class _Info:
    seconds: float
    made: str | None = None


class Kept:
    """What chains or descents have come to, in a file: written now and then, and when the run ends or breaks off.

    Args:
        path: path of the file.
        load: reads it.
        device: for the tensors.
        made: what the run is made with (`batch.made_of`). A file that was made with something else is put aside.

    Attributes:
        before: what an earlier run has left, if any.
        seconds: of work, of all runs, once it is over.
    """

    def __init__(
        self, path: Path, load: Callable[[Path, str], tuple[Any, dict[str, Any]]], device: str, made: str
    ) -> None:
        self._path, self._made, self.seconds = path, made, 0.0
        self.before: Any = None
        self._last: Chains | Descents | None = None
        if path.is_file():
            before, info = load(path, device)
            header = check(info, _Info, f"The header of {path}", "remove it to begin anew")
            if header.made == made:
                self.before, self.seconds = before, header.seconds
            else:
                aside = path.with_stem(f"{path.stem}-{digest(path)[:8]}")
                path.replace(aside)
                told = f"{path} was made with other weights or energies; it is {aside.name} now."
                remark(f"{told} The run begins anew.")
        self._saved = self._began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def tell(self, state: Chains | Descents) -> None:
        """That the work has come so far."""
        if self.before is None or state.step > self.before.step:
            self._last = state
            if time.perf_counter() - self._saved > _SAVE_EVERY:
                self._save()

    def _save(self) -> None:
        assert self._last is not None
        self._saved = time.perf_counter()
        save_checkpoint(
            self._path, self._last, {"seconds": self.seconds + self._saved - self._began, "made": self._made}
        )

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._save()
            self.seconds += self._saved - self._began
