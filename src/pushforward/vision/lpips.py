"""LPIPS: a distance of images by the features of a trained network (Zhang et al., arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pushforward.data.pictures import check_pairs
from pushforward.errors import PushforwardError

__all__ = ["PairNetwork", "lpips"]

SMALLEST = 32  # side of the images
PairNetwork = Callable[[Tensor, Tensor], Tensor]


def lpips(images: Tensor, truth: Tensor, network: str | PairNetwork = "alex", *, batch: int = 64) -> Tensor:
    """Compute the learned perceptual distance of pairs of images, `(count,)`; 0 for equal ones.

    Args:
        images: images in [-1, 1], at least 32 x 32 pixels.
        truth: the images to compare them with, of the same shape.
        network: `alex` (the usual one), `vgg` or `squeeze`, whose weights `torchvision` downloads once; or any function
            of two batches of colour images in [-1, 1] that gives one number per pair.
        batch: pairs per network call.

    Raises:
        PushforwardError: the images differ in shape or are too small, the network is unknown, a package is missing, or
            the weights cannot be loaded.
    """
    check_pairs(images, truth)
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise PushforwardError(
            f"LPIPS needs images of at least {SMALLEST}x{SMALLEST}; got {height}x{width}. Leave it out."
        )
    distance = _network(network) if isinstance(network, str) else network
    if isinstance(distance, torch.nn.Module):
        distance = distance.to(images.device)
    pairs = zip(_colour(images).split(batch), _colour(truth).split(batch), strict=True)
    return torch.cat([distance(one, two).reshape(-1) for one, two in pairs])


@cache
def _network(name: str) -> PairNetwork:
    if name not in ("alex", "vgg", "squeeze"):
        raise PushforwardError(f"LPIPS has the networks alex, vgg and squeeze; got {name!r}.")
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net: PairNetwork = LearnedPerceptualImagePatchSimilarity(name).net  # type: ignore[arg-type]
    except ImportError as error:  # torchmetrics itself, or torchvision, which it needs here
        raise PushforwardError("LPIPS needs `pip install 'pushforward[evaluate]' torchvision`.") from error
    except OSError as error:  # of the download, too
        raise PushforwardError(
            f"The weights of LPIPS's network {name} cannot be loaded: {error}. Leave LPIPS out, or go online once."
        ) from error
    return net


def _colour(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)
