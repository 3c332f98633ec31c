"""The packages `diffusers` and `transformers`, if they are installed."""

from __future__ import annotations

from importlib import import_module
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
    return _imported("diffusers", MISSING)


def import_transformers() -> Any:
    """Import the package `transformers`.

    Raises:
        PushforwardError: it is not installed.
    """
    return _imported("transformers", MISSING_TEXT)


def _imported(name: str, instead: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise PushforwardError(instead) from error
