"""Integrals over the steps of a grid, and what the reverse diffusion of a Gaussian does between two times.

All in float64. Integrands are smooth in `y = sqrt(t)` for every process (noise levels start like `sqrt(t)` where the
schedule does not), so Gauss–Legendre in y converges geometrically: 8 nodes leave only rounding errors in most steps of
a fine grid, and 64 in the longest. How many a step needs is seen from its integrand: n nodes tell its Legendre series
to degree n - 1, and integrate it exactly to degree 2 n - 1, so where the last terms of the series are below the root of
rounding, what the integral lacks is below rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Basis, Gaussian, Operator, Process, root
from pushforward.linear.legendre import gauss_legendre

_LEVELS = 8, 16, 32, 64  # nodes of a step; the next number if its integrand needs it
_ROOT = 8e-10  # of float64's rounding, with some room for the polynomials that the integrand is multiplied by
_NUMBERS = 2**21  # coefficients of an operator held at a time


def _nodes(start: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return times and weights `(steps, count)` from `start (steps,)` to `end`: `int f dt ~ sum w f(tau)`, signed."""
    x, w, _ = gauss_legendre(count)
    middle, half = 0.5 * (start.sqrt() + end.sqrt())[:, None], 0.5 * (end.sqrt() - start.sqrt())[:, None]
    y = middle + half * x
    return y.square(), 2 * half * y * w


def kernels(
    times: Tensor, basis: Basis, variable: Callable[[Tensor], Tensor], kernel: Callable[[Tensor, Tensor], Operator]
) -> Iterator[tuple[Tensor, Tensor, Operator]]:
    """Yield for each step of a grid the variable, the weights and a kernel's values at nodes of quadrature.

    Args:
        times: the grid, `(steps + 1,)`.
        basis: the kernel's basis; it decides how many steps are worked on at once.
        variable: function of times.
        kernel: function `(tau (steps, nodes), ends (steps, 1)) -> operators (steps, nodes)`.
    """

    def rows(nodes: int) -> int:
        return max(1, _NUMBERS // (4 * nodes * math.prod(basis.shape)))

    for starts, ends in zip(times[:-1].split(rows(_LEVELS[0])), times[1:].split(rows(_LEVELS[0])), strict=True):
        found: dict[int, tuple[Tensor, Tensor, Operator]] = {}
        for nodes in _LEVELS:
            left = [k for k in range(len(ends)) if k not in found]
            for first in range(0, len(left), rows(nodes)):
                some = left[first : first + rows(nodes)]
                tau, weights = _nodes(starts[some], ends[some], nodes)
                x, values = variable(tau), kernel(tau, ends[some, None])
                settled = _settled(values) | (nodes == _LEVELS[-1])
                found |= {some[k]: (x[k], weights[k], values[k]) for k in settled.nonzero().flatten().tolist()}
        yield from (found[k] for k in range(len(ends)))


def _settled(values: Operator) -> Tensor:
    """Say of each step whether its integrand, at Gauss–Legendre nodes, is a polynomial but for `_ROOT` of its size."""
    steps, nodes = values.batch_shape
    last = gauss_legendre(nodes)[2][-2:]
    flat = values.coefficients.reshape(steps, nodes, -1)
    settled: Tensor = (last @ flat).abs().amax((1, 2)) <= _ROOT * flat.abs().amax((1, 2))
    return settled


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """Evaluate Lagrange's basis polynomials of `nodes (n,)` at points `at (m,)`, `(n, m)`."""
    same = torch.eye(len(nodes), dtype=torch.bool)
    gaps = (nodes[:, None] - nodes[None, :]).masked_fill(same, 1.0)
    ratios = (at[None, None, :] - nodes[None, :, None]) / gaps[:, :, None]
    return ratios.masked_fill(same[:, :, None], 1.0).prod(1)


def weighted(operators: Operator, weights: Tensor) -> Operator:
    """Return `sum_n weights_n operators_n` over the batch."""
    values = operators.coefficients
    return Operator((weights @ values.flatten(1)).view(values.shape[1:]), operators.basis)


def reverse_transition(process: Process, end: Tensor, times: Tensor, noise: float, reference: Gaussian) -> Operator:
    r"""Return `Psi^(end, tau)` of the reverse diffusion that keeps `reference`'s marginals.

    It solves `dPsi^/dt = (F + (1 + noise^2) / 2 G G^T Sigma_t^-1) Psi^` (gDDIM, arXiv 2206.05564, section 4).
    With no noise it is `R_end R_tau^-1`; with `noise = 1`, the posterior's `Sigma_end Psi(tau, end)^T Sigma_tau^-1`.
    Between and beyond, scalars obey `Psi^ = (R' / R) (Psi(tau, end) R' / R)^(noise^2)`, and blocks are followed in the
    root's coordinates, where only `noise^2 / 2 R^-1 G G^T R^-T` is left, by a fourth-order Magnus integrator.

    Args:
        process: the diffusion.
        end: earlier times, of a shape that broadcasts to that of `times`.
        times: the times tau, `(*batch,)`.
        noise: noise level lambda.
        reference: reference Gaussian N(m, C).
    """
    if noise == 1:
        gain = reference.covariance(process, end) @ process.transition(times, end).T
        return gain @ reference.covariance(process, times).inverse()
    last, back = root(process, end, reference), root(process, times, reference).inverse()
    if noise == 0:
        return last @ back
    if process.blocks == 1:
        ratio = last @ back
        shrink = process.transition(times, end) @ ratio
        return Operator(ratio.coefficients * shrink.coefficients.pow(noise**2), ratio.basis)
    if not reference and bool((end == 0).any()):
        raise PushforwardError(
            f"The reverse diffusion of process {process.name!r} with noise {noise} has no limit at t = 0; "
            f"end the grid at t_min = {process.t_min:.3g}."
        )
    return last @ _magnus(process, end, times, noise, reference) @ back


def _magnus(
    process: Process, end: Tensor, times: Tensor, noise: float, reference: Gaussian, panels: int = 24
) -> Operator:
    """`Y(end, tau)` of `dY/dt = noise^2 / 2 R^-1 G G^T R^-T Y`, in panels of equal length in `y = sqrt(t)`."""
    y, y_end = (x[..., None] for x in torch.broadcast_tensors(times.sqrt(), end.sqrt()))
    edges = y + (y_end - y) * torch.linspace(0, 1, panels + 1, dtype=torch.float64)  # from tau to end
    half, middle = 0.5 * edges.diff(dim=-1), 0.5 * (edges[..., 1:] + edges[..., :-1])
    at = torch.stack([middle - half / 3**0.5, middle + half / 3**0.5])  # Gauss-Legendre, two points
    inverse = root(process, at.square(), reference).inverse()
    rate = 0.5 * noise**2 * (inverse @ process.diffusion(at.square()) @ inverse.T) * (2 * at * half)
    first, second = rate[0], rate[1]
    exponent = first + second + (3**0.5 / 3) * (second @ first - first @ second)
    steps = torch.linalg.matrix_exp(exponent.coefficients)
    where = times.ndim
    total = steps.select(where, 0)
    for k in range(1, panels):
        total = steps.select(where, k) @ total
    return Operator(total, exponent.basis)
