r"""Exponential solvers: exact for a reference Gaussian, with the network's deviation from it interpolated.

Reference the data to N(m, C). Its posterior mean is linear, `D_lin(u) = m + L_t (u - Psi m)`; the network's answer D
differs by `r = D - D_lin(u)`. The reverse diffusion with noise level `lambda` (0: probability flow, 1: the time
reversal of the forward process) is then, with `c = (1 + lambda^2) / 2`,

    du = [F + c G G^T Sigma^-1] (u - Psi m) dt + Psi' m dt - c G G^T Sigma_0^-1 Psi r dt + lambda G dw,

Sigma the reference's marginal covariance and Sigma_0 that of point data. The bracket is solved exactly (`Psi^`); the
deviation is scaled to unit size, `X = kappa r` with `kappa = sqrt(1 + snr_C)`, and interpolated by a polynomial in the
solver's variable through the last `order + 1` answers:

    u' = Psi' m + Psi^ (u - Psi m) + sum_j J_j X_j + N xi,     N N^T = Sigma' - Psi^ Sigma Psi^T,
    J_j = int Psi^(t', tau) c G G^T Sigma_0^-1 Psi / kappa  l_j(tau) |dtau|.

One knob, C, spans the field: C = 0 interpolates the data prediction (DPM-Solver++; stochastic: SDE-DPM-Solver++);
C = s^2 interpolates the v / EDM prediction, for which the variable *angle* leaves a flow without any linear part;
C -> infinity interpolates the noise prediction (DEIS, DPM-Solver). On blurring and Langevin diffusions it is the same.

References:
    DPM-Solver++, Lu et al., arXiv 2211.01095; UniPC, Zhao et al., arXiv 2302.04867; DEIS, Zhang & Chen,
    arXiv 2204.13902; Elucidating the Design Space, Karras et al., arXiv 2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import POINT, WHITE, Gaussian, Operator, Process, whitening_angle
from pushforward.plan.plan import Builder, Handle, Plan, Terms, combined
from pushforward.plan.quadrature import integrals, point_table, reverse_transition

Variable = Literal["time", "log-snr", "angle"]
Corrector = Literal["reuse", "evaluate"]


def variable_at(process: Process, name: Variable, t: Tensor, reference: Gaussian = POINT) -> Tensor:
    """Return the variable in which answers are interpolated, at times `t`."""
    match name:
        case "time":
            return t
        case "log-snr":
            return process.log_snr(t)
        case "angle":
            return whitening_angle(process, t, reference or WHITE)
    raise PushforwardError(f"Unknown variable {name!r}; use time, log-snr or angle.")


def check_noise(noise: float) -> None:
    """Raise unless a noise level is 0 or more, and its square finite."""
    if not 0 <= noise * abs(noise) < math.inf:
        raise PushforwardError(f"The noise level must be finite and not negative; got {noise:g}.")


def check_order(order: int) -> None:
    """Raise unless `order` is 0 … 3."""
    if order not in range(4):
        raise PushforwardError(f"The order must be 0 (one answer per step), 1, 2 or 3 (four answers); got {order}.")


def exponential(
    process: Process,
    grid: Tensor,
    *,
    order: int = 1,
    reference: Gaussian = POINT,
    variable: Variable = "log-snr",
    noise: float = 0.0,
    corrector: Corrector | None = None,
    denoise: bool = False,
    name: str = "exponential",
) -> Plan:
    """Make the multistep solver of the module's docstring.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: degree of the interpolating polynomial; the first steps use the answers there are.
        reference: reference Gaussian N(m, C).
        variable: variable of the polynomial.
        noise: noise level lambda >= 0.
        corrector: redo each step with the answer at its end included: `reuse` takes that answer as the next step's
            (UniPC's corrector, no extra evaluations), `evaluate` asks again at the corrected state.
        denoise: end with the denoised state `D_lin(u) + r` in place of the last step, which must go to time 0. If r was
            asked for at a predicted state, this moves the answer to the corrected one by the reference's response.
        name: name of the solver, for reports.

    Raises:
        PushforwardError: a corrector with noise, or a denoised state at the end of a grid that ends above time 0.
    """
    check_order(order)
    check_noise(noise)
    if corrector and noise:
        raise PushforwardError("A corrector needs noise = 0: the corrected step would draw its noise twice.")
    if denoise and float(grid[-1]) != 0:
        raise PushforwardError(
            f"Only a grid that ends at time 0 can end with the denoised state; this one ends at {float(grid[-1]):g}."
        )
    builder = Builder(process, name, grid, reference)
    times = builder.grid
    last = len(times) - 2
    ends = (0, 1) if corrector else (0,)
    sets = [[range(max(0, k - order), min(k + end, last) + 1) for end in ends] for k in range(last + 1 - denoise)]
    rule = Rule(process, builder, reference, variable, sets, noise)
    current = builder.start()
    asked: dict[int, Handle] = {}
    for k in range(last + 1):
        asked.setdefault(k, current)
        if denoise and k == last:
            current = builder.node(float(times[-1]), rule.denoised(k, current, asked[k]))
            break
        terms = rule.step(k, current, asked)
        if corrector is None or k == last:
            current = builder.node(float(times[k + 1]), terms, rule.spread(k))
            continue
        asked[k + 1] = builder.node(float(times[k + 1]), terms, stage=True)
        current = builder.node(float(times[k + 1]), rule.step(k, current, asked, which=1))
        if corrector == "evaluate":
            del asked[k + 1]
    return builder.build(order=order, noise=noise, variable=variable, corrector=corrector, denoise=denoise)


class Rule:
    """The step of the module's docstring on a grid, from wherever answers were asked for.

    Args:
        process: the diffusion.
        builder: builder of the plan, with its grid.
        reference: reference Gaussian N(m, C).
        variable: variable of the polynomial.
        sets: sets of times whose answers a polynomial may go through, as many for each step.
        noise: noise level lambda.
    """

    def __init__(self, process: Process, builder: Builder, reference: Gaussian, variable: Variable,
                 sets: Sequence[Sequence[range]], noise: float = 0.0):  # fmt: skip
        times = builder.grid
        at = partial(variable_at, process, variable, reference=reference)
        x = at(times).tolist()
        self._through = [[interpolation_nodes(x, k, some) for some in each] for k, each in enumerate(sets)]
        self._mean, self._noise = builder.mean, noise
        self._covariance = reference.covariance(process, times)
        self._response = reference.response(process, times)
        self._back = reverse_transition(process, times[1:], times[:-1], noise, reference, builder.one)
        if not sets:
            return
        psi, scale, index = process.signal(times), kappa(process, times, reference), point_table(self._through)
        every = torch.arange(len(sets), device="cpu")
        held = (psi[1:] - self._back @ psi[:-1]).at(every)  # what a constant adds
        whole = held.at(every[:, None, None])
        weights = whole
        if reference or index.shape[2] > 1:
            kernel = partial(_kernel, process, noise, reference)
            weights = integrals(times, self._covariance.basis, at, kernel, index)
            if not reference:  # their sum is known exactly: keep the quadrature's rounding out of it
                weights = _completed(weights, whole, index)
        image = slice(1)  # answers are expected to have no velocity
        moved = -self._response.part(rows=image)
        self._by_set: list[tuple[list[tuple[Operator, Operator]], Operator]] = []
        for which, places in enumerate(index.clamp_min(0).unbind(1)):  # point by point, as all are large
            pairs, on_mean = [], held
            for n, at_point in enumerate(places.unbind(1)):
                on_answer = Operator(weights.coefficients[:, which, n], weights.basis) * scale[at_point]
                on_state = on_answer.part(columns=image) @ moved.at(at_point)
                pairs.append((on_answer, on_state))
                if self._mean.coefficients:
                    on_mean = on_mean - (on_answer + on_state @ psi.at(at_point))
            self._by_set.append((pairs, on_mean))

    def step(self, k: int, current: Handle, asked: Mapping[int, Handle], which: int = 0) -> Terms:
        """Return `u'` at time k + 1 from the state at k and the answers at the times of one of its sets."""
        by_point, on_mean = self._by_set[which]
        pairs = [(self._back[k], current.state)]
        if self._mean.coefficients:
            pairs.append((on_mean[k], self._mean))
        for j, (on_answer, on_state) in zip(self._through[k][which], by_point, strict=False):
            pairs += [(on_answer[k], asked[j].answer), (on_state[k], asked[j].state)]
        return combined(pairs)

    def denoised(self, k: int, current: Handle, asked: Handle) -> Terms:
        """Return the answer at time k, moved from the state that it was asked about to the present one."""
        response = self._response[k]
        return asked.answer + response @ (current.state - asked.state)

    def spread(self, k: int) -> Operator | None:
        """Return `N` of the step from k, or `None` without noise."""
        if not self._noise:
            return None
        return (self._covariance[k + 1] - self._back[k] @ self._covariance[k] @ self._back[k].T).cholesky()


def _completed(weights: Operator, whole: Operator, index: Tensor) -> Operator:
    """Return weights, the last of each set being what the others lack of a whole."""
    last = (index >= 0).sum(2, keepdim=True) - 1 == torch.arange(index.shape[2], device="cpu")
    last = last[(..., *[None] * (weights.coefficients.ndim - 3))]
    others = torch.where(last, 0.0, weights.coefficients)
    rest = whole.coefficients - others.sum(2, keepdim=True)
    return Operator(torch.where(last, rest, others), weights.basis)


def interpolation_nodes(x: Sequence[float], k: int, candidates: range) -> list[int]:
    """Select the answers that a polynomial in `x` can use in the step from k: those where x is finite and moves.

    Where there is no signal, x stands still or is infinite.
    """
    if not math.isfinite(x[k + 1]) or x[k + 1] == x[k]:
        return [k]
    return [j for j in candidates if math.isfinite(x[j]) and (j == len(x) - 1 or x[j] != x[j + 1])] or [k]


def kappa(process: Process, t: Tensor, reference: Gaussian) -> Tensor:
    """Return `sqrt(1 + snr_C)`, which scales the deviation from the reference to unit size; 1 for point data."""
    return (1 + reference.snr(process, t)).sqrt() if reference else torch.ones_like(t)


def _kernel(process: Process, noise: float, reference: Gaussian, tau: Tensor, end: Tensor) -> Operator:
    """`-Psi^(end, tau) c G G^T Sigma_0^-1 Psi / kappa`, for times that run backwards."""
    into, seen = process.on_answer(tau)  # -1/2 G G^T Sigma_0^-1 Psi, finite where there is no signal
    carried = reverse_transition(process, end, tau, noise, reference, into)
    return carried * ((1 + noise**2) / kappa(process, tau, reference)) @ seen
