"""Gauss–Legendre quadrature, and the Legendre series of what is known at its nodes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss, legvander
from torch import Tensor


@lru_cache(maxsize=8)
def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes and weights on [-1, 1], `(nodes,)`, and the series of values at the nodes, `(degrees, nodes)`.

    The series' coefficient of `P_k` is `(k + 1/2) int f P_k`, exact for polynomials of degree `nodes - 1`.
    """
    with torch.inference_mode(False):  # the cache must serve gradients too
        x, w = leggauss(nodes)
        series = legvander(x, nodes - 1).T * w * (np.arange(nodes) + 0.5)[:, None]
        return torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(series)
