"""The package `diffusers`, if it is installed, and its errors in a few words."""

from __future__ import annotations

from typing import Any

from pushforward.errors import PushforwardError

__all__ = ["MISSING", "import_diffusers", "reason"]

MISSING = "Models of diffusers need the package: pip install 'pushforward[diffusers]'."


def import_diffusers() -> Any:
    """Import the package `diffusers`.

    Raises:
        PushforwardError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise PushforwardError(MISSING) from error
    return diffusers


def reason(error: Exception) -> str:
    """Return the kind and the first sentence of another package's error."""
    lines = str(error).strip().splitlines()
    sentence = lines[0].split(". ")[0].rstrip(".: ") if lines else ""
    return f"{type(error).__name__}, {sentence}" if sentence else type(error).__name__
