"""What is known of how probable images are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BIN", "Likelihood"]

BIN = 2 / 255  # width of a level of 8 bits, where images lie in [-1, 1]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihoods of images, float64, on the CPU, each `(count,)` but for the numbers.

    Args:
        nats: logarithm of the density of each image, over its numbers in [-1, 1].
        error: its standard error over the random draws: 0 where nothing is random, not a number for a single draw.
        halved: how much half the steps change it; the error of the steps taken is smaller, by 16 if they are short.
        dimensions: numbers of an image.
        nfe: network evaluations of each image; a vector-Jacobian product counts as one.
    """

    nats: Tensor
    error: Tensor
    halved: Tensor
    dimensions: int
    nfe: int

    @property
    def bits(self) -> Tensor:
        """Bits per dimension of images of 8 bits; an upper bound, if they were dequantised."""
        return math.log2(1 / BIN) - self.nats / self._unit

    @property
    def bits_error(self) -> Tensor:
        """Standard error of `bits`."""
        return self.error / self._unit

    @property
    def bits_halved(self) -> Tensor:
        """How much half the steps change `bits`."""
        return self.halved / self._unit

    @property
    def _unit(self) -> float:
        return self.dimensions * math.log(2)

    @staticmethod
    def cat(parts: list[Likelihood]) -> Likelihood:
        """Those of several batches as one."""
        nats, error, halved = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("nats", "error", "halved")
        )
        return Likelihood(nats, error, halved, parts[0].dimensions, parts[0].nfe)
