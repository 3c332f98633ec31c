"""The seam between maps and what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from pushforward.maps.code import Code

__all__ = ["Pushforward"]


@runtime_checkable
class Pushforward(Protocol):
    """A map from Gaussian codes to images in [-1, 1]: a `Diffusion`, or a GAN (`maps.generator.Generator`).

    Its classes, prompts and all else that its images depend on belong to the map: it is bound to them before it is
    handed to what works with maps.
    """

    def draw(self, count: int, *, seed: int = 0, first: int | Sequence[int] = 0) -> Code:
        """Codes of `count` images, standard normal, by the seed and the image's number, from `first` on or of each."""

    def decode(self, code: Code) -> Tensor:
        """Their images `(count, channels, height, width)`, differentiable in the code."""

    def sample(self, count: int, *, seed: int = 0, first: int = 0) -> Tensor:
        """The images of `draw`."""

    def some(self, which: slice | Tensor) -> Self:
        """The same map for some of the images: of what it is bound to for each image, those of these images."""
