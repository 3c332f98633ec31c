"""The packages `diffusers` and `transformers`, if they are installed."""

from __future__ import annotations

from typing import Any

from pushforward.errors import PushforwardError

__all__ = ["MISSING", "import_diffusers", "import_transformers"]

MISSING = "Models of diffusers need the package: pip install 'pushforward[diffusers]'."
MISSING_TEXT = "Models that read prompts need the package transformers: pip install 'pushforward[diffusers]'."


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


def import_transformers() -> Any:
    """Import the package `transformers`.

    Raises:
        PushforwardError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise PushforwardError(MISSING_TEXT) from error
    return transformers
