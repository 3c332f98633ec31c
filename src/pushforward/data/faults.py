"""What other packages raise where a file is damaged, and their errors in a few words."""

from __future__ import annotations

from pickle import UnpicklingError

from safetensors import SafetensorError

__all__ = ["FAULTS", "reason"]

FAULTS = (
    ArithmeticError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    SafetensorError, UnpicklingError,
)  # fmt: skip


def reason(error: Exception) -> str:
    """Return the kind and the first sentence of another package's error."""
    lines = str(error).strip().splitlines()
    sentence = lines[0].split(". ")[0].rstrip(".: ") if lines else ""
    return f"{type(error).__name__}, {sentence}" if sentence else type(error).__name__
