"""The states of all nodes as a fixed point: forwards, as a sampler runs, and backwards, from a given last state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.execute.coarse import Coarse
from pushforward.execute.convergence import Convergence, Moves
from pushforward.execute.remainder import LINEAR, Remainder, amplification, roundoff, tail
from pushforward.execute.system import System, root_mean_square

SETTLED = 0.1  # steps are settled as long as what all of them leave is below this part of the tolerance
RELEVANT = 0.5  # what is left is not worth a round when it is below this part of the rounding
SLOW = (0.75, 0.9)  # between these the rate of an inversion is believed
COARSE = 1.0  # deviations; moves as large are rounded in digits that matter


@dataclass(eq=False)
class _Stack:
    """States and answers, and the network that gives these.

    Args:
        system: the plan's.
        denoiser: the network.
        like: a batch of states.
        values: the states, a stack as in `System`; changed in place.
        answers: a stack as in `System`; changed in place.
        constant: a stack as in `System`.
        tolerance: error allowed in an image.
        max_rows: most states in one network call.
        coarse: calls whose answers tell those of all, in rounds that ask no others.
    """

    system: System
    denoiser: Denoiser
    like: Tensor
    values: Tensor
    answers: Tensor
    constant: Tensor
    tolerance: float
    max_rows: int | None
    coarse: Coarse | None = None

    def __post_init__(self) -> None:
        plan, device = self.system.plan, self.like.device
        self._ask: Ask = self.denoiser.at(plan.process, plan.asked_times, self.like)
        self._nodes = torch.tensor(self.system.asked, device=device)
        self._every = torch.arange(self.system.size, device=device)[:, None]
        self._inferred = torch.zeros(self.system.size, len(self.like), device="cpu").to(self.like)

    def ask(self, wanted: Tensor, inferred: Tensor | None) -> None:
        """Put answers into the stack where `wanted (calls, batch)`, and note how far they are off what stood there.

        Those `inferred`, likewise, are moved as the coarse ones tell, which counts with what they are off later.
        """
        lanes, coarse = self.system.lanes(self.answers), self.coarse if inferred is not None else None
        before = None if coarse is None else lanes[self._nodes[coarse.calls]]
        k, image = wanted.nonzero(as_tuple=True)
        at, changed = self._nodes[k], []
        for some, nodes, images in zip(*(x.split(self.max_rows or len(k)) for x in (k, at, image)), strict=True):
            answers = self._ask(some, self.system.taken(self.values, nodes, images), images)
            changed.append(self.system.put(answers, self.answers, nodes, images))
        self._off = torch.zeros_like(self._inferred)
        self._off[at, image] = torch.cat(changed) + self._inferred[at, image]
        self._inferred[at, image] = 0.0
        if coarse is None or before is None or inferred is None:
            return
        surprises = (lanes[self._nodes[coarse.calls]] - before).flatten(1)
        for some in torch.arange(len(inferred), device=k.device).split(len(before)):
            at, moved = self._nodes[some], (coarse.weights[some] @ surprises).view(-1, *before.shape[1:])
            moved *= inferred[some][:, None, :, None, None]
            lanes[at] += moved
            self._inferred[at] += root_mean_square(moved.mul_(self.system.weight[at]), 1, 3, 4)

    def _go(self, stack: Tensor) -> None:
        """Move the states, and let the answers follow as they are expected to."""
        self.values += stack
        self.system.respond(stack, self.answers)


class Forwards(_Stack):
    """The first state is given. What is left of the error is the `Remainder`'s to say."""

    backwards = False

    def __post_init__(self) -> None:
        super().__post_init__()
        like = self.like
        self._remainder = Remainder(self.system, len(like), roundoff(self.denoiser, like))
        self._enough = min(self.tolerance, LINEAR)
        self._seen = torch.zeros(len(like), dtype=torch.bool, device=like.device)  # the last call was made
        self._first = 1

    def ask(self, wanted: Tensor, inferred: Tensor | None) -> None:
        """Put answers into the stack, and note of whom."""
        super().ask(wanted, inferred)
        self._wanted, self._seen, self._thin = wanted, self._seen | wanted[-1], inferred is not None

    def moves(self, state: Convergence) -> Moves:
        """Return what the linear system asks for; nodes up to the least exact one stay."""
        self._first = 1 if state.whole else 1 + self.system.asked[state.rounds - 1]  # one more is exact each round
        stack = self._corrected()
        sizes = self.system.sizes(stack)
        own = self.system.sizes(self.answers)
        self._floor, self._surprise = (x.to(own) for x in self._remainder.asked(self._wanted, self._off, own, sizes))
        return Moves(stack, sizes, sizes.amax(0))

    def settled(self, state: Convergence, moves: Moves) -> Tensor:
        """Return leading calls that together leave little; the last one is asked until it is exact."""
        parts = self._remainder.reach().to(moves.sizes) * self.system.relative(self.values)
        settled = (parts.cumsum(0) <= SETTLED * self._enough).long().cumprod(0).sum(0)
        return settled.clamp_max(len(state.rank) - 1)

    def free(self, state: Convergence) -> Tensor:
        """Return nodes after the first call that is not settled."""
        if state.whole:
            return (self._every > 0).expand(-1, len(state.active))
        count = len(state.rank)
        return (self._every > self._nodes[state.frontier.clamp_max(count - 1)]) & (state.frontier < count)

    def move(self, state: Convergence, moves: Moves, stack: Tensor, unexplained: Tensor) -> Tensor:
        """Move, and solve once more for what is final now where large moves were rounded."""
        self._moved, self._unexplained = self.system.sizes(stack), unexplained
        self._go(stack)
        if not state.whole and bool((moves.largest > COARSE).any()):
            last = torch.cat([self._nodes, self._every[-1]])  # nodes up to the first to ask that is not exact yet
            final = (self._every <= last[state.exact]) & state.going
            again = self._corrected()
            self.system.by_image(again).masked_fill_(~final[None, :, None, :, None], 0.0)
            self.values += again
            stack = again.add_(stack)
        return stack

    def left(self, state: Convergence, moves: Moves) -> tuple[Tensor, Tensor]:
        """Return the larger of the remainder's two readings, and the rounding."""
        system, count = self.system, len(state.rank)
        relative = system.relative(self.values)
        sizes = (moves.sizes - self._floor).clamp_min(0)
        state.shrinking.append(torch.maximum(sizes[:-1].amax(0), sizes[-1] * relative))
        left, rounding = tail(state.shrinking, self._surprise * relative), self._floor[-1] * relative
        if not state.whole:
            chain = self._remainder.moved(self._moved, self._unexplained)
            chain = chain.to(left) * relative
            if not self._thin:  # else most gains are unknown
                left = torch.where(state.exact >= count, chain, torch.maximum(chain, left))
        estimate = left + rounding * amplification(state.shrinking, rounding)
        done = ((estimate <= self._enough) | (left <= RELEVANT * rounding)) & self._seen
        return estimate, done if state.whole else done | (state.exact >= count)

    def _corrected(self) -> Tensor:
        residual = self.system.residual(self.values, self.answers, self.constant, self._first)
        return self.system.correct(residual, self._first, in_place=True)


