"""The seam between maps and what is done with them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from pushforward.maps.code import Code
from pushforward.maps.labels import Labels

__all__ = ["Pushforward"]


@runtime_checkable
class Pushforward(Protocol):
    """A map from Gaussian codes to images in [-1, 1]: a `Diffusion`, or a GAN (`maps.generator.Generator`)."""

    def draw(self, count: int, *, seed: int = 0, first: int = 0) -> Code:
        """Codes of `count` images, standard normal; image i's depends on the seed and `first + i` alone."""

    def decode(self, code: Code, labels: Labels = None) -> Tensor:
        """Their images `(count, channels, height, width)`, differentiable in the code."""

    def sample(self, count: int, *, seed: int = 0, first: int = 0, labels: Labels = None) -> Tensor:
        """The images of `draw`."""
