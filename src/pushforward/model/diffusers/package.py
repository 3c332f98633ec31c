"""The package `diffusers`, if it is installed."""

from __future__ import annotations

from typing import Any

from pushforward.errors import PushforwardError

__all__ = ["MISSING", "import_diffusers"]

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
