"""Models in the format of `diffusers`: a folder or a name on the hub.

A `UNet2DModel` does not say what it predicts, or for which diffusion: its scheduler does (`model.schedulers`). A model
of latents brings an autoencoder, whose decoder makes the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian
from pushforward.model.model import Model, read_json
from pushforward.model.network import Network
from pushforward.model.schedulers import MISSING, Settings, import_diffusers, read_schedule, reason

__all__ = ["Decoder", "Unet", "diffusers_model"]

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_DECODERS = ("vqvae", "vae")


def diffusers_model(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Model:
    """A model from a folder or a hub repository of `diffusers`.

    It may be a pipeline (`model_index.json` with a UNet2DModel, a scheduler and, for latent diffusion, a VQModel or
    AutoencoderKL), or the folder of a UNet2DModel with `scheduler_config.json` in it or in `scheduler/`.

    Args:
        source: a folder, or a name on the hub, `owner/model`.
        device: where the networks go.
        dtype: of their weights, by default float32; states keep a dtype of their own.
        revision: branch, tag or commit on the hub.

    Raises:
        PushforwardError: `diffusers` is not installed; the source is not there, lacks a part, is damaged, or is a model
            of another kind.
    """
    local = Path(source).expanduser()
    folder = local if local.is_dir() else _download(str(source), revision)
    parts = _find(folder)
    config = read_json(parts.scheduler)
    schedule = read_schedule(config, parts.scheduler)
    unet = _load(parts.unet, ("UNet2DModel",), dtype).to(device)
    decoder = None
    if parts.decoder is not None:
        decoder = Decoder(_load(parts.decoder, ("VQModel", "AutoencoderKL"), dtype)).eval().to(device)
    settings = unet.config
    channels, shape = settings["in_channels"], _shape(settings, parts.unet)
    wanted = (channels, 2 * channels) if "learned" in str(config.get("variance_type")) else (channels,)
    if settings["out_channels"] not in wanted:
        msg = (
            f"The network of {source} takes {channels} channels and gives {settings['out_channels']}; only networks "
            "that need nothing besides the noisy image (and a class) can be read."
        )
        raise PushforwardError(msg)
    module = Unet(unet, schedule.gain, schedule.scale, schedule.shift).eval().requires_grad_(False)
    return Model(
        local.name if local.is_dir() else str(source),
        schedule.process,
        Network(module, **schedule.network),
        shape,
        schedule.reference or Gaussian(0.25 if decoder is None else 1.0),  # latents are scaled to unit variance
        tuple(map(str, range(settings["num_class_embeds"] or 0))) if settings["class_embed_type"] is None else (),
        None if decoder is None else decoder.requires_grad_(False),
        schedule.grid,
        {"source": str(source), "scheduler": config["_class_name"]},
    )


class Unet(nn.Module):
    """A `UNet2DModel` as `Network` calls its module: `gain * unet(scale u + shift, t)`, in the dtype of its weights.

    Args:
        unet: the network.
        gain, scale, shift: units of its output and input.
    """

    def __init__(self, unet: nn.Module, gain: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.unet = unet
        self.gain, self.scale, self.shift = gain, scale, shift

    def forward(self, u: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        unet: Any = self.unet
        if condition is None and unet.class_embedding is not None:
            msg = "This model draws images by class: give a label."
            raise PushforwardError(msg)
        if unet.config["time_embedding_type"] == "learned":
            t = t.round().long()  # an index
        moved = u if (self.scale, self.shift) == (1.0, 0.0) else self.scale * u + self.shift
        answer = unet(moved.to(unet.dtype), t, class_labels=condition).sample[:, : u.shape[1]]  # a variance may follow
        return answer if self.gain == 1 else self.gain * answer


class Decoder(nn.Module):
    """Latents `(batch, channels, *field)` to images in [-1, 1] by a VQModel or an AutoencoderKL."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        autoencoder: Any = self.autoencoder
        config = autoencoder.config
        scaled = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        return autoencoder.decode(scaled.to(autoencoder.dtype)).sample.to(latents.dtype)


# -- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Folders of the networks, and the scheduler's file."""

    unet: Path
    scheduler: Path
    decoder: Path | None = None


