"""Models in the format of `diffusers`: a folder or a name on the hub.

A network does not say what it predicts, or for which diffusion: its scheduler does (`model.diffusers.schedules`). A
model of latents has an autoencoder, a model that reads prompts has text encoders (`model.diffusers.text`). No pipeline
of `diffusers` is run: `model.diffusers.networks` passes each network the inputs that its pipeline would pass, and
`model.diffusers.families` lists the classes of networks that can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian
from pushforward.model.diffusers import folders
from pushforward.model.diffusers.families import FAMILIES, numbered
from pushforward.model.diffusers.folders import CONFIG, ENCODERS, TOKENIZERS, Folder
from pushforward.model.diffusers.networks import Decoder, Encoder, Rescaled
from pushforward.model.diffusers.schedules import read_schedule
from pushforward.model.diffusers.tables import Settings
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.storage import read_json

__all__ = ["diffusers_model"]

FLUX_SIZE = 128  # height and width of its latents, which its configuration does not state


def diffusers_model(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
    embedded_guidance: float = 3.5,
) -> Model:
    """Load a model from a folder or a hub repository of `diffusers`.

    It may be a pipeline (`model_index.json`) around a network of `model.diffusers.families.FAMILIES`, or the folder of
    a UNet2DModel with `scheduler_config.json` in it or in `scheduler/`.

    Args:
        source: a folder, or a name on the hub, `owner/model`.
        device: device of the networks.
        dtype: dtype of their weights, by default float32; states keep their own. An autoencoder that overflows in
            float16 (`force_upcast`) stays in float32.
        revision: branch, tag or commit on the hub.
        size: side, or height and width, of the images in pixels; by default what the configuration says.
        embedded_guidance: guidance to pass to a Flux network that was distilled from guided ones, besides the guidance
            of `Model.given`.

    Raises:
        PushforwardError: `diffusers` or `transformers` is not installed; the source does not exist, lacks a part, is
            damaged, or is a model of another kind; or the model makes no images of this size.
    """
    local = Path(source).expanduser()
    folder = folders.find(local if local.is_dir() else folders.download(str(source), revision))
    config = read_json(folder.scheduler)
    place = folder.place(folder.network)
    settings, kind = read_json(place / CONFIG), folders.class_of(place)
    _check_kind(settings, kind, folder, place)
    reader = FAMILIES[kind]
    text = None if reader.text is None else reader.text(folder, settings, dtype).to(device)
    _check_pipeline(folder, kind)
    vae = None if folder.decoder is None else _autoencoder(folder.place(folder.decoder), dtype).to(device)
    network = folders.load_network(place, (kind,), dtype).to(device)
    settings = network.config
    factor = 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
    patch = 2 if reader.packed else settings.get("patch_size") or 1
    height, width = _field({"sample_size": FLUX_SIZE, **settings}, place, size, factor, patch)
    schedule = read_schedule(config, folder.scheduler, height * width // patch**2)
    varied = reader.classes is not None or "learned" in str(config.get("variance_type"))
    channels = _channels(settings, source, reader.packed, varied)
    module = reader.module(network, (height * factor, width * factor), embedded_guidance).eval()
    units = schedule.gain, schedule.scale, schedule.shift
    if units != (1, 1, 0):
        module = Rescaled(module, *units)
    classes = numbered(settings) if reader.classes is None else reader.classes(folder.index, settings)
    return Model(
        local.name if local.is_dir() else str(source),
        schedule.process,
        Network(
            module,
            unconditional=torch.tensor([len(classes)]) if reader.classes is not None else None,
            **schedule.network,
        ),
        (channels, height, width),
        schedule.reference or Gaussian(0.25 if vae is None else 1.0),  # latents are scaled to unit variance
        classes,
        None if vae is None else Decoder(vae),
        {key: value for key, value in schedule.grid.items() if key not in reader.not_its_grid},
        {"source": str(source), "scheduler": config["_class_name"]},
        text=text,
        encoder=None if vae is None else Encoder(vae),
        image_shape=None if vae is None else (vae.config["out_channels"], height * factor, width * factor),
        solvers=schedule.solvers,
    )


_WITHOUT_EFFECT = ("safety_checker", "feature_extractor")  # parts that judge a finished image


def _check_kind(settings: Settings, kind: str, folder: Folder, place: Path) -> None:
    if kind not in FAMILIES:
        raise PushforwardError(f"{place / CONFIG} describes a {kind}; only {', '.join(FAMILIES)} can be read here.")
    if not folder.index and kind != "UNet2DModel":
        raise PushforwardError(
            f"{folder.root} is a {kind} alone; name the folder of its whole pipeline, with model_index.json."
        )
    _check_parts(folder, kind)
    for key, known in FAMILIES[kind].only.items():
        if settings.get(key) not in known:
            raise PushforwardError(
                f"{place / CONFIG} has {key} {settings.get(key)!r}; such a {kind} cannot be read here."
            )
    if folder.index.get("requires_aesthetics_score"):
        raise PushforwardError(
            f"{folder.root} is a refiner, which takes scores besides prompts; name the model whose images it refines."
        )


def _check_parts(folder: Folder, kind: str) -> None:
    """Raise if the pipeline has parts that are not run here."""
    reader = FAMILIES[kind]
    run = {"scheduler", folder.network, folder.decoder, *_WITHOUT_EFFECT}
    run |= {*ENCODERS, *TOKENIZERS} if reader.text is not None else set()
    others = [name for name in folder.index if folder.has(name) and name not in run]
    if others:
        parts = ", ".join(f"{name} ({folder.index[name][1]})" for name in others)
        raise PushforwardError(
            f"{folder.root} draws with parts that cannot be run here, {parts}; its images would differ without them."
        )


def _check_pipeline(folder: Folder, kind: str) -> None:
    """Raise unless the pipeline draws with these parts as it is done here."""
    reader, pipeline = FAMILIES[kind], folder.index.get("_class_name")
    if folder.index and pipeline not in reader.pipelines:
        known = ", ".join(reader.pipelines)
        raise PushforwardError(
            f"{folder.root} is a {pipeline}; for a {kind}, only the pipelines {known} can be reproduced here."
        )


def _channels(settings: Settings, source: str | Path, packed: bool, varied: bool) -> int:
    """Return the channels of what is denoised; a variance may follow it in the answer."""
    channels, given = settings["in_channels"], settings.get("out_channels") or settings["in_channels"]
    if given not in ((channels, 2 * channels) if varied else (channels,)):
        raise PushforwardError(
            f"The network of {source} takes {channels} channels and gives {given}; only networks that take no image "
            "besides the noisy one can be read."
        )
    return channels // 4 if packed else channels


def _field(
    settings: Settings, place: Path, size: int | tuple[int, int] | None, factor: int, patch: int
) -> tuple[int, int]:
    """Return height and width of what is denoised."""
    sample = settings["sample_size"]
    if size is not None:
        pixels = (size, size) if isinstance(size, int) else size
        if any(n < 1 or n % (factor * patch) for n in pixels):
            raise PushforwardError(
                f"Images of this model have sides that are multiples of {factor * patch} pixels; got {size}."
            )
        height, width = (n // factor for n in pixels)
    elif sample is None:
        raise PushforwardError(
            f"{place / CONFIG} lacks sample_size; add it, the height and width of what the network denoises."
        )
    else:
        height, width = (sample, sample) if isinstance(sample, int) else sample
    most = settings.get("pos_embed_max_size")
    if most and max(height, width) > most * patch:
        raise PushforwardError(
            f"Images of this model have at most {most * patch * factor} pixels per side; got {size}."
        )
    return height, width


def _autoencoder(place: Path, dtype: torch.dtype | None) -> Any:
    """Load the autoencoder, in float32 if it overflows in float16."""
    kl = folders.class_of(place) == "AutoencoderKL"
    if dtype == torch.float16 and kl and read_json(place / CONFIG).get("force_upcast", True):
        dtype = torch.float32
    return folders.load_network(place, ("VQModel", "AutoencoderKL"), dtype)
