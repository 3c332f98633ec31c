"""Networks of `diffusers` as `Network` and `Prompted` call them, `(u, t, *condition) -> prediction`.

Each gets what its own pipeline would pass it. States come in a dtype of their own and go through in that of the
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import PushforwardError

__all__ = ["Decoder", "Dit", "Encoder", "Flux", "Rescaled", "StableDiffusion3", "TextUnet", "Unet"]


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


class TextUnet(nn.Module):
    """`(u, t, states, vector) -> prediction` of a `UNet2DConditionModel` that reads a text encoder's states.

    Args:
        unet: the network.
        sizes: further inputs of SDXL: original size, corner, and size of the image, each (height, width) in pixels.
    """

    def __init__(self, unet: nn.Module, sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.unet = unet
        self.sizes = sizes

    def forward(self, u: Tensor, t: Tensor, states: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        unet: Any = self.unet
        states, vector = _told(unet, states, vector)
        more = None
        if self.sizes:
            sizes = torch.tensor(self.sizes, dtype=unet.dtype, device=u.device)
            more = {"text_embeds": vector, "time_ids": sizes.expand(len(u), -1)}
        answer: Tensor = unet(u.to(unet.dtype), t, encoder_hidden_states=states, added_cond_kwargs=more).sample
        return answer


class Dit(nn.Module):
    """`(u, t, labels) -> prediction` of a diffusion transformer; label `classes` stands for no class, as does `None`.

    References:
        Scalable Diffusion Models with Transformers, Peebles & Xie, arXiv 2212.09748.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        config: Any = transformer.config
        self.classes = int(config.num_embeds_ada_norm)

    def forward(self, u: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        transformer: Any = self.transformer
        if labels is None:
            labels = torch.full((len(u),), self.classes, device=u.device)
        answer: Tensor = transformer(u.to(transformer.dtype), timestep=t, class_labels=labels).sample
        return answer[:, : u.shape[1]]  # a variance may follow


class StableDiffusion3(nn.Module):
    """`(u, t, states, vector) -> prediction` of an `SD3Transformer2DModel`."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, u: Tensor, t: Tensor, states: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        transformer: Any = self.transformer
        states, vector = _told(transformer, states, vector)
        answer: Tensor = transformer(
            u.to(transformer.dtype), encoder_hidden_states=states, pooled_projections=vector, timestep=t
        ).sample
        return answer


class Flux(nn.Module):
    """`(u, t, states, vector) -> prediction` of a `FluxTransformer2DModel`, which sees squares of 2 x 2 as tokens.

    Args:
        transformer: the network.
        guidance: guidance to pass to networks that were distilled from guided ones (On Distillation of Guided Diffusion
            Models, Meng et al., arXiv 2210.03142, section 3.1).
    """

    def __init__(self, transformer: nn.Module, guidance: float = 3.5) -> None:
        super().__init__()
        self.transformer = transformer
        self.guidance = guidance

    def forward(self, u: Tensor, t: Tensor, states: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        transformer: Any = self.transformer
        states, vector = _told(transformer, states, vector)
        squares = nn.functional.pixel_unshuffle(u, 2)
        height, width = squares.shape[2:]
        place = torch.zeros(height, width, 3, device=u.device, dtype=transformer.dtype)
        place[..., 1] = torch.arange(height, device=u.device)[:, None]
        place[..., 2] = torch.arange(width, device=u.device)
        guided = torch.full((len(u),), self.guidance, device=u.device) if transformer.config.guidance_embeds else None
        answer: Tensor = transformer(
            squares.flatten(2).transpose(1, 2).to(transformer.dtype),
            encoder_hidden_states=states,
            pooled_projections=vector,
            timestep=t / 1000,  # its own units
            img_ids=place.flatten(0, 1),
            txt_ids=torch.zeros(states.shape[1], 3, device=u.device, dtype=transformer.dtype),
            guidance=guided,
        ).sample
        return nn.functional.pixel_shuffle(answer.transpose(1, 2).unflatten(2, (height, width)), 2)


def _told(network: Any, states: Tensor | None, vector: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a text encoder's output in the network's dtype."""
    if states is None:
        raise PushforwardError("This network reads prompts; use the model that model.given(prompts) returns.")
    return states.to(network.dtype), None if vector is None else vector.to(network.dtype)


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
    scale = torch.tensor(config.get("scaling_factor") or 1.0).to(like)
    mean, deviation = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return scale, torch.tensor(config.get("shift_factor") or 0.0).to(like)
    mean, deviation = (torch.tensor(values).to(like).view(-1, 1, 1) for values in (mean, deviation))
    return scale / deviation, mean
