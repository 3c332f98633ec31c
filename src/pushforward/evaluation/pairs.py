"""How near an image is to another, one figure an image, and how well a set of images finds its partners.

Images are `(count, channels, height, width)` in [-1, 1], 1 or 3 channels, and figures `(count,)`.

- `psnr`, decibels, the peak being the whole range from -1 to 1;
- `ssim`, at most 1 (Wang et al., Image Quality Assessment, 2004), of values brought to [0, 1]: it depends on where
  zero is, and this is where published figures have it;
- `l2`, the root of the mean squared difference, and `greatest`, the greatest absolute difference;
- `lpips`, 0 for equal images (Zhang et al., arXiv 1801.03924);
- `ranks`, the place of each image's true partner among all candidates, and `recall`, the share of the first `k` places.

`torchmetrics` computes the first two and LPIPS. All but LPIPS need no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from pushforward.errors import PushforwardError

__all__ = ["SMALLEST", "greatest", "l2", "lpips", "pixels", "psnr", "ranks", "recall", "ssim"]

SMALLEST = 11  # side of the window that SSIM looks through
_SMALLEST_LPIPS = 32
_PIXELS = 8
Metric = Literal["euclidean", "cosine"]


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB: `10 log10(4 / mean squared difference)`; infinite for equal images.

    Raises:
        PushforwardError: images that do not fit together, or `torchmetrics` is missing.
    """
    _check(images, truth)
    ratio = _torchmetrics().peak_signal_noise_ratio
    found: Tensor = ratio(images.float(), truth.float(), data_range=2.0, reduction="none", dim=(1, 2, 3))
    return found


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, with the usual Gaussian window of deviation 1.5; 1 for equal images.

    Raises:
        PushforwardError: images that do not fit together or are lower or narrower than `SMALLEST`, or `torchmetrics`
            is missing.
    """
    _check(images, truth)
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise PushforwardError(
            f"SSIM needs images of at least {SMALLEST}x{SMALLEST}; got {height}x{width}: leave it out."
        )
    measure = _torchmetrics().structural_similarity_index_measure
    one, two = ((x.float() + 1) / 2 for x in (images, truth))
    found: Tensor = measure(one, two, data_range=1.0, reduction="none")
    return found.reshape(-1)


def l2(images: Tensor, truth: Tensor) -> Tensor:
    """Root of the mean squared difference over the values of an image; the norm is this times the root of their number.

    Raises:
        PushforwardError: images that do not fit together.
    """
    _check(images, truth)
    return (images.float() - truth.float()).square().flatten(1).mean(1).sqrt()


def greatest(images: Tensor, truth: Tensor) -> Tensor:
    """Greatest absolute difference of a value.

    Raises:
        PushforwardError: images that do not fit together.
    """
    _check(images, truth)
    return (images.float() - truth.float()).abs().flatten(1).amax(1)


def lpips(
    images: Tensor, truth: Tensor, network: str | Callable[[Tensor, Tensor], Tensor] = "alex", *, batch: int = 64
) -> Tensor:
    """Learned perceptual distance.

    Args:
        images: at least 32 x 32.
        truth: of the same shape.
        network: `alex` (the usual one), `vgg` or `squeeze`, whose weights `torchvision` downloads once; or any function
            of two batches of colour images in [-1, 1] that gives one number a pair.
        batch: pairs of one call.

    Raises:
        PushforwardError: images that do not fit together or are too small, no such network, a package is missing, or
            the weights cannot be had.
    """
    _check(images, truth)
    height, width = images.shape[2:]
    if min(height, width) < _SMALLEST_LPIPS:
        side = _SMALLEST_LPIPS
        raise PushforwardError(f"LPIPS needs images of at least {side}x{side}; got {height}x{width}: leave it out.")
    distance = _lpips_network(network) if isinstance(network, str) else network
    if isinstance(distance, torch.nn.Module):
        distance = distance.to(images.device)
    pairs = zip(_colour(images).split(batch), _colour(truth).split(batch), strict=True)
    return torch.cat([distance(one, two).reshape(-1) for one, two in pairs])


def pixels(images: Tensor) -> Tensor:
    """The plainest feature space: means over an 8 x 8 grid, `(count, 64 * channels)`; no network, no weights."""
    return adaptive_avg_pool2d(images.float(), _PIXELS).flatten(1)


def ranks(features: Tensor, targets: Tensor, truth: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The place of each image's true partner among all candidates by distance, 1 the best, `(count,)`, float64.

    Candidates as near as the partner share their places: with `k` of them it is `k / 2` worse, so features that tell
    nothing apart rank no better than chance, `(m + 1) / 2`.

    Args:
        features: of the images, `(count, d)`.
        targets: of the candidates, `(m, d)`.
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


def recall(places: Tensor, k: int) -> float:
    """The share of `places (count,)` that are `k` or better."""
    return float((places <= k).double().mean())


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise PushforwardError("PSNR and SSIM need `pip install 'pushforward[evaluate]'`.") from error
    return functional


@cache
def _lpips_network(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name not in ("alex", "vgg", "squeeze"):
        raise PushforwardError(f"LPIPS has the networks alex, vgg and squeeze; got {name!r}.")
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net: Callable[[Tensor, Tensor], Tensor] = LearnedPerceptualImagePatchSimilarity(name).net  # type: ignore[arg-type]
    except ImportError as error:  # torchmetrics itself, or torchvision, which it needs here
        raise PushforwardError("LPIPS needs `pip install 'pushforward[evaluate]' torchvision`.") from error
    except OSError as error:  # of the download, too
        raise PushforwardError(
            f"The weights of LPIPS's network {name} cannot be had: {error}; leave LPIPS out, or go online once."
        ) from error
    return net


def _colour(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


def _check(images: Tensor, truth: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape != truth.shape or 0 in images.shape:
        shapes = f"{tuple(images.shape)} and {tuple(truth.shape)}"
        raise PushforwardError(
            f"Measures compare two batches of images (count, 1 or 3, height, width) of one shape; got {shapes}."
        )
