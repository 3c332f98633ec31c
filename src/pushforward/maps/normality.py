"""How Gaussian codes are."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["statistics"]


def statistics(z: Tensor) -> dict[str, Any]:
    """How near codes are to independent standard normal numbers.

    Args:
        z: codes `(count, channels, *field)`, or of any other shape with the images first.

    Returns:
        Over all values, and under `images` as a list for each image alone: `mean`, `std`, the correlation of
        neighbours along a row (`horizontal`) and along a column (`vertical`; `None` for a code that has no such
        neighbours), and `p_value`, of the Kolmogorov-Smirnov test against N(0, 1). Under `rejected` the part of the
        images whose `p_value` is below 0.05; it is 0.05 for truly normal codes.
    """
    array = z.detach().double().cpu().numpy().reshape(len(z), *(z.shape[1:] or (1,)))
    images = [_statistics(image[None]) for image in array]
    rejected = float(np.mean([image["p_value"] < 0.05 for image in images])) if images else None
    return {**_statistics(array), "rejected": rejected, "images": images}


def _statistics(array: np.ndarray) -> dict[str, Any]:
    from scipy.stats import kstest  # takes a quarter of a second, and most commands do without

    flat = array.ravel()
    return {
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "horizontal": _neighbours(array, -1),
        "vertical": _neighbours(array, -2),
        "p_value": float(kstest(flat, "norm").pvalue),
    }


def _neighbours(array: np.ndarray, axis: int) -> float | None:
    """Correlation of neighbours along a field's axis, of `(count, channels, *field)`."""
    if array.ndim + axis < 2 or array.shape[axis] < 2:
        return None
    centred = np.moveaxis(array - array.mean(), axis, -1)
    variance = np.square(centred).mean()
    return float((centred[..., 1:] * centred[..., :-1]).mean() / variance) if variance > 0 else None