def _find(folder: Path) -> _Parts:
    """The parts of a model; a part without a folder of its own lies in the root, as old repositories have it."""
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        if not _names(index, "unet"):
            msg = f"The pipeline in {folder} has no UNet2DModel; it is a {index.get('_class_name', 'pipeline')}."
            raise PushforwardError(msg)
        decoder = next((name for name in _DECODERS if _names(index, name)), None)
        return _Parts(
            _part(folder, "unet", _CONFIG),
            _part(folder, "scheduler", _SCHEDULER) / _SCHEDULER,
            _part(folder, decoder, _CONFIG) if decoder else None,
        )
    if (folder / _CONFIG).is_file():
        return _Parts(folder, _part(folder, "scheduler", _SCHEDULER) / _SCHEDULER)
    msg = f"{folder} holds no model: neither {_INDEX} (a pipeline) nor {_CONFIG} (a network)."
    raise PushforwardError(msg)


def _names(index: Settings, part: str) -> bool:
    """Whether a pipeline has a part: `[library, class]`, or `[null, null]` where it is left out."""
    return isinstance(index.get(part), list) and None not in index[part]


def _part(folder: Path, name: str, file: str) -> Path:
    """Where a part's configuration lies: its own folder or the root."""
    for place in (folder / name, folder):
        if (place / file).is_file():
            return place
    msg = f"{folder} has no {name}/{file}; fetch the model again."
    raise PushforwardError(msg)


def _download(source: str, revision: str | None) -> Path:
    """A hub repository's configurations and weights, as a folder of the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise PushforwardError(MISSING) from error
    places = ("", "unet/", *(f"{name}/" for name in _DECODERS))
    configs = [_INDEX, _SCHEDULER, f"scheduler/{_SCHEDULER}", *(f"{place}{_CONFIG}" for place in places)]

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            at = f" at revision {revision!r}" if revision else ""
            msg = f"No folder {source!r}, and the hub gives no model of that name{at}: {reason(error)}."
            raise PushforwardError(msg) from error

    safe = [f"{place}{_WEIGHTS}{end}" for place in places for end in (".safetensors", ".safetensors.index.json")]
    folder = fetch([*configs, *safe, *(f"{place}{_WEIGHTS}-*-of-*.safetensors" for place in places)])
    parts = _find(folder)
    if any(_weights(part) is None for part in (parts.unet, parts.decoder) if part is not None):
        folder = fetch([*configs, *safe, *(f"{place}{_WEIGHTS}.bin" for place in places)])
    return folder


def _weights(folder: Path) -> bool | None:
    """Whether a network's weights are `.safetensors` (or `.bin`); `None` if there are none."""
    for ends, safe in (((".safetensors", ".safetensors.index.json"), True), ((".bin", ".bin.index.json"), False)):
        if any((folder / f"{_WEIGHTS}{end}").is_file() for end in ends):
            return safe
    return None


def _load(folder: Path, classes: tuple[str, ...], dtype: torch.dtype | None) -> Any:
    """A network of one of some classes of `diffusers` from its folder."""
    name = read_json(folder / _CONFIG).get("_class_name")
    if name not in classes:
        msg = f"{folder / _CONFIG} describes a {name}; only {' or '.join(classes)} can be read here."
        raise PushforwardError(msg)
    safe = _weights(folder)
    if safe is None:
        msg = f"{folder} lacks its weights, {_WEIGHTS}.safetensors; fetch the model again."
        raise PushforwardError(msg)
    try:
        network, report = getattr(import_diffusers(), name).from_pretrained(
            folder,
            torch_dtype=dtype or torch.float32,
            use_safetensors=safe,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        msg = f"The {name} in {folder} cannot be read: {reason(error)}; fetch the model again."
        raise PushforwardError(msg) from error
    if report["missing_keys"]:
        first, count = report["missing_keys"][0], len(report["missing_keys"])
        msg = f"The weights in {folder} lack {count} of the network's tensors, {first} for one; fetch the model again."
        raise PushforwardError(msg)
    return network


def _shape(settings: Settings, folder: Path) -> tuple[int, ...]:
    size = settings["sample_size"]
    if size is None:
        msg = f"{folder / _CONFIG} does not say its sample_size; add it, the height and width of what it denoises."
        raise PushforwardError(msg)
    return (settings["in_channels"], *((size, size) if isinstance(size, int) else tuple(size)))
