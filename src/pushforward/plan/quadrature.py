"""Integrals over the steps of a grid, and what the reverse diffusion of a Gaussian does between two times.

All in float64. Integrands are smooth in `y = sqrt(t)` for every process (noise levels start like `sqrt(t)` where the
schedule does not), so Gauss–Legendre in y converges geometrically: 32 nodes a step leave rounding errors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Operator, Process, root

NODES = 32


def gauss_legendre(start: float, end: float, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Times from `start` to `end` and weights, `int_start^end f dt ~ sum w f(tau)`; signed, so `end < start` is fine."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    middle, half = 0.5 * (start**0.5 + end**0.5), 0.5 * (end**0.5 - start**0.5)
    y = middle + half * x
    return y.square(), 2 * half * y * w


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """Lagrange's basis polynomials of `nodes (n,)` at points `at (m,)`, `(n, m)`."""
    ratios = (at[None, None, :] - nodes[None, :, None]) / (nodes[:, None] - nodes[None, :] + torch.eye(len(nodes)))[
        :, :, None
    ]
    return torch.where(torch.eye(len(nodes), dtype=torch.bool)[:, :, None], 1.0, ratios).prod(1)


def weighted(operators: Operator, weights: Tensor) -> Operator:
    """`sum_n weights_n operators_n` over the batch."""
    return Operator(torch.tensordot(weights, operators.coefficients, dims=1), operators.basis)


def reverse_transition(process: Process, end: float, times: Tensor, noise: float, reference: Gaussian) -> Operator:
    r"""`Psi^(end, tau)` of the reverse diffusion that keeps `reference`'s marginals, for each tau of `times (n,)`.

    It solves `dPsi^/dt = (F + (1 + noise^2) / 2 G G^T Sigma_t^-1) Psi^` (gDDIM, arXiv 2206.05564, section 4).
    With no noise it is `R_end R_tau^-1`; with `noise = 1`, the posterior's `Sigma_end Psi(tau, end)^T Sigma_tau^-1`.
    Between and beyond, scalars obey `Psi^ = (R' / R) (Psi(tau, end) R' / R)^(noise^2)`, and blocks are followed in the
    root's coordinates, where only `noise^2 / 2 R^-1 G G^T R^-T` is left, by a fourth-order Magnus integrator.
    """
    last = torch.tensor([end], dtype=torch.float64)
    if noise == 1:
        gain = reference.covariance(process, last) @ process.transition(times, last.expand_as(times)).T
        return gain @ reference.covariance(process, times).inverse()
    ratio = root(process, last, reference) @ root(process, times, reference).inverse()
    if noise == 0:
        return ratio
    if process.blocks == 1:
        shrink = process.transition(times, last.expand_as(times)) @ ratio
        return Operator(ratio.coefficients * shrink.coefficients.pow(noise**2), ratio.basis)
    if end == 0 and not reference:
        msg = f"The reverse diffusion of {process.name!r} with noise {noise} has no limit at t = 0; end the grid at t_min."
        raise PushforwardError(
            msg
        )
    middle = _magnus(process, end, times, noise, reference)
    return root(process, last, reference) @ middle @ root(process, times, reference).inverse()


def _magnus(process: Process, end: float, times: Tensor, noise: float, reference: Gaussian, panels: int = 24) -> Operator:
    """`Y(end, tau)` of `dY/dt = noise^2 / 2 R^-1 G G^T R^-T Y`, for each tau."""
    y_end, y = end**0.5, times.sqrt()[:, None]
    edges = y + (y_end - y) * torch.linspace(0, 1, panels + 1, dtype=torch.float64)  # (n, panels + 1), from tau to end
    half, middle = 0.5 * edges.diff(dim=1), 0.5 * (edges[:, 1:] + edges[:, :-1])
    at = torch.stack([middle - half / 3**0.5, middle + half / 3**0.5])  # Gauss-Legendre, two points
    factor = root(process, at.square(), reference).inverse()
    rate = 0.5 * noise**2 * (factor @ process.diffusion(at.square()) @ factor.T) * (2 * at)
    first, second = rate[0] * half, rate[1] * half
    commutator = second @ first - first @ second
    exponent = first + second + (3**0.5 / 3) * commutator
    steps = torch.linalg.matrix_exp(exponent.coefficients)
    total = steps[:, 0]
    for k in range(1, panels):
        total = steps[:, k] @ total
    return Operator(total, exponent.basis)
