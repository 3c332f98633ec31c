"""Views of an image: the same random changes of colour, place and size for every image and at every call.

One picture fools a network more easily than fifty views of it. Wu & De la Torre (arXiv 2210.05559, section 4.3) take
CLIP's mean over differentiable augmentations (Zhao et al., arXiv 2006.10738), drawn anew at each call. Here they are
drawn once, from a seed, since an energy must be a function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from pushforward.errors import PushforwardError

__all__ = ["Views", "average", "views"]

Views = Callable[[Tensor], Tensor]

SHIFT = 1 / 8  # greatest shift, as a part of a side
ZOOM = (0.8, 1.2)
HOLE = 1 / 2  # side of the square cut out, as a part of the image's side


def views(count: int = 50, *, seed: int = 0) -> Views:
    """Make fixed random views of images, a function `(n, channels, height, width) -> (n * count, ...)`.

    The views of an image follow one another, and each image has the same ones. With the image in [0, 1]: brightness is
    added, up to a half; colours move from their pixel's mean by a factor of 0 to 2, and pixels from the image's mean by
    0.5 to 1.5; the image is shifted by up to an eighth of its side and magnified by 0.8 to 1.2, with black around; and
    a square of half its side is cut out, around any pixel. Differentiable, neither rounded nor clipped.

    Args:
        count: number of views per image; 50 in the paper's released code.
        seed: seed of the views.

    Raises:
        PushforwardError: the count is below 1; or when called with a tensor that is not images.
    """
    if count < 1:
        raise PushforwardError(f"There must be at least 1 view; got {count}.")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(8, count, 1, 1, 1, dtype=torch.float64, generator=generator, device="cpu")

    def seen(images: Tensor) -> Tensor:
        if images.ndim != 4 or 0 in images.shape:
            raise PushforwardError(
                f"Views need images (count, channels, height, width); got shape {tuple(images.shape)}."
            )
        brightness, saturation, contrast, down, right, size, top, left = draws.to(images)
        x = (images[:, None] + 1) / 2 + (brightness - 0.5)  # (n, count, channels, height, width) from here on
        x = _from(x, x.mean(2, keepdim=True), 2 * saturation)
        x = _from(x, x.mean((2, 3, 4), keepdim=True), 0.5 + contrast)
        x = _moved(x, (2 * right - 1) * SHIFT, (2 * down - 1) * SHIFT, ZOOM[0] + (ZOOM[1] - ZOOM[0]) * size)
        x = x * _kept(x, top, left)
        return (2 * x - 1).flatten(0, 1)

    return seen


def average(value: Callable[[Tensor], Tensor], images: Tensor, views: Views | None) -> Tensor:
    """Average a number per image over the views of each, `(count,)`.

    Args:
        value: function from images to numbers `(count,)`.
        images: images `(count, channels, height, width)`.
        views: function that makes all views, those of the first image first; `None` for the image itself.

    Raises:
        PushforwardError: the number of views differs from image to image.
    """
    if views is None:
        return value(images)
    several = views(images)
    if not len(several) or len(several) % len(images):
        raise PushforwardError(
            f"Every image must have the same number of views; {len(images)} images have {len(several)} views."
        )
    return value(several).reshape(len(images), -1).mean(1)


def _from(x: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    return centre + (x - centre) * factor


def _moved(x: Tensor, right: Tensor, down: Tensor, size: Tensor) -> Tensor:
    """Shift images by parts of their sides, then magnify them around the centre, with 0 around them."""
    none = torch.zeros_like(size)
    # grid_sample asks where a pixel comes from, in half sides: before the magnification, then before the shift.
    rows = [torch.stack([1 / size, none, -2 * right], -1), torch.stack([none, 1 / size, -2 * down], -1)]
    theta = torch.stack(rows, -2).reshape(-1, 2, 3)
    count, shape = len(x), x.shape[2:]
    grid = affine_grid(theta, [len(theta), *shape], align_corners=False)
    moved = grid_sample(x.flatten(0, 1), grid.repeat(count, 1, 1, 1), padding_mode="zeros", align_corners=False)
    return moved.unflatten(0, (count, len(theta)))


def _kept(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Return 1 at the pixels of each view that are not cut out, `(count, 1, height, width)`, by the hole's centre."""

    def inside(length: int, centre: Tensor) -> Tensor:
        place = (torch.arange(length, dtype=x.dtype, device=x.device) + 0.5) / length
        return (place - centre.reshape(-1, 1)).abs() < HOLE / 2

    hole = inside(x.shape[3], top)[:, :, None] & inside(x.shape[4], left)[:, None, :]
    return (~hole[:, None]).to(x)
