"""Find a model by what the user calls it."""

from __future__ import annotations

from pathlib import Path

import torch

from pushforward.errors import PushforwardError
from pushforward.model import zoo
from pushforward.model.model import Model
from pushforward.model.storage import CONFIG, FORMAT, load_model, read_json


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
) -> Model:
    """A model from the zoo, from a folder, or from the hub.

    Args:
        source: a name of the zoo (`pushforward models`), a folder that `pushforward train` made, or a folder or hub
            name of a `diffusers` model.
        device: for the network.
        dtype: of its weights; by default float32.
        revision: of a hub name.
        size: of the images of a `diffusers` model in pixels, or their height and width; by default its own.

    Raises:
        PushforwardError: nothing of that name, or it cannot be read; it makes no images of this size.
    """
    if str(source) in zoo.names():
        return _placed(zoo.load_zoo(str(source)), device, dtype, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        if config.is_file() and read_json(config).get("format") == FORMAT:
            return _placed(load_model(folder, folder.name), device, dtype, size)
    elif folder.exists():
        raise PushforwardError(f"{source} is a file; a model is a folder.")
    elif str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise PushforwardError(
            f"No model {str(source)!r}: neither a folder nor one of the package's ({', '.join(zoo.names()) or 'none'})."
        )
    from pushforward.model.diffusers.load import diffusers_model

    return diffusers_model(source, device=device, dtype=dtype, revision=revision, size=size)


def _placed(
    model: Model, device: torch.device | str, dtype: torch.dtype | None, size: int | tuple[int, int] | None
) -> Model:
    own = None if model.image_shape is None else tuple(model.image_shape[1:])
    if size is not None and own != ((size, size) if isinstance(size, int) else tuple(size)):
        raise PushforwardError(
            f"Model {model.name!r} makes images of {'x'.join(map(str, own or ()))} only: leave the size out."
        )
    if dtype is not None and model.module is not None:
        model.module.to(dtype)
    return model.to(device)
