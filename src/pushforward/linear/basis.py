"""Bases in which the coefficients of a linear diffusion are diagonal.

Two are enough for the processes of the field: the *identity*, where one number serves every pixel, and the
*orthonormal DCT-II* over the trailing axes of the state, where every spatial frequency has a number of its own
(Hoogeboom & Salimans, "Blurring Diffusion Models", arXiv 2209.05557). With

    D_H[k, n] = sqrt((1 + [k > 0]) / H) cos(pi (n + 1/2) k / H),        D_H D_H^T = I,

the coordinates of an image `u` are `D_H u D_W^T`. White noise stays white noise, since the transform is orthogonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cache must serve gradients too
        n = torch.arange(size, dtype=torch.float64, device="cpu")
        matrix = torch.cos(math.pi / size * n[:, None] * (n + 0.5)) * math.sqrt(2 / size)
        matrix[0] /= math.sqrt(2)
        return matrix.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Basis:
    """The identity (`shape == ()`) or the orthonormal DCT-II over the trailing axes of lengths `shape`."""

    shape: tuple[int, ...] = ()

    def forward(self, u: Tensor) -> Tensor:
        """Return the coordinates of `u`, of shape `(..., *shape)`."""
        for axis, size in enumerate(self.shape, start=-len(self.shape)):
            u = _along(u, _dct_matrix(size, u.dtype, u.device), axis)
        return u

    def inverse(self, v: Tensor) -> Tensor:
        """Return the field whose coordinates are `v`, of shape `(..., *shape)`."""
        for axis, size in enumerate(self.shape, start=-len(self.shape)):
            v = _along(v, _dct_matrix(size, v.dtype, v.device).mT, axis)
        return v

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the negative Laplacian, `pi^2 sum_a (k_a / shape_a)^2`, shape `shape`, pixels^-2."""
        total = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
        for axis, size in enumerate(self.shape):
            view = [1] * len(self.shape)
            view[axis] = size
            total = total + (math.pi / size * torch.arange(size, dtype=torch.float64, device="cpu")).square().view(view)
        return total


IDENTITY = Basis()


def _along(u: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply `u` by `matrix` along one of its trailing axes."""
    if axis == -1:
        return u @ matrix.mT
    if axis == -2:
        return matrix @ u
    return torch.movedim(torch.movedim(u, axis, -1) @ matrix.mT, -1, axis)
