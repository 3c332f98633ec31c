"""Loading a model by its name or folder."""

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
    """Load a model of the package, of a folder, or of the hub.

    Args:
        source: the name of an embedded model (`pushforward models` lists them), a folder that `pushforward train`
            wrote, or a folder or hub name of a `diffusers` model.
        device: device of the network.
        dtype: dtype of its weights; by default float32.
        revision: branch, tag or commit on the hub.
        size: side, or height and width, in pixels, of the images of a `diffusers` model; by default its own.

    Raises:
        PushforwardError: there is no model of that name, it cannot be read, or it makes no images of this size.
    """
    if str(source) in zoo.names():
        return _placed(zoo.load_zoo(str(source)), device, dtype, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        if config.is_file() and read_json(config).get("format") == FORMAT:
            return _placed(load_model(folder, folder.name), device, dtype, size)
    elif folder.exists():
        raise PushforwardError(f"{source} is a file; name the folder of a model.")
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
