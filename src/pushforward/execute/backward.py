r"""Two-step plans run backwards by algebra, and the plain inversion of one-step plans that is not quite an inverse.

A plan whose rows are

    u_{n+1} = a_n u_{n-1} + b_n u_n + c_n D(u_n, t_n),      a_n invertible,

(`plan.reversible`) asks the network about the state between the two that a row joins, and so is solved for either:

    u_{n-1} = a_n^-1 (u_{n+1} - b_n u_n - c_n D(u_n, t_n)).

What goes forwards and backwards is a *pair* of states next to each other. The inverse is exact but for rounding, and
rounding grows with the product of the `a_n^-1`: by 2 per step for BDIA with gamma = 1/2, and in all by `(q_1 / q_N)^2`
for O-BELM, q the length of a step in noise, `alpha |d(sigma / alpha)|`. Where that is too much for float32, hold the
states in float64 and ask the network in float32 (`network_dtype`): that costs no more network time, and the network is
asked about the same rounded states both ways.

`predicted_inversion` is nearer by an order, at one call more; and with the `residual_inversion` of a plain one, the
plan comes back exactly.

References:
    BELM, Wang et al., arXiv 2410.07273 (bidirectional explicit rows); DDIM, Song et al., arXiv 2010.02502, section 4.3
    (`naive_inversion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import check_start
from pushforward.linear import Gaussian, Operator, ScaledProcess, root
from pushforward.plan import Plan, Register, ddim


def backward(
    plan: Plan, denoiser: Denoiser, last: Tensor, before_last: Tensor, *, network_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Find the first two states of a reversible plan from its last two, with one network call per row.

    Args:
        plan: of `o_belm`, `bdia`, or any other with rows as in the module's docstring.
        denoiser: the network.
        last: state `(batch, k * channels, *field)`.
        before_last: the state before it, of the same shape; `end_pair` makes it for an image.
        network_dtype: that of the states the network is asked about, by default `last`'s.

    Returns:
        `(first, second)`, shaped like `last`.

    Raises:
        PushforwardError: a plan with other rows, states of the wrong shape, or a result that is not finite.
    """
    rows = _rows(plan, 2)
    after, current, answer = _prepared(plan, denoiser, last, before_last, network_dtype)
    for n in reversed(range(1, len(plan.nodes) - 1)):
        a, b, c = rows[n - 1]
        rest = after - b.apply(current) - c.apply(answer(n, current))
        after, current = current, a.inverse().apply(rest)
    return _pixels(plan, current, after)


