"""How near an image is to another, one figure per image, and how well a set of images finds its partners.

Images are `(count, channels, height, width)` in [-1, 1], 1 or 3 channels, and figures `(count,)`.

- `psnr`, decibels, the peak being the whole range from -1 to 1;
- `ssim`, at most 1 (Wang et al., Image Quality Assessment, 2004), of values brought to [0, 1]: it depends on where
  zero is, and this is where published figures have it. Windows lie within the image, as there and in scikit-image,
  pytorch-msssim and TensorFlow; `torchmetrics` counts those that see the reflected border, too, which makes figures of
  small images others;
- `l2`, the root of the mean squared difference, and `greatest`, the greatest absolute difference;
- `ranks`, the place of each image's true partner among all candidates.

None of them needs weights; `vision.lpips` is the learned distance, which does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, normalize

from pushforward.data.pictures import check_pairs
from pushforward.errors import PushforwardError

__all__ = ["SMALLEST", "decibels", "greatest", "l2", "pixels", "psnr", "ranks", "ssim"]

SMALLEST = 11  # side of the window that SSIM looks through
_PIXELS = 8
Metric = Literal["euclidean", "cosine"]


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, see `decibels`.

    Raises:
        PushforwardError: images that do not fit together.
    """
    return decibels(_squares(images, truth))


def decibels(square: Tensor, peak: float = 2.0) -> Tensor:
    """Return the peak signal-to-noise ratio of mean squared differences, `10 log10(peak^2 / square)`; infinite at 0.

    Args:
        square: mean squared differences, of any shape.
        peak: the whole range of the values: 2 from -1 to 1, 255 of bytes.
    """
    return 10 * torch.log10(peak**2 / square)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity, the mean over channels and windows within the image; 1 for equal images.

    The windows are the usual Gaussian ones of 11 x 11 pixels, of deviation 1.5.

    Raises:
        PushforwardError: images that do not fit together or are lower or narrower than `SMALLEST`.
    """
    check_pairs(images, truth)
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise PushforwardError(
            f"SSIM needs images of at least {SMALLEST}x{SMALLEST}; got {height}x{width}: leave it out."
        )
    place = torch.arange(SMALLEST, dtype=torch.float64, device=images.device) - SMALLEST // 2
    weights = (-place.square() / (2 * 1.5**2)).softmax(0)
    window = torch.outer(weights, weights)[None, None]
    x, y = ((one.double().flatten(0, 1)[:, None] + 1) / 2 for one in (images, truth))
    mean_x, mean_y, square, product = (conv2d(one, window) for one in (x, y, x * x + y * y, x * y))
    means = mean_x * mean_x + mean_y * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (means + 0.01**2)
    structure = (2 * (product - mean_x * mean_y) + 0.03**2) / (square - means + 0.03**2)
    return (luminance * structure).unflatten(0, images.shape[:2]).flatten(1).mean(1).float()


def l2(images: Tensor, truth: Tensor) -> Tensor:
    """Return the root mean squared difference of an image's values; the norm is this times the root of their number.

    Raises:
        PushforwardError: images that do not fit together.
    """
    return _squares(images, truth).sqrt()


def greatest(images: Tensor, truth: Tensor) -> Tensor:
    """Return the greatest absolute difference of a value.

    Raises:
        PushforwardError: images that do not fit together.
    """
    check_pairs(images, truth)
    return (images.float() - truth.float()).abs().flatten(1).amax(1)


def pixels(images: Tensor) -> Tensor:
    """Return the plainest feature space: means over an 8 x 8 grid, `(count, 64 * channels)`; no network, no weights."""
    return adaptive_avg_pool2d(images.float(), _PIXELS).flatten(1)


def ranks(features: Tensor, targets: Tensor, truth: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Return the place of each image's true partner among all candidates by distance, 1 the best, `(count,)`, float64.

    Candidates as near as the partner share their places: with `k` of them it is `k / 2` worse, so features that tell
    nothing apart rank no better than chance, `(m + 1) / 2`.

    Args:
        features: features of the images, `(count, d)`.
        targets: features of the candidates, `(m, d)`.
        truth: which candidate is each image's partner, `(count,)`, whole numbers below `m`.
        metric: `euclidean`, or `cosine`, by the angle alone.

    Raises:
        PushforwardError: features of different widths or that are not finite, or partners that are not there.
    """
    if features.ndim != 2 or targets.ndim != 2 or features.shape[1] != targets.shape[1]:
        shapes = f"{tuple(features.shape)} and {tuple(targets.shape)}"
        raise PushforwardError(f"Ranks need features (count, d) of images and (m, d) of candidates; got {shapes}.")
    if not bool(features.isfinite().all() and targets.isfinite().all()):
        raise PushforwardError("Features to rank by are not finite; the images or the feature network are broken.")
    if truth.shape != features.shape[:1] or not bool(((truth >= 0) & (truth < len(targets))).all()):
        raise PushforwardError(
            f"Ranks need for each of {len(features)} images the number of its partner, below {len(targets)}."
        )
    points, candidates = features.double(), targets.double()
    if metric == "cosine":
        points, candidates = normalize(points, dim=1), normalize(candidates, dim=1)
    found = []
    for some, partner in zip(points.split(256), truth.split(256), strict=True):
        # Not by the scalar product: of equal candidates it would make different distances.
        distance = torch.cdist(some, candidates, compute_mode="donot_use_mm_for_euclid_dist")
        own = distance.gather(1, partner[:, None])
        nearer, equal = (distance < own).sum(1), (distance == own).sum(1) - 1
        found.append(1 + nearer + equal / 2)
    return torch.cat(found).double()


def _squares(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared difference over the values of each image, `(count,)`."""
    check_pairs(images, truth)
    return (images.float() - truth.float()).square().flatten(1).mean(1)
