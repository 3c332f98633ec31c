"""Generators from files: checkpoints of DCGANs, TorchScript, and folders of `diffusers` with a consistency model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.maps.generator import Generator, Prior, consistency, gan
from pushforward.model.diffusers import folders
from pushforward.model.diffusers.networks import Unet
from pushforward.model.gan import Preconditioned, dcgan, read_checkpoint
from pushforward.model.storage import read_json
from pushforward.model.torchscript import is_torchscript, load_torchscript

__all__ = ["is_generator", "load_generator"]

CONSISTENCY = "CMStochasticIterativeScheduler"
DEFAULTS = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0}  # where its file does not say


@undisturbed
def load_generator(
    path: str | Path,
    latent_shape: int | Sequence[int] | None = None,
    prior: Prior = "normal",
    *,
    steps: int = 1,
    device: torch.device | str = "cpu",
) -> Generator:
    """A generator from a file or folder, of what kind it is.

    - A state of a DCGAN generator (`torch.save`, or `.safetensors`): see `model.gan.dcgan`.
    - TorchScript (`torch.jit.save`): any generator whose images are in [-1, 1].
    - A folder of `diffusers` with a consistency model (`ConsistencyModelPipeline`).

    Args:
        path: path of the file or folder.
        latent_shape: of one image's latents; TorchScript needs it.
        prior: prior of the latents, as in `gan`.
        steps: steps of a consistency model, each at one of its noise levels, as its scheduler places them.
        device: where the network goes.

    Raises:
        PushforwardError: nothing there, or it cannot be read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _consistency_folder(place, steps, device)
    if not place.is_file():
        raise PushforwardError(f"No generator at {path}: neither a file nor a folder.")
    if is_torchscript(place):
        if latent_shape is None:
            raise PushforwardError(
                f"{path} is TorchScript, which does not say what it takes: give latent_shape, e.g. (100,)."
            )
        return gan(load_torchscript(place, device), latent_shape, prior, name=place.stem)
    network = dcgan(read_checkpoint(place), str(path)).to(device)
    return gan(network, network.size if latent_shape is None else latent_shape, prior, name=place.stem)


def is_generator(path: str | Path) -> bool:
    """Whether `load_generator` is what opens this: a file, or a folder with a consistency model."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return place.is_file()
    try:
        return read_json(folders.find(place).scheduler).get("_class_name") == CONSISTENCY
    except PushforwardError:
        return False


def _consistency_folder(place: Path, steps: int, device: torch.device | str) -> Generator:
    """A consistency model of `diffusers`, at the noise levels that its scheduler has for so many steps."""
    folder = folders.find(place)
    config = read_json(folder.scheduler)
    if config.get("_class_name") != CONSISTENCY:
        raise PushforwardError(
            f"{place} holds a diffusion model, with a {config.get('_class_name')}: open it with pushforward.load."
        )
    count, low, high = (config.get(key, value) for key, value in DEFAULTS.items())
    if not 1 <= steps <= count:
        raise PushforwardError(f"The consistency model in {place} takes 1 to {count} steps; got {steps}.")
    unet = folders.load_network(folder.place("unet"), ("UNet2DModel",), None).to(device)
    sample, channels, classes = (unet.config[key] for key in ("sample_size", "in_channels", "num_class_embeds"))
    if sample is None:
        raise PushforwardError(f"The network in {place} does not say its sample_size; add it to its configuration.")
    power = 1 / config.get("rho", 7.0)
    ramp = [k * (count // steps) / max(count - 1, 1) for k in range(steps)]
    sigmas = [max(low, (high**power + r * (low**power - high**power)) ** (1 / power)) for r in ramp]
    network = Preconditioned(Unet(unet), low, config.get("sigma_data", 0.5), bool(config.get("clip_denoised", True)))
    return consistency(
        network,
        (channels, *([sample] * 2 if isinstance(sample, int) else sample)),
        sigmas=sigmas,
        sigma_min=low,
        gain=config.get("s_noise", 1.0),
        name=place.name,
        classes=tuple(map(str, range(classes or 0))),
    )
