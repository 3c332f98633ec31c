"""Variance-preserving diffusion given by a table of `beta`, as trained networks use it.

`alphas_cumprod[n] = prod (1 - beta)` is known at the integer timesteps n = 0 … N - 1 only. Between them the *angle*
`phi = atan2(sigma, alpha)` is interpolated by a monotone cubic (Fritsch–Carlson), which stays finite where the signal
vanishes (zero terminal SNR) and where the noise does (phi = 0 at time 0). Time is `t = (n + 1) / N`: clean at 0,
timestep 0 at 1/N, the noisiest at 1.

The noise is `sin phi` and the signal `sin(pi/2 - phi)`, each angle given by a cubic about the knot where it is smaller.
So both have as many digits where they are tiny as elsewhere, and are exactly 0 where the table says so: the cosine of
a rounded pi/2 would be 6e-17, which passes for a signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear.process import ScaledProcess


@dataclass(frozen=True)
class Discrete(ScaledProcess):
    """Variance preserving, from a table of cumulative products.

    Args:
        alphas_cumprod: decreasing values in [0, 1), one per timestep.

    References:
        Denoising Diffusion Probabilistic Models, Ho et al., arXiv 2006.11239, eq. 4.
    """

    alphas_cumprod: tuple[float, ...]
    name: ClassVar[str] = "discrete"

    def __post_init__(self) -> None:
        try:
            table = np.atleast_1d(np.asarray(self.alphas_cumprod, dtype=np.float64))
        except (TypeError, ValueError):  # no numbers
            table = np.empty(0)
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        if table.ndim != 1 or len(table) < 2 or not (np.diff(table) < 0).all() or table[0] >= 1 or table[-1] < 0:
            raise PushforwardError(
                "A discrete process needs at least two decreasing values of alphas_cumprod in [0, 1)."
            )

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"Discrete({self.timesteps} timesteps, alphas_cumprod={first:.4g} … {last:.4g})"

    @classmethod
    def from_betas(cls, betas: Tensor) -> Discrete:
        """Make the process from the noise variances `beta_n` of its single steps, `(timesteps,)`."""
        return cls(tuple(torch.cumprod(1 - betas.double(), 0).tolist()))

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The noisiest time."""
        return 1.0

    @property
    def t_min(self) -> float:  # type: ignore[override]
        """The time of timestep 0."""
        return 1.0 / self.timesteps

    @property
    def timesteps(self) -> int:
        """Length of the table."""
        return len(self.alphas_cumprod)

    @cached_property
    def _splines(self) -> Tensor:
        """Cubics between the knots `t = 0, 1/N … 1`, highest power first, `(2, 4, N)`.

        The first is phi, in the time since the knot before; the second pi/2 - phi, in the time left to the knot after.
        """
        alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - np.asarray(self.alphas_cumprod))
        knots = np.arange(self.timesteps + 1) / self.timesteps
        noise = np.concatenate([[0.0], np.arctan2(sigma, alpha)])
        signal = np.concatenate([[0.5 * np.pi], np.arctan2(alpha, sigma)])
        ahead, back = PchipInterpolator(knots, noise), PchipInterpolator(1 - knots[::-1], signal[::-1])
        return torch.from_numpy(np.stack([ahead.c, back.c[:, ::-1]]))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        piece = (t.detach() * self.timesteps - 1e-9).floor().long().clamp(0, self.timesteps - 1)
        knot = piece.double() / self.timesteps, (piece + 1).double() / self.timesteps
        noise, signal = (
            ((cubic * x + square) * x + linear) * x + constant
            for x, (cubic, square, linear, constant) in zip(
                (t - knot[0], knot[1] - t), self._splines[:, :, piece], strict=True
            )
        )
        return signal.sin(), noise.sin()
