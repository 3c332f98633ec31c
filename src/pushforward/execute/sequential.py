"""Run a plan one node after another; nodes that do not depend on one another's answers are asked in one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import Diverged, PushforwardError
from pushforward.linear import apply_coefficients
from pushforward.plan import Plan, Register

Noise = Callable[[int], Tensor]
Seen = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]  # what a walk is told of a state; see `steps`


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every network call; of nodes that are asked together, of one after another.

    Args:
        done: nodes asked so far.
        total: in all.
        time: where the state lives; on average, where every image has a time of its own.
        state: in pixels, `(batch, k * channels, *field)`.
        denoised: the network's answer there, of the same shape.
        nfe: network evaluations about this node: images that were asked about.
        call: which of the plan's nodes that ask it is, counted from 0.
    """

    done: int
    total: int
    time: float
    state: Tensor
    denoised: Tensor
    nfe: int
    call: int = 0


def run(
    plan: Plan,
    denoiser: Denoiser,
    start: Tensor,
    *,
    noise: Noise | None = None,
    record: Callable[[int, Tensor], None] | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Return the last state of `plan` from its first.

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
    asked, done = plan.asked_times, 0
    place = {k: i for i, k in enumerate(plan.asked)}
    walk = _walk(plan, start, noise, record, together=True)
    nodes, states = next(walk)
    ask = denoiser.at(plan.process, asked, start)
    while nodes:
        calls = [place[k] for k in nodes]
        answers = _asked(ask, calls, states)
        for i, state, answer in zip(calls, states, answers, strict=True):
            done += 1
            if callback is not None:
                callback(Progress(done, len(asked), float(asked[i]), state, answer, len(state), i))
        nodes, states = walk.send(list(zip(states, answers, strict=True)))
    return states[0]


def _asked(ask: Ask, calls: Sequence[int], states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the answers about the states of some calls, in one network call."""
    if len(calls) == 1:
        return [ask(calls[0], states[0])]
    batch = len(states[0])
    which = torch.tensor(calls, device=states[0].device).repeat_interleave(batch)
    images = torch.arange(batch, device=states[0].device).repeat(len(calls))
    answers: Sequence[Tensor] = ask(which, torch.cat(list(states)), images).split(batch)
    return answers


def steps(plan: Plan, start: Tensor, *, noise: Noise | None = None) -> Generator[Tensor, Seen, None]:
    """Leave the network to the caller: yield the states that the plan asks about, in order, then its last state.

    For each state `u` the generator is sent `(u, answer)`, by `walk.send`. Another state in the place of `u` is taken
    for the plan's own from there on (so may some pixels be held at what is known of them). Sent `(u, answer, rows)`, it
    goes on with the images `rows (batch,)` in the places of all, with all that is known of them.

    Args:
        plan: coefficients.
        start: first state, `(batch, k * channels, *field)`.
        noise: as in `run`.

    Raises:
        PushforwardError: as in `run`.
    """
    walk = _walk(plan, start, noise, None, together=False)
    nodes, (state,) = next(walk)
    while nodes:
        seen = yield state
        nodes, (state,) = walk.send([seen])
    yield state


def _walk(
    plan: Plan, start: Tensor, noise: Noise | None, record: Callable[[int, Tensor], None] | None, *, together: bool
) -> Generator[tuple[list[int], list[Tensor]], Sequence[Seen], None]:
    """Yield nodes that ask, one by one or wave by wave, with their states; at last no node, with the last state."""
    if plan.implicit:
        raise PushforwardError(
            f"The plan of {plan.solver!r} is implicit, each state depending on later ones: run it with parallel=... ."
        )
    check_start(plan, start)
    if plan.noises and noise is None:
        raise PushforwardError(f"The plan of {plan.solver!r} is stochastic: give `noise`.")
    basis, last, end = plan.basis, len(plan.nodes) - 1, start
    waves = plan.waves if together else [(k,) for k in range(last + 1)]
    program, last_used = compiled(plan, start, [k for wave in waves for k in wave])
    drawn = _in_order(plan, noise, start)
    values: dict[Register, Tensor] = {}
    if (mean := plan.mean_state(start[:1])) is not None:
        values[Register("mean", 0)] = basis.forward(mean).expand_as(start)
    for wave in waves:
        asking: dict[int, Tensor] = {}
        for k in wave:
            if k == 0:
                state = basis.forward(start)
            else:
                noisy = any(register == ("noise", k) for register, _ in program[k])
                if noisy:
                    values[Register("noise", k)] = basis.forward(drawn(k))
                state = combine(program[k], values, len(basis.shape))
                if noisy and record is not None:
                    record(k, basis.inverse(state))
            values[Register("state", k)] = state
            if plan.nodes[k].asks:
                asking[k] = basis.inverse(state)
        if asking:
            told = yield list(asking), list(asking.values())
            for (k, pixels), (seen, answer, *rows) in zip(asking.items(), told, strict=True):
                values[Register("answer", k)] = basis.forward(answer)
                if seen is not pixels:
                    values[Register("state", k)] = basis.forward(seen)
                for some in rows:
                    values = {register: value[some.to(value.device)] for register, value in values.items()}
        if last in wave:
            end = values[Register("state", last)]
        for k in wave:
            for register in last_used[k]:
                values.pop(register, None)
    result = basis.inverse(end)
    if not bool(result.isfinite().all()):
        raise Diverged(
            f"Sampling with {plan.solver!r} diverged: the result is not finite. Use more steps, or check the network."
        )
    yield [], [result]


def _in_order(plan: Plan, noise: Noise | None, like: Tensor) -> Noise:
    """Return the same noises, which are drawn in the order of their nodes in whichever order they are asked for."""
    waiting, ready = iter(plan.noises if noise is not None else ()), dict[int, Tensor]()

    def drawn(k: int) -> Tensor:
        while k not in ready:
            n = next(waiting)
            assert noise is not None  # or there are no nodes that take any
            ready[n] = noise(n).to(like)
        return ready.pop(k)

    return drawn


def check_start(plan: Plan, start: Tensor) -> None:
    """Raise unless `start` can be a state of the plan's process."""
    blocks, field = plan.process.blocks, plan.basis.shape
    if start.ndim < 2 or start.shape[1] % blocks or (field and tuple(start.shape[2:]) != field):
        raise PushforwardError(
            f"A state of process {plan.process.name!r} has shape (batch, {blocks} x channels, "
            f"{', '.join(map(str, field)) or '*field'}); got {tuple(start.shape)}."
        )


def combine(terms: list[tuple[Register, float | Tensor]], values: dict[Register, Tensor], frequencies: int) -> Tensor:
    """Return a node's state from what it refers to, in the coordinates where the plan is diagonal."""
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


def compiled(
    plan: Plan, like: Tensor, order: Sequence[int] | None = None
) -> tuple[list[list[tuple[Register, float | Tensor]]], list[list[Register]]]:
    """Return coefficients as numbers or tensors of the states' dtype, and the registers last used at each node.

    Nodes are made in the given order, by default their own.
    """
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
    for k in order or range(len(program)):
        final[Register("state", k)] = k
        final[Register("answer", k)] = k
        for register, _ in program[k]:
            final[register] = k
    last_used: list[list[Register]] = [[] for _ in plan.nodes]
    for register, k in final.items():
        if register.kind != "mean":
            last_used[k].append(register)
    return program, last_used
