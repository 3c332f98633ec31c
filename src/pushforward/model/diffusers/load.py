"""Models in the format of `diffusers`: a folder, a checkpoint in one file, or a name on the hub.

A pipeline is opened as it is, and is the model's network (`model.diffusers.pipeline`). Only a `UNet2DModel`, alone with
its scheduler or in one of the pipelines that draw with nothing else, is called without a pipeline
(`model.diffusers.networks`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian
from pushforward.model.diffusers import folders
from pushforward.model.diffusers.folders import CONFIG, Folder
from pushforward.model.diffusers.networks import Decoder, Encoder, Rescaled, Unet
from pushforward.model.diffusers.opening import add_lora, open_checkpoint, open_pipeline
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.pipeline import from_pipeline
from pushforward.model.diffusers.schedules import read_schedule
from pushforward.model.diffusers.tables import Settings
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.storage import read_json

__all__ = ["diffusers_model"]

KIND = "UNet2DModel"
PLAIN = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "ScoreSdeVePipeline", "KarrasVePipeline", "LDMPipeline")
PICTURES = ("image", "mask", "control")  # arguments with these in their names may be files


def diffusers_model(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
    call: Mapping[str, Any] | None = None,
    lora: Sequence[str] = (),
) -> Model:
    """Load a model from a folder, a checkpoint or a hub repository of `diffusers`, as `pushforward.load` says.

    Raises:
        PushforwardError: `diffusers` or `transformers` is not installed; the source does not exist, lacks a part or is
            damaged; the pipeline cannot be asked in this way (see `from_pipeline`), or makes no images of this size.
    """
    import_diffusers()
    local, weights = Path(source).expanduser(), dtype or torch.float32
    if local.is_file():
        pipe = open_checkpoint(local, weights)
    else:
        folder = folders.find(local if local.is_dir() else folders.download(str(source), revision))
        if _is_plain(folder):
            if call or lora:
                raise PushforwardError(f"{source} is a {KIND}, which takes no call and no LoRA; leave these out.")
            return _plain(folder, source, device, dtype, size)
        pipe = open_pipeline(folder, weights)
    add_lora(pipe, lora)
    pipe.to(device)
    asked, told = _arguments(pipe, call or {}, size)
    name = local.stem if local.is_file() else local.name if local.is_dir() else str(source)
    model = from_pipeline(pipe, name=name, **asked)
    made = None if model.image_shape is None else model.image_shape[-2:]
    if size is not None and made != _sides(size):
        raise PushforwardError(
            f"{type(pipe).__name__} makes images of {'x'.join(map(str, made or ()))} where it is asked for {size}; "
            "name that size."
        )
    info = {**model.info, "source": str(source)}
    return replace(model, info={**info, **({"call": told} if told else {}), **({"lora": list(lora)} if lora else {})})


def _arguments(
    pipe: Any, call: Mapping[str, Any], size: int | tuple[int, int] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a pipeline's call, and those that JSON can say, images as their files' full paths."""
    known = signature(type(pipe).__call__).parameters
    asked = dict(call)
    if "control" in asked and "control" not in known:
        name = "control_image" if "control_image" in known else "image"
        if name in asked or not any(part.startswith(("controlnet", "adapter")) or name == "control_image"
                                    for part in pipe.components):  # fmt: skip
            raise PushforwardError(f"{type(pipe).__name__} takes no control image; leave it out.")
        asked = {name if key == "control" else key: value for key, value in asked.items()}
    told: dict[str, Any] = {}
    for name, value in asked.items():
        if isinstance(value, str | Path) and any(word in name for word in PICTURES):
            path = Path(value).expanduser().resolve()
            asked[name], told[name] = _picture(path), str(path)
        elif _is_json(value):
            told[name] = value
    if size is not None:
        if not {"height", "width"} <= set(known):
            raise PushforwardError(
                f"{type(pipe).__name__} takes no height and width, as an image that it is given has its own; leave the "
                "size out."
            )
        asked["height"], asked["width"] = _sides(size)
    return asked, told


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise PushforwardError(f"{path} is no image that can be read; name a file of one.") from error


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# -- networks without a pipeline ---------------------------------------------------------------------------------------


