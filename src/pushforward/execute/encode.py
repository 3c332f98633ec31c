r"""The noises behind images: a Gaussian code for any image, under any stochastic plan (DPM-Encoder).

The plan is run with an oracle that knows the clean image in the network's place. This draws a path of states from
`q(u_0 ... u_N | x)`, which fresh noise decides. Then each step is solved for the noise that makes the *network's* plan
pass through those states:

    xi_n = N_n^-1 (u_n - sum_j A_nj u_j - sum_j B_nj D_j),        D_j = E[u_0 | u_j].

All states are known beforehand, so all network calls are independent: they are one round, however many steps there
are. (Stages in between that ask the network about what it answered before take a round more each.) States drawn one by
one from `q(u_n | x)` in place of a joint path give the "edit-friendly" codes: noises of greater variance, correlated
from step to step, that hold more of the image.

References:
    Wu & De la Torre, arXiv 2210.05559, section 3.1 (DPM-Encoder); Huberman-Spiegelglas et al., arXiv 2304.06140,
    section 3 (independent states).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import check_start, combine, compiled
from pushforward.linear import apply_coefficients
from pushforward.plan import Plan, Register

__all__ = ["Encoded", "Solving", "Unmixing", "encode", "unmixed", "unmixing"]

_SINGULAR = 1e-9  # ratio of singular values below which a noise does not reach all directions
_REACHED = 1e-3  # part of a state that noise may fail to reach: rounding


@dataclass(frozen=True)
class Encoded:
    """What was found.

    Args:
        noises: noises of the nodes that take any, `(noises, batch, k * channels, *field)`.
        last: the state that the plan ends in with them, `(batch, k * channels, *field)`.
        rounds: batched network calls on the critical path.
        nfe: network evaluations per image.
    """

    noises: Tensor
    last: Tensor
    rounds: int
    nfe: int


@torch.no_grad()
def encode(
    plan: Plan,
    denoiser: Denoiser,
    clean: Tensor,
    *,
    start: Tensor,
    draw: Callable[[], Tensor],
    independent: bool = False,
    sequential: bool = False,
    rows: int = 64,
    callback: Callable[[int], None] | None = None,
) -> Encoded:
    """Return the noises with which a stochastic plan passes through states drawn around an image.

    Args:
        plan: explicit and stochastic, of any solver.
        denoiser: the network.
        clean: state at time 0 of the image, `(batch, k * channels, *field)`.
        start: first state of the plan, of `q(u_0 | x)`, like `clean`.
        draw: the next standard normal variable, shaped like `clean`.
        independent: draw the states of the chain independently given the image, not as a path.
        sequential: ask the network step after step, each time at the state that the plan reaches with the noises
            found so far: as many rounds as steps, and no rounding that adds up.
        rows: states that the network sees at a time.
        callback: told after every network call how many rows it had.

    Raises:
        PushforwardError: a deterministic or implicit plan, states of the wrong shape, or a plan whose noise does not
            reach the states.
    """
    check_start(plan, clean)
    if not set(plan.noises) & set(plan.steps):
        raise PushforwardError(
            f"The plan of {plan.solver!r} is deterministic and has no noises to find: raise its eta or noise, or "
            "invert it."
        )
    if plan.implicit:
        raise PushforwardError(f"The plan of {plan.solver!r} is implicit; only explicit plans can be encoded.")
    solving = Solving(plan, denoiser, clean, rows, callback)
    wanted, values = solving.path(clean, start, draw, independent=independent)
    rounds = solving.solve(wanted, values, sequential=sequential)
    if not all(bool(reached.all()) for reached in solving.reached.values()):
        raise PushforwardError(
            f"The noise of {plan.solver!r} does not reach all directions of a state, so its plan cannot be led through "
            "any states; end the grid at t_min, draw the states as a path, or take ddpm."
        )
    noises = torch.stack([solving.noises[k] for k in plan.noises])
    last = plan.basis.inverse(values[Register("state", len(plan.nodes) - 1)])
    return Encoded(noises, last, rounds, plan.nfe)


@dataclass(frozen=True)
class Unmixing:
    """How a noise is found again in what it does to a state.

    Args:
        inverse: the (pseudo-)inverse of its factor N, coefficients in the plan's basis.
        full: whether N reaches all directions.
        rank: number of directions that N reaches, of `k` at each frequency: `(*frequencies,)`.
        log_size: half the logarithm of the (pseudo-)determinant of N N^T, at each frequency.
    """

    inverse: Tensor
    full: bool
    rank: Tensor
    log_size: Tensor


def unmixing(plan: Plan, k: int) -> Unmixing:
    """Return the unmixing of the noise of node `k`, in float64."""
    factor = plan.nodes[k].terms[Register("noise", k)].lift(plan.basis).coefficients
    left, sizes, right = torch.linalg.svd(factor)
    reached = (sizes > _SINGULAR * sizes[..., :1]) & (sizes > 0)
    parts = torch.where(reached, 1 / sizes, 0.0)
    inverse = right.mT @ (parts[..., None] * left.mT)
    log_size = torch.where(reached, sizes, 1.0).log().sum(-1)
    return Unmixing(inverse, bool(reached.all()), reached.sum(-1), log_size)


def unmixed(plan: Plan, k: int, how: Unmixing, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noise of node `k` that closes a gap between states, in pixels, and whether it does, `(batch,)`.

    Args:
        plan: whose node it is.
        k: the node.
        how: its noise's.
        gap: `(batch, k * channels, *field)`, in the plan's basis.
    """
    frequencies = len(plan.basis.shape)
    noise = apply_coefficients(how.inverse.to(gap), gap, frequencies)
    closes = torch.ones(len(gap), dtype=torch.bool, device=gap.device)
    if not how.full:
        factor = plan.nodes[k].terms[Register("noise", k)].lift(plan.basis).coefficients.to(gap)
        left, size = (x.detach().flatten(1).abs().amax(1)
                      for x in (apply_coefficients(factor, noise, frequencies) - gap, gap))  # fmt: skip
        closes = left <= _REACHED * (1 + size)
    return plan.basis.inverse(noise), closes


