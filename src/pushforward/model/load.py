"""Loading a model by its name or folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    call: Mapping[str, Any] | None = None,
    lora: str | Path | Sequence[str | Path] = (),
) -> Model:
    """Load a model of the package, of a folder, or of the hub; see `pushforward.load`, whose models have the verbs."""
    loras = [str(one) for one in ([lora] if isinstance(lora, str | Path) else lora)]
    if str(source) in zoo.names():
        _check_call(str(source), call, loras)
        return _placed(zoo.load_zoo(str(source)), device, dtype, size)
    folder = Path(source).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        if config.is_file() and read_json(config).get("format") == FORMAT:
            _check_call(str(source), call, loras)
            return _placed(load_model(folder, folder.name), device, dtype, size)
    elif folder.exists() and folder.suffix not in (".safetensors", ".ckpt"):
        raise PushforwardError(f"{source} is a file; name the folder of a model.")
    elif not folder.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "/", "~"))):
        raise PushforwardError(
            f"No model {str(source)!r}: neither a folder nor one of the package's ({', '.join(zoo.names()) or 'none'})."
        )
    from pushforward.model.diffusers.load import diffusers_model

    return diffusers_model(source, device=device, dtype=dtype, revision=revision, size=size, call=call, lora=loras)


def _check_call(name: str, call: Mapping[str, Any] | None, lora: Sequence[str]) -> None:
    if call or lora:
        what = " and ".join(word for word, given in (("call", call), ("LoRA", lora)) if given)
        raise PushforwardError(f"Model {name!r} is no pipeline of diffusers, and takes no {what}; leave it out.")


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
