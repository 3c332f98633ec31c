"""Checks, by arithmetic alone, of whether something will fit into memory."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    import torch

__all__ = ["check_images", "check_memory", "free_memory", "is_lack"]

_GIB = 2**30
_LACKING = ("allocate memory", "out of memory", "array is too big", "size calculation overflowed", "unpacking long")


def check_memory(needed: float, what: str, device: torch.device | str = "cpu") -> None:
    """Raise unless something fits into free memory.

    Args:
        needed: the least number of bytes that it takes.
        what: what is to be made, the subject of the message: "100 images".
        device: where it is to be made.

    Raises:
        PushforwardError: it does not fit.
    """
    free = free_memory(device)
    if needed > free:
        raise PushforwardError(
            f"{what} would take {needed / _GIB:,.1f} GiB of memory; {free / _GIB:,.1f} GiB are free. Ask for less."
        )


def check_images(count: int, shape: Sequence[int], what: str = "images") -> None:
    """Raise unless two float32 copies of this many images of shape `(channels, height, width)` fit into memory.

    Raises:
        PushforwardError: they do not fit.
    """
    size = "x".join(map(str, shape))
    check_memory(8 * count * math.prod(shape), f"{_number(count)} {what} of {size} numbers")


def free_memory(device: torch.device | str = "cpu") -> float:
    """Return the free memory in bytes, within a control group's limit; infinite if unknown."""
    if str(device).startswith("cuda"):
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_machine(), _group())


def is_lack(error: Exception) -> bool:
    """Say whether an error of Python or a library means that something did not fit into memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _LACKING)


def _machine() -> float:
    """Return `MemAvailable` on Linux, and elsewhere the total memory."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def _group() -> float:
    """Return what a container's limit leaves, not counting cached files (cgroup version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (float((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + float(cached["inactive_file"])
    except (OSError, KeyError, ValueError):  # no limit, or none stated here
        return math.inf


def _number(count: int) -> str:
    """Format a number with commas, or by its magnitude if it is too long to read."""
    return f"{count:,}" if count < sys.maxsize else f"{count:.1e}"
