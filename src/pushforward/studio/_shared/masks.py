"""Masks: painted in the page, or chosen by name, which needs no pointer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PARTS", "canvas", "mask_file", "mask_of"]

PARTS = ("upper half", "lower half", "left half", "right half", "middle")


def canvas(image: Tensor) -> dict[str, Any]:
    """What the editor shows of an image `(1, channels, height, width)`: large enough to paint on."""
    from pushforward.studio._shared.pictures import picture

    return {"background": picture(image, 384).convert("RGB"), "layers": [], "composite": None}


def mask_of(painted: Mapping[str, Any] | None, part: str | None, size: tuple[int, int]) -> Tensor:
    """Where an image is to be painted anew, `(height, width)`: what was painted over, and the part of that name.

    Args:
        painted: the editor's value, of arrays.
        part: one of `PARTS`, or `None`.
        size: height and width of the mask.
    """
    import numpy as np
    import torch
    from PIL import Image

    height, width = size
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in (painted or {}).get("layers", ()):
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3])).resize((width, height), Image.Resampling.BOX)
        mask |= torch.from_numpy(np.asarray(alpha) >= 128)
    if part in PARTS:
        rows, columns = {
            "upper half": (slice(0, height // 2), slice(None)),
            "lower half": (slice(height // 2, None), slice(None)),
            "left half": (slice(None), slice(0, width // 2)),
            "right half": (slice(None), slice(width // 2, None)),
            "middle": (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)),
        }[part]
        mask[rows, columns] = True
    return mask


def mask_file(mask: Tensor) -> bytes:
    """The mask as a PNG, white where it is true, as commands read it."""
    from pushforward.data.pictures import sheet
    from pushforward.studio._shared.results import png

    return png(sheet(mask.float()[None, None] * 2 - 1, smallest=0))
