"""Energies that compare an image with a reference: its pixels, its blur, a part of it, or a colour.

All but `perceptual` are minus the logarithm of a Gaussian likelihood, up to a constant: the known values are measured
with noise of a given deviation, so that `p(code) exp(-E(decode(code)))` is a Bayesian posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pushforward.errors import PushforwardError
from pushforward.guidance.energies.energy import Energy, of
from pushforward.vision.lpips import PairNetwork, lpips

__all__ = ["colour", "low_pass", "masked", "near", "perceptual"]

BEYOND = 2.0  # values up to here pass for an image in [-1, 1] that a sampler overshot


def near(image: Tensor, *, deviation: float = 1.0) -> Energy:
    """Compare all values with an image in Gaussian noise: `||x - image||^2 / (2 deviation^2)`.

    Args:
        image: image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`.
        deviation: standard deviation of the noise of each value.

    Raises:
        PushforwardError: `image` is not an image, or the deviation is not positive; or when called with images of
            another shape.
    """
    reference = one_image(image, "near")
    return of(_gaussian(lambda x: x - fitting(reference, x, "near"), deviation), "near")


def low_pass(image: Tensor, cells: int | tuple[int, int] | None = None, *, deviation: float = 1.0) -> Energy:
    """Compare coarse views, as in super-resolution and layouts: `||down(x) - coarse||^2 / (2 deviation^2)`.

    `down` takes the means of each colour over a grid of cells (adaptive average pooling). Images may have any size that
    the grid fits into, also another than the reference's.

    Args:
        image: image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`.
        cells: rows and columns of the grid; one number for both. By default the image is itself the coarse one, with
            one cell per pixel.
        deviation: standard deviation of the noise of each cell's colour.

    Raises:
        PushforwardError: `image` is not an image, there are more cells than pixels, or the deviation is not positive;
            or when called with images of other channels or smaller than the grid.

    References:
        The constraint of ILVR, Choi et al., arXiv 2108.02938, as a likelihood.
    """
    reference = one_image(image, "low_pass")
    if cells is None:
        cells = reference.shape[2], reference.shape[3]
    grid = (cells, cells) if isinstance(cells, int) else cells

    def pooled(x: Tensor) -> Tensor:
        if min(grid) < 1 or grid[0] > x.shape[2] or grid[1] > x.shape[3]:
            raise PushforwardError(
                f"Energy 'low_pass' takes means over {grid[0]}x{grid[1]} cells, which do not fit into images of "
                f"{x.shape[2]}x{x.shape[3]}; use fewer cells."
            )
        return adaptive_avg_pool2d(x, grid)

    coarse = pooled(reference)
    return of(_gaussian(lambda x: _less(pooled(x), coarse, "low_pass"), deviation), "low_pass")


def masked(image: Tensor, mask: Tensor, *, deviation: float = 0.1) -> Energy:
    """Compare a part of an image, as in inpainting: `||mask (x - image)||^2 / (2 deviation^2)`.

    Args:
        image: image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`.
        mask: 1 (or True) where the image is known and 0 elsewhere, `(height, width)` or `(1, height, width)`.
        deviation: standard deviation of the noise of each known value.

    Raises:
        PushforwardError: `image` is not an image, the mask does not fit it, or the deviation is not positive; or when
            called with images of another shape.
    """
    reference, known = one_image(image, "masked"), _mask(mask, "masked")
    if known.shape[1:] != reference.shape[2:]:
        shapes = f"{_size(known)} and {_size(reference)}"
        raise PushforwardError(f"The mask of energy 'masked' must be as large as its image; they are {shapes}.")
    return of(_gaussian(lambda x: (x - fitting(reference, x, "masked")) * known.to(x), deviation), "masked")


def colour(rgb: Sequence[float] | float, mask: Tensor | None = None, *, deviation: float = 0.1) -> Energy:
    """Compare the mean colour of an image, or of a part: `||mean(x) - rgb||^2 / (2 deviation^2)`.

    Args:
        rgb: colour in [-1, 1], one number per channel, or one for all.
        mask: 1 (or True) at the pixels that count and 0 elsewhere, `(height, width)` or `(1, height, width)`; by
            default all count.
        deviation: standard deviation of the noise of the mean.

    Raises:
        PushforwardError: `rgb` is not a colour, the mask is empty, or the deviation is not positive; or when called
            with images of other channels or of another size than the mask.
    """
    try:
        wanted = torch.tensor([rgb] if isinstance(rgb, int | float) else list(rgb), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):  # of several numbers each, or none
        wanted = torch.empty(0, device="cpu")
    if wanted.ndim != 1 or len(wanted) not in (1, 3) or not bool((wanted.abs() <= 1).all()):
        raise PushforwardError(f"A colour is 1 or 3 numbers in [-1, 1]; got {str(rgb).splitlines()[0]}.")
    where = None if mask is None else _mask(mask, "colour")

    def difference(x: Tensor) -> Tensor:
        if where is None:
            mean = x.mean((2, 3))
        elif where.shape[1:] != x.shape[2:]:
            raise PushforwardError(
                f"The mask of energy 'colour' is {_size(where)} and the images are {_size(x)}; they must be the same."
            )
        else:
            mean = (x * where.to(x)).sum((2, 3)) / where.sum().to(x)
        return _less(mean, wanted.expand(1, mean.shape[1] if len(wanted) == 1 else -1), "colour")

    return of(_gaussian(difference, deviation), "colour")


def perceptual(image: Tensor, network: str | PairNetwork = "alex") -> Energy:
    """Measure the learned perceptual distance (LPIPS) to an image, by `vision.lpips`; weight it by `*`.

    Args:
        image: image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`, at least 32 x 32.
        network: `alex`, `vgg` or `squeeze`, or any function of two batches of colour images in [-1, 1] that gives one
            number per pair.

    Raises:
        PushforwardError: `image` is not an image; or when called, if images have another shape or are too small, the
            network is unknown, a package is missing, or the weights cannot be loaded.

    References:
        Zhang et al., arXiv 1801.03924.
    """
    reference = one_image(image, "perceptual")

    def distance(images: Tensor) -> Tensor:
        return lpips(images, fitting(reference, images, "perceptual").expand_as(images), network)

    return of(distance, "perceptual")


def one_image(image: Tensor, name: str) -> Tensor:
    """Make an image a batch of one, `(1, channels, height, width)`, without gradient.

    Args:
        image: image in [-1, 1], `(channels, height, width)` or `(1, channels, height, width)`, 1 or 3 channels.
        name: name of the energy, for messages.

    Raises:
        PushforwardError: `image` is not one image.
    """
    if not isinstance(image, Tensor):
        raise PushforwardError(f"Energy {name!r} takes an image as a tensor; got {type(image).__name__}.")
    one = image.detach()[None] if image.ndim == 3 else image.detach()
    if one.ndim != 4 or len(one) != 1 or one.shape[1] not in (1, 3) or 0 in one.shape:
        raise PushforwardError(
            f"Energy {name!r} takes one image (1 or 3 channels, height, width); got shape {tuple(image.shape)}."
        )
    if not one.is_floating_point() or not bool((one.abs() <= BEYOND).all()):
        raise PushforwardError(
            f"Energy {name!r} takes an image of numbers in [-1, 1]; turn values x up to 255 into x / 127.5 - 1."
        )
    return one.clone()


def fitting(reference: Tensor, images: Tensor, name: str) -> Tensor:
    """Return the reference `(1, channels, height, width)` with the images' device and dtype.

    Raises:
        PushforwardError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != reference.shape[1:]:
        shapes = f"{tuple(reference.shape[1:])}, the images {tuple(images.shape[1:])}"
        raise PushforwardError(
            f"The reference of energy {name!r} has (channels, height, width) {shapes}; resize it to their shape."
        )
    return reference.to(images)


