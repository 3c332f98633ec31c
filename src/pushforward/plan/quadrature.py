"""Integrals over the steps of a grid, and what the reverse diffusion of a Gaussian does between two times.

All in float64. Integrands are smooth in `y = sqrt(t)` for every process (noise levels start like `sqrt(t)` where the
schedule does not), so Gauss–Legendre in y converges geometrically: 8 nodes leave only rounding errors in most steps of
a fine grid, and 64 in the longest. How many a step needs is seen from its integrand: n nodes tell its Legendre series
to degree n - 1, and integrate it exactly to degree 2 n - 1, so where the last terms of the series are below the root of
rounding, what the integral lacks is below rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Basis, Gaussian, Operator, Process, root, unrooted
from pushforward.linear.legendre import gauss_legendre

_LEVELS = 8, 16, 32, 64  # nodes of a step; the next number if its integrand needs it
_ROOT = 8e-10  # of float64's rounding, with some room for the polynomials that the integrand is multiplied by
_NUMBERS = 2**18  # coefficients of an operator held at a time


def _nodes(start: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return times and weights `(steps, count)` from `start (steps,)` to `end`: `int f dt ~ sum w f(tau)`, signed."""
    x, w, _ = gauss_legendre(count)
    middle, half = 0.5 * (start.sqrt() + end.sqrt())[:, None], 0.5 * (end.sqrt() - start.sqrt())[:, None]
    y = middle + half * x
    return y.square(), 2 * half * y * w


def point_table(sets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Write as many sets of points for each step into a table for `integrals`, `(steps, sets, points)`."""
    size = max(len(points) for step in sets for points in step)
    return torch.tensor([[[*points, *[-1] * (size - len(points))] for points in step] for step in sets], device="cpu")


def integrals(
    times: Tensor,
    basis: Basis,
    variable: Callable[[Tensor], Tensor],
    kernel: Callable[[Tensor, Tensor], Operator],
    through: Tensor,
) -> Operator:
    """Return the integrals over steps of a kernel times Lagrange's polynomials, `(steps, sets, points)`.

    Args:
        times: the grid, `(steps + 1,)` or more.
        basis: the kernel's basis.
        variable: function of times, in which these are polynomials.
        kernel: function `(tau (steps, nodes), ends (steps, 1)) -> operators (steps, nodes)`; it decides how many nodes
            a step takes.
        through: the points of the grid that the polynomials go through, `(steps, sets, points)`; where it is negative
            there is none, and the integral is 0.
    """
    points, known = variable(times)[through].masked_fill(through < 0, 0.0), through >= 0
    count = math.prod(basis.shape)
    found, left = None, torch.arange(len(through), device="cpu")
    for nodes in _LEVELS:
        tau, weights = _nodes(times[left], times[left + 1], nodes)
        polynomials = lagrange(points[left], known[left], variable(tau)[:, None]) * weights[:, None, None]
        coarse = []
        for rows in torch.arange(len(left), device="cpu").split(max(1, _NUMBERS // (4 * nodes * count))):
            some = left[rows]
            values = kernel(tau[rows], times[some + 1, None]).coefficients.movedim((-2, -1), (0, 1))
            values = values.reshape(*values.shape[:4], count)
            settled = _settled(values) | (nodes == _LEVELS[-1])
            if found is None:
                found = values.new_zeros(*values.shape[:2], len(through), through[0].numel(), count)
            found[:, :, some[settled]] = polynomials[rows[settled]].flatten(1, 2) @ values[:, :, settled]
            coarse.append(some[~settled])
        left = torch.cat(coarse)
        if not len(left):
            break
    assert found is not None  # there is a step
    found = found.view(*found.shape[:2], *through.shape, *basis.shape)
    return Operator(found.movedim((0, 1), (-2, -1)), basis)


def _settled(values: Tensor) -> Tensor:
    """Say of each step whether its integrand, at Gauss–Legendre nodes, is a polynomial but for `_ROOT` of its size.

    Values are `(k, k, steps, nodes, frequencies)`.
    """
    last = gauss_legendre(values.shape[3])[2][-2:]
    rest, whole = (torch.maximum(x.amax((0, 1, 3, 4)), -x.amin((0, 1, 3, 4))) for x in (last @ values, values))
    settled: Tensor = rest <= _ROOT * whole
    return settled


def lagrange(points: Tensor, known: Tensor, at: Tensor) -> Tensor:
    """Evaluate Lagrange's basis polynomials of the `known` of `points (..., n)` at `at (..., m)`, `(..., n, m)`."""
    skipped = torch.eye(points.shape[-1], dtype=torch.bool, device="cpu") | ~(known[..., :, None] & known[..., None, :])
    gaps = (points[..., :, None] - points[..., None, :]).masked_fill(skipped, 1.0)
    ratios = (at[..., None, None, :] - points[..., None, :, None]) / gaps[..., None]
    return ratios.masked_fill(skipped[..., None], 1.0).prod(-2) * known[..., None]


def reverse_transition(
    process: Process, end: Tensor, times: Tensor, noise: float, reference: Gaussian, operator: Operator
) -> Operator:
    r"""Return `Psi^(end, tau) X`, X an operator, Psi^ of the reverse diffusion that keeps `reference`'s marginals.

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
        operator: X at the times tau, or for all.
    """
    if noise == 1:
        gain = reference.covariance(process, end) @ process.transition(times, end).T
        return gain @ (reference.covariance(process, times).inverse() @ operator)
    last = root(process, end, reference)
    if noise == 0:
        return last @ unrooted(process, times, reference, operator)
    if process.blocks == 1:
        ratio = last @ root(process, times, reference).inverse()
        shrink = process.transition(times, end) @ ratio
        return Operator(ratio.coefficients * shrink.coefficients.pow(noise**2), ratio.basis) @ operator
    if not reference and bool((end == 0).any()):
        raise PushforwardError(
            f"The reverse diffusion of process {process.name!r} with noise {noise} has no limit at t = 0; "
            f"end the grid at t_min = {process.t_min:.3g}."
        )
    return last @ _magnus(process, end, times, noise, reference) @ unrooted(process, times, reference, operator)


def _magnus(
    process: Process, end: Tensor, times: Tensor, noise: float, reference: Gaussian, panels: int = 24
) -> Operator:
    """`Y(end, tau)` of `dY/dt = noise^2 / 2 R^-1 G G^T R^-T Y`, in panels of equal length in `y = sqrt(t)`."""
    y, y_end = (x[..., None] for x in torch.broadcast_tensors(times.sqrt(), end.sqrt()))
    edges = y + (y_end - y) * torch.linspace(0, 1, panels + 1, dtype=torch.float64, device="cpu")  # from tau to end
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
