"""Find a model by what the user calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pushforward.errors import PushforwardError
from pushforward.model import zoo
from pushforward.model.model import CONFIG, FORMAT, Model, load_model, read_json


def load(source: str | Path, **settings: Any) -> Model:
    """A model from the zoo, from a folder, or from the hub.

    Args:
        source: a name of the zoo (`pushforward models`), a folder that `pushforward train` made, or a folder or hub
            name of a `diffusers` model.
        settings: passed to `diffusers_model`.

    Raises:
        PushforwardError: nothing of that name, or it cannot be read.
    """
    if str(source) in zoo.names():
        return zoo.load_zoo(str(source))
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        if config.is_file() and read_json(config).get("format") == FORMAT:
            return load_model(folder, folder.name)
    elif folder.exists():
        msg = f"{source} is a file; a model is a folder."
        raise PushforwardError(msg)
    elif str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        msg = (
            f"No model {str(source)!r}: neither a folder nor one of the package's ({', '.join(zoo.names()) or 'none'})."
        )
        raise PushforwardError(msg)
    from pushforward.model.diffusers import diffusers_model

    return diffusers_model(source, **settings)