def forward(
    plan: Plan, denoiser: Denoiser, first: Tensor, second: Tensor, *, network_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Run a reversible plan from its first two states to `(before_last, last)`: `execute.run` with the second given.

    Args and errors are those of `backward`, whose exact inverse this is.
    """
    rows = _rows(plan, 2)
    before, current, answer = _prepared(plan, denoiser, first, second, network_dtype)
    for n in range(1, len(plan.nodes) - 1):
        a, b, c = rows[n - 1]
        before, current = current, a.apply(before) + b.apply(current) + c.apply(answer(n, current))
    return _pixels(plan, before, current)


def end_pair(
    plan: Plan, denoiser: Denoiser, end: Tensor, *, network_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return `(last, before_last)` for a given last state, such as an image: one step of the naive inversion of DDIM.

    `forward` comes back to `end` exactly from whatever `backward` makes of them, so keep both first states. How far the
    pair is off a path of the plan's own grows as rounding does: BDIA with gamma < 1 ends far outside the noise.
    """
    last_step = ddim(plan.process, plan.times[-2:])
    return end, naive_inversion(last_step, denoiser, end, network_dtype=network_dtype)


def naive_inversion(
    plan: Plan,
    denoiser: Denoiser,
    end: Tensor,
    *,
    asked: Literal["own", "target"] = "own",
    network_dtype: torch.dtype | None = None,
) -> Tensor:
    """Find a one-step plan's first state, nearly, from its last by the field's plain inversion, one call per step.

    A row `u_{n+1} = a u_n + b D(u_n, t_n)` is solved for u_n with the answer at the known state, `D(u_{n+1}, t_{n+1})`.
    The error is of first order in the steps. Where the network cannot be asked, at times below `process.t_min`, the row
    is taken to be DDIM's and solved with the noise prediction at `(u_{n+1}, t_n)` instead; `asked="target"` does so in
    every row, as `diffusers`' DDIMInverseScheduler is used (on Langevin diffusions that is ten times as far off).

    Args:
        plan: deterministic, each state of the one before and its answer: `ddim`, `gddim(order=0)`, Euler.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.
        asked: at the known state's own time, or at the time of the state sought.
        network_dtype: that of the states the network is asked about, by default `end`'s.

    Raises:
        PushforwardError: a plan with other rows, a state of the wrong shape, or a result that is not finite.
    """
    current, _, answer = _prepared(plan, denoiser, end, end, network_dtype)
    for state, _ in _naive_path(plan, current, answer, asked):
        current = state
    return _pixels(plan, current, current)[0]


def residual_inversion(plan: Plan, denoiser: Denoiser, end: Tensor) -> tuple[Tensor, Tensor]:
    """Find the plain inversion's path and the residuals with which the plan follows it, exactly and at no more calls.

    The residual of a row is `u_{n+1} - a u_n - b D(u_n, t_n)`. The plain inversion has asked for all these answers but
    that about the first state.

    Args:
        plan: as for `naive_inversion`.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.

    Returns:
        The first state, shaped like `end`, and the residuals, `(steps, *end.shape)`, the noises of `with_residuals`.

    Raises:
        PushforwardError: as `naive_inversion`.

    References:
        Direct Inversion, Ju et al., arXiv 2310.01506, section 4; DirectEdit, arXiv 2605.02417.
    """
    last, _, answer = _prepared(plan, denoiser, end, end, None)
    states, answers = zip(*reversed(list(_naive_path(plan, last, answer))), strict=True)
    rows = _rows(plan, 1, invertible=[False] * (len(states) - 1))
    residuals = [
        states[n + 1] - a.apply(states[n]) - b.apply(answer(n, states[n]) if answers[n] is None else answers[n])
        for n, (a, _, b) in enumerate(rows)
    ]
    first, residual = _pixels(plan, states[0], torch.cat(residuals))
    return first, residual.unflatten(0, (len(residuals), len(end)))


def predicted_inversion(plan: Plan, denoiser: Denoiser, end: Tensor) -> Tensor:
    """Find a one-step plan's first state, nearly, from its last by one call per step, about where the step will lead.

    A row `u_{n+1} = a u_n + b D(u_n, t_n)` is followed back with the direction that was found last, to a guess; then
    again with the direction at the guess. This is one round of the fixed point for the exact inverse, from a beginning
    that is right to second order in the step: a row's error is of third order, where the plain inversion's is of
    second. One more call, about the last state, begins it. Directions are velocities in the units of flow matching, as
    in the paper, or of the root of data of unit variance where the process is not scalar.

    Args:
        plan: as for `naive_inversion`, ending above time 0.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.

    Raises:
        PushforwardError: a plan with other rows, a state of the wrong shape, or a result that is not finite.

    References:
        UniEdit-Flow, Jiao et al., arXiv 2504.13109 (Uni-Inv).
    """
    rows, process, times = _rows(plan, 1), plan.process, plan.node_times
    units = root(process, times, Gaussian(1.0))
    if isinstance(process, ScaledProcess) and not process.basis.shape:
        units = Operator.scalar(torch.stack(process.alpha_sigma(times)).sum(0))
    current, _, answer = _prepared(plan, denoiser, end, end, None)
    guess, latest = current, answer(len(rows), current)
    for n, (a, _, b) in reversed(list(enumerate(rows))):
        ahead = units[n] @ units[n + 1].inverse()
        back = a.inverse().apply(current - b.apply(latest))
        guess = back + (a.inverse() - ahead).apply(guess - current)
        latest = answer(n, guess)
        current = guess + ahead.apply(current - a.apply(guess) - b.apply(latest))
    return _pixels(plan, current, current)[0]


def _naive_path(
    plan: Plan,
    current: Tensor,
    answer: Callable[[int, Tensor], Tensor],
    asked: Literal["own", "target"] = "own",
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Every state of the plain inversion from the last on, and the answer about it if it was asked about."""
    process, times = plan.process, plan.node_times
    late = [asked == "target" or float(t) < process.t_min * (1 - 1e-9) for t in times]
    rows = _rows(plan, 1, invertible=[not x for x in late[1:]])
    zero = torch.zeros_like(times)
    psi, factor = process.transition(times, zero), root(process, times)
    ahead = process.transition(times[:-1], times[1:])
    for n in reversed(range(len(plan.nodes) - 1)):
        if late[n + 1]:
            yield current, None
            eps = factor[n].inverse().apply(current - psi[n].apply(answer(n, current)))
            current = ahead[n].apply(current) + (factor[n] - ahead[n] @ factor[n + 1]).apply(eps)
        else:
            a, _, b = rows[n]
            known = answer(n + 1, current)
            yield current, known
            current = a.inverse().apply(current - b.apply(known))
    yield current, None


def one_step_rows(plan: Plan) -> list[tuple[Operator, Operator]] | None:
    """Return `a, b` of every row `u_{n+1} = a u_n + b D(u_n, t_n)`, or `None` for a plan that has others."""
    try:
        return [(a, b) for a, _, b in _rows(plan, 1)]
    except PushforwardError:
        return None


def _rows(plan: Plan, steps: int, invertible: list[bool] | None = None) -> list[tuple[Operator, Operator, Operator]]:
    """Return `a, b, c` of the rows from node `steps` on, `a` multiplying the state `steps` before it.

    Raises:
        PushforwardError: a row has other terms, or an `a` that has to be inverted is singular.
    """
    nothing = Operator.scalar(0.0, plan.process.blocks)
    rows = []
    for i, node in enumerate(plan.nodes[steps:]):
        registers = [Register("state", i), Register("state", i + steps - 1), Register("answer", i + steps - 1)]
        a, b, c = (node.terms.get(register, nothing) for register in registers)
        solvable = (invertible is not None and not invertible[i]) or a.inverse().is_finite()
        if not set(node.terms) <= set(registers) or not solvable:
            wanted = "two states before it and the last answer" if steps == 2 else "state before it and its answer"
            known = "o-belm or bdia" if steps == 2 else "ddim"
            raise PushforwardError(
                f"The plan of {plan.solver!r} cannot be solved backwards row by row: its state at t = {node.time:.4g} "
                f"is not made of the {wanted} alone, with a coefficient that has an inverse; use {known}."
            )
        rows.append((a, b, c))
    return rows


def _prepared(
    plan: Plan, denoiser: Denoiser, one: Tensor, other: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Callable[[int, Tensor], Tensor]]:
    """Return two states in the plan's coordinates, and `(n, coordinates) -> the answer's` at node n's time."""
    for state in (one, other):
        check_start(plan, state)
    if one.shape != other.shape or one.dtype != other.dtype:
        raise PushforwardError(
            f"The two states of a pair must have one shape and dtype; got {tuple(one.shape)}, {one.dtype} and "
            f"{tuple(other.shape)}, {other.dtype}."
        )
    basis, dtype = plan.basis, dtype or one.dtype
    times = plan.node_times
    times = torch.where(
        times > 0, times, plan.process.t_min
    )  # a network is never asked at 0, nor can be prepared for it
    ask = denoiser.at(plan.process, times, one.to(dtype))

    def answer(n: int, v: Tensor) -> Tensor:
        return basis.forward(ask(n, basis.inverse(v).to(dtype)).to(v))

    return basis.forward(one), basis.forward(other), answer


def _pixels(plan: Plan, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(one.isfinite().all() & other.isfinite().all()):
        raise PushforwardError(
            f"Running {plan.solver!r} row by row diverged: the result is not finite. Use float64 states or more steps."
        )
    return plan.basis.inverse(one), plan.basis.inverse(other)