def _gaussian(difference: Callable[[Tensor], Tensor], deviation: float) -> Callable[[Tensor], Tensor]:
    """Make half the squared norm of a difference, in units of the deviation."""
    if not deviation > 0:
        raise PushforwardError(f"The deviation of an energy must be positive; got {deviation}.")
    return lambda images: difference(images).flatten(1).double().square().sum(1) / (2 * deviation**2)


def _less(found: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Subtract values `(1, channels, ...)` from `(count, channels, ...)`."""
    if found.shape[1] != wanted.shape[1]:
        raise PushforwardError(
            f"The reference of energy {name!r} has {wanted.shape[1]} channels and the images have {found.shape[1]}."
        )
    return found - wanted.to(found)


def _mask(mask: Tensor, name: str) -> Tensor:
    """Check a mask, and return it as `(1, height, width)`."""
    if not isinstance(mask, Tensor):
        raise PushforwardError(f"The mask of energy {name!r} is a tensor; got {type(mask).__name__}.")
    one = mask.detach()[None] if mask.ndim == 2 else mask.detach()
    if one.ndim != 3 or len(one) != 1:
        raise PushforwardError(
            f"The mask of energy {name!r} must be (height, width) or (1, height, width); got {tuple(mask.shape)}."
        )
    if not bool(((one == 0) | (one == 1)).all()) or not bool(one.any()):
        raise PushforwardError(
            f"The mask of energy {name!r} must be 1 somewhere and 0 elsewhere; it has other values, or no 1."
        )
    return one.clone()


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"
