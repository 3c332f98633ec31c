"""Sheets of images with their words, as commands write them and the page hands them over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image
from torch import Tensor

from pushforward.data.pictures import compared, sheet
from pushforward.data.words import many
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.drawing import Drawn
from pushforward.maps.labels import Labels, Unsaid, named
from pushforward.model import Model

__all__ = ["chains_sheet", "drawn_sheet", "reconstructed", "titled", "walks"]


def titled(images: Tensor, title: str, model: Model, labels: Labels) -> Image.Image:
    """Arrange a model's images under a title, each with what it shows; a single one stands alone."""
    return sheet(images, title=title, captions=named(model, labels)) if len(images) > 1 else sheet(images)


def drawn_sheet(drawn: Drawn, there: Diffusion | AdaptiveDiffusion, solver: str, seed: int) -> Image.Image:
    """Arrange images that a map has drawn from a seed by a solver, titled, each with what the map is told of it."""
    title = f"{there.model.name}: {solver}, {many(drawn.nfe, 'network evaluation')} per image, seed {seed}"
    title += "" if drawn.method is None else f"; {many(drawn.rounds, 'round')}"
    return titled(drawn.images, title, there.model, None if isinstance(there.labels, Unsaid) else there.labels)


def reconstructed(images: Tensor, again: Tensor) -> Image.Image:
    """Arrange images, each above what its code decodes to, with the largest error of a value."""
    errors = (again - images).flatten(1).abs().amax(1)
    captions = [f"error {error:.1e}" for error in errors.tolist()]
    return compared([images, again], names=["image", "its code, decoded"], captions=[(), captions])


def walks(images: Tensor, weights: Sequence[float], pairs: Iterable[tuple[int, int]]) -> Image.Image:
    """Arrange walks from one image to another in rows, each as long as there are weights of the latter."""
    return sheet(images, columns=len(weights), heads=[f"{weight:.2g}" for weight in weights],
                 rows=[f"image {a} to {b}" for a, b in pairs])  # fmt: skip


def chains_sheet(images: Tensor, energies: Iterable[float], chains: Iterable[int]) -> Image.Image:
    """Arrange images that chains found, each with its chain and its energy."""
    each = zip(chains, energies, strict=True)
    return sheet(images, captions=[f"chain {chain}\nenergy {energy:.3g}" for chain, energy in each])
