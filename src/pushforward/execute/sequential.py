"""Run a plan one node after another."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import Diverged, PushforwardError
from pushforward.linear import apply_coefficients
from pushforward.plan import Plan, Register

Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every network call.

    Args:
        done: network calls so far.
        total: in all.
        time: where the state lives; on average, where every image has a time of its own.
        state: in pixels, `(batch, k * channels, *field)`.
        denoised: the network's answer there, of the same shape.
        nfe: network evaluations of this call: images that were asked about.
    """

    done: int
    total: int
    time: float
    state: Tensor
    denoised: Tensor
    nfe: int


def run(
    plan: Plan,
    denoiser: Denoiser,
    start: Tensor,
    *,
    noise: Noise | None = None,
    record: Callable[[int, Tensor], None] | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """The last state of `plan` from its first.

    The recurrence is worked in the coordinates where the plan's coefficients are diagonal; registers are dropped after
    their last use, so memory is that of the solver's history. Differentiable in `start`, noise and network.

    Args:
        plan: coefficients.
        denoiser: the network.
        start: first state, `(batch, k * channels, *field)`.
        noise: `n -> xi_n`, a standard normal shaped like `start`, for each node of `plan.noises`, asked in order.
        record: told the number and the state of every node that takes noise.
        callback: told after every network call.

    Returns:
        The last state, shaped like `start`.

    Raises:
        PushforwardError: no noise for a stochastic plan, a start of the wrong shape, an implicit plan, or a state that
            is not finite.
    """
    asked = plan.asked_times
    walk = steps(plan, start, noise=noise, record=record)
    state = next(walk)
    ask = denoiser.at(plan.process, asked, start)
    for i, time in enumerate(asked.tolist()):
        answer = ask(i, state)
        if callback is not None:
            callback(Progress(i + 1, len(asked), time, state, answer, len(state)))
        state = walk.send((state, answer))
    return state


def steps(
    plan: Plan, start: Tensor, *, noise: Noise | None = None, record: Callable[[int, Tensor], None] | None = None
) -> Generator[Tensor, tuple[Tensor, Tensor], None]:
    """`run` with the network left to the caller: the states that the plan asks about, in order, then its last state.

    For each state `u` the generator is sent `(u, answer)`, by `walk.send`. Another state in the place of `u` is taken
    for the plan's own from there on (so may some pixels be held at what is known of them).

    Args:
        plan: coefficients.
        start: first state, `(batch, k * channels, *field)`.
        noise: as in `run`.
        record: as in `run`.

    Raises:
        PushforwardError: as in `run`.
    """
    if plan.implicit:
        raise PushforwardError(
            f"The plan of {plan.solver!r} is implicit, each state depending on later ones: run it with parallel=... ."
        )
    check_start(plan, start)
    if plan.noises and noise is None:
        raise PushforwardError(f"The plan of {plan.solver!r} is stochastic: give `noise`.")
    basis = plan.basis
    program = compiled(plan, start)
    values: dict[Register, Tensor] = {}
    if (mean := plan.mean_state(start[:1])) is not None:
        values[Register("mean", 0)] = basis.forward(mean).expand_as(start)
    state = basis.forward(start)
    for k, (node, terms, last_used) in enumerate(zip(plan.nodes, *program, strict=True)):
        if k > 0:
            noisy = noise is not None and any(register == ("noise", k) for register, _ in terms)
            if noise is not None and noisy:
                values[Register("noise", k)] = basis.forward(noise(k).to(start))
            state = combine(terms, values, len(basis.shape))
            if noisy and record is not None:
                record(k, basis.inverse(state))
        values[Register("state", k)] = state
        if node.asks:
            pixels = basis.inverse(state)
            seen, answer = yield pixels
            values[Register("answer", k)] = basis.forward(answer)
            if seen is not pixels:
                state = values[Register("state", k)] = basis.forward(seen)
        for register in last_used:
            values.pop(register, None)
    result = basis.inverse(state)
    if not bool(result.isfinite().all()):
        raise Diverged(
            f"Sampling with {plan.solver!r} diverged: the result is not finite. Use more steps, or check the network."
        )
    yield result


def check_start(plan: Plan, start: Tensor) -> None:
    """Raise unless `start` can be a state of the plan's process."""
    blocks, field = plan.process.blocks, plan.basis.shape
    if start.ndim < 2 or start.shape[1] % blocks or (field and tuple(start.shape[2:]) != field):
        raise PushforwardError(
            f"A state of process {plan.process.name!r} has shape (batch, {blocks} x channels, "
            f"{', '.join(map(str, field)) or '*field'}); got {tuple(start.shape)}."
        )


def combine(terms: list[tuple[Register, float | Tensor]], values: dict[Register, Tensor], frequencies: int) -> Tensor:
    """A node's state from what it refers to, in the coordinates where the plan is diagonal."""
    total: Tensor | None = None
    for register, coefficient in terms:
        value = values[register]
        if isinstance(coefficient, float):
            total = coefficient * value if total is None else torch.add(total, value, alpha=coefficient)
        elif total is None:
            total = apply_coefficients(coefficient, value, frequencies)
        elif coefficient.shape[-1] == 1:
            total = torch.addcmul(total, coefficient[..., 0, 0], value)
        elif not frequencies:  # one block for all pixels
            k, batch = coefficient.shape[-1], len(value)
            fields = (x.reshape(batch, k, -1) for x in (total, value))
            total = torch.baddbmm(next(fields), coefficient.expand(batch, k, k), next(fields)).view_as(value)
        else:
            total = total + apply_coefficients(coefficient, value, frequencies)
    if total is None:
        raise PushforwardError("A node of the plan has no terms.")
    return total


def compiled(plan: Plan, like: Tensor) -> tuple[list[list[tuple[Register, float | Tensor]]], list[list[Register]]]:
    """Coefficients as numbers or tensors of the states' dtype, and the registers last used at each node."""
    basis, plain = plan.basis, plan.process.blocks == 1 and not plan.basis.shape
    flat = [o for node in plan.nodes for o in node.terms.values()]
    fits = True
    if plain:
        numbers = [float(o.coefficients) for o in flat]
        fits = max(map(abs, numbers), default=0.0) <= torch.finfo(like.dtype).max
        values: list[float | Tensor] = [*numbers]
    elif flat:
        full = (*basis.shape, plan.process.blocks, plan.process.blocks)
        table = torch.stack([o.lift(basis).coefficients.expand(full) for o in flat]).to(like.dtype)
        fits = bool(table.isfinite().all())
        values = list(table.to(like.device))
    else:
        values = []
    if not fits:
        raise Diverged(
            f"The plan of {plan.solver!r} has coefficients beyond {like.dtype}; start its grid where there is signal."
        )
    coefficients = iter(values)
    program = [[(register, next(coefficients)) for register in node.terms] for node in plan.nodes]
    final: dict[Register, int] = {}
    for k, terms in enumerate(program):
        final[Register("state", k)] = k
        final[Register("answer", k)] = k
        for register, _ in terms:
            final[register] = k
    last_used: list[list[Register]] = [[] for _ in plan.nodes]
    for register, k in final.items():
        if register.kind != "mean":
            last_used[k].append(register)
    return program, last_used
