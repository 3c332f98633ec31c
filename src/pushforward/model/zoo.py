"""The small models that come with the package."""

from __future__ import annotations

from pathlib import Path

from pushforward.errors import PushforwardError
from pushforward.model.model import Model
from pushforward.model.storage import CONFIG, load_model

FOLDER = Path(__file__).parent.parent / "zoo"


def names() -> list[str]:
    """List the names of the models in the package."""
    return sorted(p.parent.name for p in FOLDER.glob(f"*/{CONFIG}"))


def load_zoo(name: str) -> Model:
    """Load a model of the package by name.

    Raises:
        PushforwardError: there is no such model.
    """
    if name not in names():
        raise PushforwardError(f"The package has no model {name!r}; it has {', '.join(names()) or 'none'}.")
    return load_model(FOLDER / name, name)
