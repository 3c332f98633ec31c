r"""Reference Gaussians, and the root of their marginal covariance.

Data referenced to N(m, C) have the marginal N(Psi m, Sigma_t) with `Sigma_t = Cov[u_t | x_0] + Psi C Psi^T`. Its root,
`R R^T = Sigma_t`, is the solution of

    dR/dt = (F + 1/2 G G^T Sigma_t^{-1}) R,

and then `u_t = Psi m + R_t z` with *constant* z is exactly the probability flow of that Gaussian. With C = 0 it is
gDDIM's R_t (arXiv 2206.05564, eq. 17), for which DDIM is exact on a single data point.

For 1 x 1 blocks R is the square root. For 2 x 2 blocks write `R = L U(theta)`, L the Cholesky factor and U a rotation.
Inserting it, `L^-1 (F + 1/2 G G^T Sigma^-1) L - L^-1 L' = theta' J` must be antisymmetric; the last term on the left
is lower triangular, so the upper right entry alone gives

    theta' = -F_{01} L_11 / L_00 - (G G^T L^-T)_{01} / (2 L_00),

a plain integral: no differential equation is left to solve. (R is unique up to a constant rotation from the right; we
take theta_0 = 0.) For point data the integrand grows like t^{-1/2} at t = 0, which `t = y^2` removes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial.legendre import legvander
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear.basis import Basis
from pushforward.linear.legendre import gauss_legendre
from pushforward.linear.operator import Operator
from pushforward.linear.process import Process

_OCTAVES, _PANELS, _NODES = 16, 2, 20  # panels per octave, Gauss-Legendre nodes per panel: 1e-11 on every process here


@dataclass(frozen=True, eq=False, init=False)
class Gaussian:
    """The Gaussian that data are referenced to.

    Args:
        variance: one number for white covariance (0: point data), or one per DCT frequency, `(height, width)`; kept in
            float64.
        mean: mean image, a number or a tensor that broadcasts to `(channels, *field)`.

    Raises:
        PushforwardError: a variance is negative or not finite.
    """

    variance: Tensor
    mean: Tensor

    def __init__(self, variance: float | Tensor = 0.0, mean: float | Tensor = 0.0) -> None:
        try:
            variance = torch.as_tensor(variance, dtype=torch.float64, device=getattr(variance, "device", "cpu"))
            mean = mean if isinstance(mean, Tensor) else torch.tensor(mean, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError):
            raise PushforwardError(
                f"A reference Gaussian has a number or a tensor as its variance, and as its mean; got {variance!r} and "
                f"{mean!r}."
            ) from None
        object.__setattr__(self, "variance", variance)
        object.__setattr__(self, "mean", mean)
        if not bool((variance >= 0).all() & variance.isfinite().all()):
            raise PushforwardError("The variance of a reference Gaussian must be finite and not negative.")

    def __repr__(self) -> str:
        """Show numbers as they are, and the average of a variance per frequency or a mean per pixel."""
        said = []
        for name, value in (("variance", self.variance), ("mean", self.mean)):
            shape = f" over {'x'.join(map(str, value.shape))}" if value.ndim else ""
            said.append(f"{name}={float(value.double().mean()):.4g}{shape}")
        return f"Gaussian({', '.join(said)})"

    @property
    def basis(self) -> Basis:
        """The basis in which its covariance is diagonal."""
        return Basis(tuple(self.variance.shape))

    def data_covariance(self, blocks: int) -> Operator:
        """Return C as an operator on clean states (a velocity gets none here: the process brings its own)."""
        if blocks == 1:
            return Operator.scalar(self.variance, basis=self.basis)
        zero = torch.zeros_like(self.variance)
        return Operator.block([[self.variance, zero], [zero, zero]], self.basis)

    def mean_state(self, process: Process, like: Tensor) -> Tensor | None:
        """Return the mean as a clean state, shaped like states `(batch, k * channels, *field)`; `None` if zero."""
        if not bool(self.mean.any()):
            return None
        return process.lift(self.mean.to(like) + torch.zeros_like(process.image(like)))

    def covariance(self, process: Process, t: Tensor) -> Operator:
        """Return the marginal covariance `Sigma_t` of the data under `process`."""
        if not self:
            return process.covariance(t)
        image = process.signal(t).part(columns=slice(1))
        return process.covariance(t) + image @ Operator.scalar(self.variance, basis=self.basis) @ image.T

    def response(self, process: Process, t: Tensor) -> Operator:
        """Return `L_t` of the posterior mean `E[u_0 | u_t] = m + L_t (u_t - Psi m)`: `L = C Psi^T Sigma_t^-1`."""
        psi = process.signal(t)
        return self.data_covariance(process.blocks) @ psi.T @ self.covariance(process, t).inverse()

    def snr(self, process: Process, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio of *these* data, `C` times the process's, `(*t.shape, *frequencies)`."""
        snr = process.snr(t)
        if self.variance.ndim and snr.ndim == t.ndim:
            snr = snr[(...,) + (None,) * self.variance.ndim]
        return self.variance * snr

    def tempered(self, exponent: float = 0.5, scale: float = 1.0) -> Gaussian:
        """Draw the spectrum towards white: `scale * variance^exponent * average^(1 - exponent)`."""
        variance = self.variance.pow(exponent) * self.variance.mean().pow(1 - exponent)
        return Gaussian(scale * variance, self.mean)

    def __bool__(self) -> bool:
        """Whether the Gaussian is more than a point (C = 0)."""
        return bool((self.variance > 0).any())