class Solving:
    """The registers of a plan that is led through known states, in the basis where its coefficients are diagonal.

    Args:
        plan: explicit and stochastic.
        denoiser: the network.
        like: a state `(batch, k * channels, *field)`.
        rows: states that the network sees at a time.
        callback: told after every network call how many rows it had.

    Attributes:
        noises: what was found for each node that takes noise, in pixels.
        reached: whether it leads to the state that was wanted, `(batch,)` by node.
    """

    def __init__(
        self, plan: Plan, denoiser: Denoiser, like: Tensor, rows: int, callback: Callable[[int], None] | None = None
    ) -> None:
        self.plan, self.basis, self.rows, self.callback = plan, plan.basis, rows, callback
        self.like = like
        self.frequencies = len(self.basis.shape)
        self.asked = plan.asked
        self.place = {k: i for i, k in enumerate(self.asked)}
        self.ask = denoiser.at(plan.process, plan.asked_times, like)
        self.program, _ = compiled(plan, like)
        self.noises: dict[int, Tensor] = {}
        self.reached: dict[int, Tensor] = {}
        self.unmixings: dict[int, Unmixing] = {}
        self.fixed: dict[Register, Tensor] = {}
        if (mean := plan.mean_state(like[:1])) is not None:
            self.fixed[Register("mean", 0)] = self.basis.forward(mean).expand_as(like)

    def solve(
        self, wanted: dict[int, Tensor], values: dict[Register, Tensor], *, sequential: bool = False,
        among: Sequence[int] | None = None,
    ) -> int:  # fmt: skip
        """Find the noises, but those that are known, that lead through the wanted states; return the rounds.

        Args:
            wanted: states by node, in the plan's basis: the first one, and those of nodes whose noise is sought.
            values: what else is known; the states of all nodes are added.
            sequential: see `encode`.
            among: nodes whose noise is sought; all by default. The network is asked about what these need.
        """
        plan = self.plan
        states = {0: wanted[0]}
        if not sequential:
            states |= {k: wanted[k] for k in plan.noises if k not in self.noises}
        solve, ask = self._needed(range(len(plan.nodes)) if among is None else among, states)
        inverses = self.unmixings = {k: unmixing(plan, k) for k in plan.noises if k in solve - self.noises.keys()}
        values |= {Register("state", k): state for k, state in states.items()}
        rounds, answered, solved = 0, set[int](), {0}
        while not solve <= solved:
            ready = [k for k in self.asked if k in ask - answered and Register("state", k) in values]
            if ready:
                rounds += 1
                values |= self._answers(ready, values)
                answered.update(ready)
            for k in sorted(solve - solved):
                own = Register("noise", k)
                if any(r not in values and r != own for r, _ in self.program[k]):
                    continue
                if k in inverses:
                    rest = [(r, c) for r, c in self.program[k] if r != own]
                    gap = wanted[k] - combine(rest, values, self.frequencies)
                    self.noises[k], self.reached[k] = unmixed(plan, k, inverses[k], gap)
                    values[own] = self.basis.forward(self.noises[k])
                if k not in states:
                    values[Register("state", k)] = combine(self.program[k], values, self.frequencies)
                solved.add(k)
        return rounds

    def _needed(self, among: Iterable[int], known: Collection[int]) -> tuple[set[int], set[int]]:
        """Return the nodes to solve and those to ask for the noises of some, where the states of others are known."""
        solve, ask, left = set[int](), set[int](), [*among]
        while left:
            k = left.pop()
            if k in solve:
                continue
            solve.add(k)
            for r, _ in self.program[k]:
                if r.kind == "answer":
                    ask.add(r.node)
                if r.kind == "noise" or (r.kind != "mean" and r.node not in known):
                    left.append(r.node)
        return solve, ask

    def path(
        self, clean: Tensor, start: Tensor, draw: Callable[[], Tensor], *, independent: bool
    ) -> tuple[dict[int, Tensor], dict[Register, Tensor]]:
        """Draw states by the oracle's plan, or one by one; and return what the network's has of noise and mean."""
        plan, values, chain = self.plan, dict(self.fixed), set(self.plan.steps)
        times = plan.node_times
        signal = plan.process.signal(times)
        spread = plan.process.covariance(times).cholesky()
        values |= {Register("answer", k): self.basis.forward(clean) for k in self.asked}

        def marginal(k: int) -> Tensor:
            return self.basis.forward(signal[k](self.like) + spread[k](draw().to(self.like)))

        wanted = {0: self.basis.forward(start)}
        values[Register("state", 0)] = wanted[0]
        drawn = {register: value for register, value in values.items() if register.kind == "mean"}
        for k in range(1, len(plan.nodes)):
            own = Register("noise", k)
            if independent and k in chain and k in plan.noises:
                wanted[k] = marginal(k)
            else:
                if k in plan.noises:
                    noise = draw().to(self.like)
                    values[own] = self.basis.forward(noise)
                    if k not in chain:
                        self.noises[k], drawn[own] = noise, values[own]
                wanted[k] = combine(self.program[k], values, self.frequencies)
            values[Register("state", k)] = wanted[k]
        return wanted, drawn

    def _answers(self, nodes: list[int], values: dict[Register, Tensor]) -> dict[Register, Tensor]:
        """Return the network's answers to the states of some nodes, in pieces."""
        batch = len(self.like)
        states = torch.cat([values[Register("state", k)] for k in nodes])
        which = torch.tensor([self.place[k] for k in nodes], device="cpu").repeat_interleave(batch)
        images = torch.arange(batch, device=self.like.device).repeat(len(nodes))
        pieces = []
        for first in range(0, len(states), self.rows):
            some = slice(first, first + self.rows)
            u = self.basis.inverse(states[some])
            pieces.append(self.basis.forward(self.ask(which[some], u, images[some])))
            if self.callback is not None:
                self.callback(len(u))
        answers = torch.cat(pieces).split(batch)
        return {Register("answer", k): answer for k, answer in zip(nodes, answers, strict=True)}