def _is_plain(folder: Folder) -> bool:
    """Say whether a folder is a network alone, or a pipeline that calls one of KIND and nothing else."""
    kinds = [kind for _, kind in folder.parts.values()]
    return not folder.index or (KIND in kinds and folder.index.get("_class_name") in PLAIN)


def _plain(
    folder: Folder, source: str | Path, device: torch.device | str, dtype: torch.dtype | None,
    size: int | tuple[int, int] | None,
) -> Model:  # fmt: skip
    """Load a UNet2DModel, its scheduler and, in a pipeline, its autoencoder."""
    config = read_json(folder.scheduler)
    place = folder.place("unet")
    if (kind := folders.class_of(place)) != KIND:
        raise PushforwardError(
            f"{place} is a {kind} alone; name the folder of its whole pipeline, with model_index.json."
        )
    vae = None if folder.decoder is None else _autoencoder(folder.place(folder.decoder), dtype).to(device)
    network = folders.load_network(place, (KIND,), dtype).to(device)
    settings = network.config
    factor = 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
    height, width = _field(settings, place, size, factor)
    schedule = read_schedule(config, folder.scheduler, height * width)
    channels = _channels(settings, source, varied="learned" in str(config.get("variance_type")))
    module: torch.nn.Module = Unet(network).eval()
    units = schedule.gain, schedule.scale, schedule.shift
    if units != (1, 1, 0):
        module = Rescaled(module, *units)
    return Model(
        folder.root.name if Path(source).expanduser().is_dir() else str(source),
        schedule.process,
        Network(module, **schedule.network),
        (channels, height, width),
        schedule.reference or Gaussian(0.25 if vae is None else 1.0),  # latents are scaled to unit variance
        _classes(settings),
        None if vae is None else Decoder(vae),
        schedule.grid,
        {"source": str(source), "scheduler": config["_class_name"]},
        encoder=None if vae is None else Encoder(vae),
        image_shape=None if vae is None else (vae.config["out_channels"], height * factor, width * factor),
        solvers=schedule.solvers,
    )


def _classes(settings: Settings) -> tuple[str, ...]:
    """Return numbers as the names of the classes of a network that has a table of them."""
    if settings.get("class_embed_type") is not None:
        return ()
    return tuple(map(str, range(settings.get("num_class_embeds") or 0)))


def _channels(settings: Settings, source: str | Path, *, varied: bool) -> int:
    """Return the channels of what is denoised; a variance may follow it in the answer."""
    channels: int = settings["in_channels"]
    given = settings.get("out_channels") or channels
    if given not in ((channels, 2 * channels) if varied else (channels,)):
        raise PushforwardError(
            f"The network of {source} takes {channels} channels and gives {given}; only networks that take no image "
            "besides the noisy one can be read."
        )
    return channels


def _field(settings: Settings, place: Path, size: int | tuple[int, int] | None, factor: int) -> tuple[int, int]:
    """Return height and width of what is denoised."""
    sample = settings["sample_size"]
    if size is not None:
        pixels = _sides(size)
        if any(n < 1 or n % factor for n in pixels):
            raise PushforwardError(
                f"Images of this model have sides that are multiples of {factor} pixels; got {size}."
            )
        height, width = (n // factor for n in pixels)
    elif sample is None:
        raise PushforwardError(
            f"{place / CONFIG} lacks sample_size; add it, the height and width of what the network denoises."
        )
    else:
        height, width = (sample, sample) if isinstance(sample, int) else sample
    return height, width


def _autoencoder(place: Path, dtype: torch.dtype | None) -> Any:
    """Load the autoencoder, in float32 if it overflows in float16."""
    kl = folders.class_of(place) == "AutoencoderKL"
    if dtype == torch.float16 and kl and read_json(place / CONFIG).get("force_upcast", True):
        dtype = torch.float32
    return folders.load_network(place, ("VQModel", "AutoencoderKL"), dtype)