POINT = Gaussian()
WHITE = Gaussian(0.25)  # what is taken for data in [-1, 1] of which no more is known


def fit(images: Tensor) -> Gaussian:
    """Fit a Gaussian to images `(count, channels, *field)`: their mean, and a variance per DCT frequency.

    Raises:
        PushforwardError: there are fewer than two images.
    """
    if images.ndim < 3 or len(images) < 2:
        raise PushforwardError(
            f"Fitting a Gaussian takes two or more images, (count, channels, *field); got shape {tuple(images.shape)}."
        )
    values = images.detach().to("cpu", torch.float64)
    mean = values.mean(0)
    basis = Basis(tuple(values.shape[2:]))
    return Gaussian(basis.forward(values - mean).square().mean((0, 1)), mean)


def root(process: Process, t: Tensor, reference: Gaussian = POINT) -> Operator:
    """Return `R_t` of the module's docstring at times `t (times,)`, with `R_t R_t^T = Sigma_t`."""
    if process.blocks == 1:
        return reference.covariance(process, t).cholesky()
    factor = reference.covariance(process, t).cholesky()
    return factor @ _rotation(process, t, reference, factor.basis)


def unrooted(process: Process, t: Tensor, reference: Gaussian, operator: Operator) -> Operator:
    """Return `R_t^-1 X` of `root`, for an operator X at the times `t`."""
    solved = reference.covariance(process, t).cholesky().inverse() @ operator
    return solved if process.blocks == 1 else _rotation(process, t, reference, solved.basis).T @ solved


def whitening_angle(process: Process, t: Tensor, reference: Gaussian) -> Tensor:
    """Return `phi_t = atan2(1, sqrt(snr))` for the reference's data at the lowest frequency: 0 clean, pi/2 pure noise.

    In the coordinates `z = R^-1 (u - Psi m)` of a scalar process the probability flow is `dz/dphi = w`, with `w` the
    (unit-scale) velocity prediction: the time in which the flow has no linear part left at all.
    """
    snr = process.lowest.snr(t)[(...,) + (0,) * len(process.basis.shape)]
    return torch.atan2(torch.ones_like(t), (reference.variance.flatten()[0] * snr).sqrt())


def _rotation(process: Process, t: Tensor, reference: Gaussian, basis: Basis) -> Operator:
    angle = _angle(process, t, reference)
    cos, sin = angle.cos(), angle.sin()
    return Operator.block([[cos, -sin], [sin, cos]], basis)


def _angle(process: Process, t: Tensor, reference: Gaussian) -> Tensor:
    """The rotation of the root of a process with 2 x 2 blocks, `(*t.shape, *frequencies)`."""
    edges, start, series = _angle_by_panel(process, reference)
    y = t.flatten().sqrt()
    panel = torch.searchsorted(edges, y).sub(1).clamp(0, len(start) - 1)
    low, high = edges[panel], edges[panel + 1]
    powers = legvander(((2 * y - low - high) / (high - low)).numpy(), _NODES)
    before = np.concatenate([-np.ones_like(powers[:, :1]), powers[:, :-2]], 1)  # P_{-1} = -1 makes it vanish at -1
    integrals = torch.from_numpy((powers[:, 1:] - before) / (2 * np.arange(_NODES) + 1))
    angles = start[panel]
    for one in panel.unique().tolist():
        some = panel == one
        angles[some] += torch.tensordot(integrals[some], series[one], 1)
    return angles.reshape(t.shape + angles.shape[1:])


@lru_cache(maxsize=4)
def _angle_by_panel(process: Process, reference: Gaussian) -> tuple[Tensor, Tensor, Tensor]:
    """The edges of panels in `y = sqrt(t)`, `theta` at their starts, and the Legendre series of `theta'` in them.

    The integral of the series' `P_k` is `(P_{k+1} - P_{k-1}) / (2k + 1)`, so `theta` is known at every time.
    """
    down = torch.arange(_OCTAVES * _PANELS, -1, -1, dtype=torch.float64, device="cpu")
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    edges = torch.cat([zero, math.sqrt(process.t_max) * torch.exp2(-down / _PANELS)])
    x, _, project = gauss_legendre(_NODES)
    half = 0.5 * edges.diff()[:, None]
    nodes = edges[:-1, None] + half * (1 + x)
    series = torch.cat([
        torch.einsum("kn,pn,pn...->pk...", project, 2 * y * h, _angular_speed(process, reference, y.square()))
        for y, h in zip(nodes.split(8), half.split(8), strict=True)
    ])  # fmt: skip
    total = 2 * series[:, 0]  # P_0 alone has an integral from -1 to 1
    return edges, torch.cat([torch.zeros_like(total[:1]), total.cumsum(0)[:-1]]), series


def _angular_speed(process: Process, reference: Gaussian, tau: Tensor) -> Tensor:
    factor = reference.covariance(process, tau).cholesky()
    first, below, last = factor.entry(0, 0), factor.entry(1, 0), factor.entry(1, 1)
    speed: Tensor = process.drift(tau).lift(factor.basis).entry(0, 1) * last
    if process.noisy.start != 1:  # noise enters the image too
        noise = process.diffusion(tau).lift(factor.basis)
        direct = noise.entry(0, 1) - noise.entry(0, 0) * below / first
        speed = speed + torch.where(direct == 0, 0.0, 0.5 * direct / last)
    return -speed / first
