"""A `UNet2DModel` as `Network` calls it, `(u, t, labels) -> prediction`, and its autoencoder, without a pipeline.

States come in a dtype of their own and go through in that of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import PushforwardError

__all__ = ["Decoder", "Encoder", "Rescaled", "Unet"]


class Unet(nn.Module):
    """`(u, t, labels) -> prediction` of a `UNet2DModel`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, u: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        unet: Any = self.unet
        if condition is None and unet.class_embedding is not None:
            raise PushforwardError("This model draws images by class; give a label.")
        if unet.config["time_embedding_type"] == "learned":
            t = t.round().long()  # an index
        answer: Tensor = unet(u.to(unet.dtype), t, class_labels=condition).sample
        return answer[:, : u.shape[1]]  # a variance may follow


class Rescaled(nn.Module):
    """`gain * network(scale u + shift, t, *condition)`: a network in other units."""

    def __init__(self, network: nn.Module, gain: float, scale: float, shift: float) -> None:
        super().__init__()
        self.network = network
        self.gain, self.scale, self.shift = gain, scale, shift

    def forward(self, u: Tensor, t: Tensor, *condition: Tensor | None) -> Tensor:
        answer: Tensor = self.network(self.scale * u + self.shift, t, *condition)
        return self.gain * answer


class Decoder(nn.Module):
    """Decodes latents `(batch, channels, *field)` to images in [-1, 1] by a VQModel or AutoencoderKL, one by one."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        autoencoder: Any = self.autoencoder
        scale, shift = _units(autoencoder, latents)
        own = (latents / scale + shift).to(autoencoder.dtype)
        return torch.cat([autoencoder.decode(one).sample for one in own.split(1)]).to(latents.dtype)


class Encoder(nn.Module):
    """Encodes images in [-1, 1] as latents: the mean of what the autoencoder would draw."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor) -> Tensor:
        autoencoder: Any = self.autoencoder
        found = [autoencoder.encode(one) for one in images.to(autoencoder.dtype).split(1)]
        own = torch.cat([one.latent_dist.mode() if hasattr(one, "latent_dist") else one.latents for one in found])
        own = own.to(images.dtype)
        scale, shift = _units(autoencoder, own)
        return (own - shift) * scale


def _units(autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift of latents, `(own - shift) scale`, for all channels or per channel."""
    config = autoencoder.config
    scale = torch.tensor(config.get("scaling_factor") or 1.0, device="cpu").to(like)
    mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return scale, torch.tensor(config.get("shift_factor") or 0.0, device="cpu").to(like)
    mean, deviation = (torch.tensor(values, device="cpu").to(like).view(-1, 1, 1) for values in (mean, deviation))
    return scale / deviation, mean
