"""The networks that `pushforward train` trains: a U-Net of `diffusers` on space-to-depth pixels.

Folding `patch x patch` pixels into channels before the first convolution (and back after the last) leaves a small
image with many channels, on which wide convolutions do most of the work: several times faster than a U-Net of equal
quality on the pixels, above all on a CPU, where the maps at full size are bound by memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pushforward.errors import PushforwardError

__all__ = ["PRESETS", "SKETCH", "Backbone", "BackboneConfig", "preset"]

SKETCH = 16  # side of a sketch

_Size = Annotated[int, Field(ge=1, le=2**16)]
_Count = Annotated[int, Field(ge=0, le=2**24)]


@dataclass(frozen=True)
class BackboneConfig:
    """The settings of a `Backbone`.

    Args:
        in_channels, out_channels: channels of states and of predictions.
        classes: number of class labels; label `classes` stands for no class. 0: the network takes no labels.
        words: rows of the table of hashed words (see `model.tokens`). 0: the network does not read captions.
        sketch: hidden features of the sketcher, which foretells the clean state, small, from a caption, for the U-Net
            to see beside the state (see `training.sketch`). 0: none; a network that does not read has none.
        patch: side of the squares folded into channels, in pixels.
        widths: channels of each level; each further level has half the size.
        layers: residual blocks per level.
        attention: whether all levels but the first have self-attention.
        middle: whether the innermost level has self-attention if no other has.
        modulation: whether time and condition scale the features of each block, not only shift them.
        groups: number of groups of the group normalisation.
        time_angle: if positive, the network sees the angle `atan(t / time_angle)` (scaled to 0 … 1000) instead of `t`,
            for processes whose time has no end.
    """

    in_channels: _Size
    out_channels: _Size
    classes: _Count = 0
    words: _Count = 0
    sketch: _Count = 0
    patch: _Size = 2
    widths: Annotated[tuple[_Size, ...], Field(min_length=1, max_length=12)] = (96, 96)
    layers: Annotated[int, Field(ge=1, le=64)] = 1
    attention: bool = False
    middle: bool = False
    modulation: bool = False
    groups: _Size = 8
    time_angle: Annotated[float, Field(ge=0)] = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def sketches(self) -> bool:
        """Whether the U-Net is shown sketches."""
        return self.words > 0 and self.sketch > 0

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return self.patch * 2 ** (len(self.widths) - 1)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (16, 16), "groups": 4},
    "small": {"widths": (96, 96)},
    "deep": {"widths": (64, 96, 96), "middle": True, "modulation": True, "sketch": 768},
    "medium": {"widths": (128, 192), "layers": 2, "attention": True},
    "large": {"widths": (128, 256, 256), "layers": 2, "attention": True, "groups": 32},
}


def preset(name: str, *, field: tuple[int, int], **settings: Any) -> BackboneConfig:
    """Return the settings of a named network for images of a size.

    Args:
        name: a name in `PRESETS`.
        field: height and width of the images.
        settings: in_channels, out_channels, and any other fields of `BackboneConfig` to change.

    Raises:
        PushforwardError: the name is unknown, or the network cannot halve the size often enough.
    """
    if name not in PRESETS:
        raise PushforwardError(f"Unknown network {name!r}; known are {', '.join(PRESETS)}.")
    config = BackboneConfig(**{**PRESETS[name], **settings})
    if any(side % config.multiple for side in field):
        fitting = max(config.multiple, round(field[0] / config.multiple) * config.multiple)
        raise PushforwardError(
            f"Network {name!r} needs height and width to be multiples of {config.multiple}; the images are "
            f"{field[0]}x{field[1]}. Train at --size {fitting}."
        )
    return config


class Backbone(nn.Module):
    """`(u, t, condition) -> prediction`: states `(batch, channels, height, width)`, `t (batch,)`.

    The condition is labels `(batch,)` if the network has classes, or hashed words `(batch, tokens)` if it reads.

    Raises:
        PushforwardError: `diffusers` is not installed.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = _unet(config)
        if config.words:
            self.reader = Reader(config.words, 64, 4 * config.widths[0], 4 * config.widths[0])
        if config.sketches:
            self.sketcher = Reader(config.words, 256, config.sketch, config.in_channels * SKETCH**2)
            self.sketcher.requires_grad_(False)

    def forward(self, u: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        config = self.config
        if config.time_angle:
            t = torch.atan(t / config.time_angle) * (2000 / math.pi)
        shown = [nn.functional.pixel_unshuffle(u, config.patch)]
        if config.words:
            silence = torch.zeros(len(u), 1, dtype=torch.long, device=u.device)
            words = silence if condition is None else condition
            condition = self.reader(words)
            if config.sketches:
                sketch = self.sketcher(words).unflatten(1, (-1, SKETCH, SKETCH))
                shown.append(nn.functional.interpolate(sketch, shown[0].shape[2:], mode="bilinear"))
        elif not config.classes:
            condition = None
        elif condition is None:
            condition = torch.full((len(u),), config.classes, device=u.device)
        seen = torch.cat(shown, 1).to(next(self.unet.parameters()).dtype)
        answer = self.unet(seen, t, class_labels=condition).sample
        return nn.functional.pixel_shuffle(answer, config.patch).to(u.dtype)


class Reader(nn.Module):
    """Turns each text's hashed words `(batch, tokens)` into a vector, `(batch, features)`; empty texts have one too.

    Args:
        rows: rows of the table.
        width: numbers of each row.
        hidden: hidden features.
        features: numbers of the vector.
    """

    def __init__(self, rows: int, width: int, hidden: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows + 1, width, padding_idx=0)
        self.mix = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, features))

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.table(tokens).sum(1)
        count = (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        vector: Tensor = self.mix(words / count.to(words.dtype).sqrt())
        return vector


def _unet(config: BackboneConfig) -> nn.Module:
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:  # diffusers tells as the latter what it cannot import itself
        raise PushforwardError(
            "This model's network is built from blocks of diffusers, which cannot be imported "
            f"({str(error).splitlines()[-1]}): pip install 'pushforward[diffusers]'."
        ) from error
    levels, pixels = len(config.widths), config.patch**2
    inner = "Attn" if config.attention else ""
    unet: nn.Module = UNet2DModel(  # type: ignore[assignment]
        in_channels=config.in_channels * (pixels + config.sketches),
        out_channels=config.out_channels * pixels,
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        down_block_types=("DownBlock2D", *(f"{inner}DownBlock2D",) * (levels - 1)),
        up_block_types=(*(f"{inner}UpBlock2D",) * (levels - 1), "UpBlock2D"),
        norm_num_groups=config.groups,
        attention_head_dim=32 if config.attention or config.middle else None,
        resnet_time_scale_shift="scale_shift" if config.modulation else "default",
        class_embed_type="identity" if config.words else None,
        add_attention=config.attention or config.middle,
        num_class_embeds=config.classes + 1 if config.classes else None,
    )
    return unet