class Backwards(_Stack):
    """The last state is given, and the first sought.

    No prefix settles, and errors are measured in the last state that running forwards would give.
    """

    backwards = True

    def moves(self, state: Convergence) -> Moves:  # noqa: ARG002 - the protocol's arguments
        """Return what the linear system asks for with the last state held."""
        stack = self.system.residual(self.values, self.answers, self.constant)
        stack = self.system.correct(stack, in_place=True)
        largest = self.system.unpack(stack[:, -1:])[0].flatten(1).abs().amax(1)
        stack = self.system.hold_end(stack)
        return Moves(stack, self.system.sizes(stack), largest)

    def settled(self, state: Convergence, moves: Moves) -> Tensor:  # noqa: ARG002
        """None."""
        return torch.zeros_like(state.exact)

    def free(self, state: Convergence) -> Tensor:
        """Return all but the last node."""
        return (self._every < self._every[-1]).expand(-1, len(state.active))

    def move(self, state: Convergence, moves: Moves, stack: Tensor, unexplained: Tensor) -> Tensor:  # noqa: ARG002
        """Move."""
        self._go(stack)
        return stack

    def left(self, state: Convergence, moves: Moves) -> tuple[Tensor, Tensor]:
        """Return what the moves' rate leaves, believed to be `SLOW` at best: what is found is decoded afterwards."""
        before = state.shrinking[-1] if state.shrinking else torch.full_like(moves.largest, torch.inf)
        state.shrinking.append(moves.largest)
        rate = (moves.largest / before).clamp(*SLOW).nan_to_num(SLOW[1])
        estimate = moves.largest * rate / (1 - rate)
        return estimate, estimate <= self.tolerance
