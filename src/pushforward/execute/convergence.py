"""Rounds of a fixed point over a chain until every image is done: one loop for states, inverses and cotangents.

A round asks the network about all calls of a plan that are not settled yet, in one batch, and moves all nodes as a
linear system says. What is asked and what moves is the `FixedPoint`'s; how far each image has come, and when it is
done, is the `Convergence`. The calls have an order in which each depends on those before it alone (for cotangents, from
the data's end):

- A prefix of calls is *exact*, one more each round. The first call that is not is always asked.
- Calls after it are *settled* as long as the fixed point says that they may be left alone.
- Where every call depends on every other (`whole`: implicit plans, inversion) there is no such order. All calls are
  asked in every round, and an image that comes no nearer for `STALE` rounds is given up: that is rounding, or there is
  no solution.
- The first rounds may ask the *coarse* calls alone, and the answers of the others follow these (`execute.coarse`).
- An image whose moves are not finite, or have grown `GROWTH` times above their least, is *lost*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pushforward.execute.anderson import History, Mixing, anderson_step
from pushforward.execute.coarse import SURE, THIN
from pushforward.execute.system import System

ROUNDS = 200  # at most, where no prefix settles exactly
STALE = 15  # rounds without a smaller error after which an image is given up, where no prefix settles
GROWTH = 1e3  # moves this many times above their least are divergence


@dataclass(frozen=True)
class Moves:
    """What a round asks for.

    Args:
        stack: moves of all nodes, as in `System`, in the units that past rounds are compared in.
        sizes: size of each node's move, `(nodes, batch)`.
        largest: the size by which an image comes nearer or diverges, `(batch,)`.
    """

    stack: Tensor
    sizes: Tensor
    largest: Tensor


@dataclass(eq=False)
class Convergence:
    """How far each image has come; every tensor is `(batch,)`.

    Args:
        rank: place of each call in the order of dependence, `(calls,)`.
        active: not done and not lost.
        whole: whether there is no order of dependence.
        window: most calls asked in a round, from the first that is not settled; all by default.
        lost: diverged.
        finished: done; those that are not `active` at first are.
        exact: calls, from the first in order, whose answers are final.
        frontier: calls, from the first in order, that are settled.
        nfe: network evaluations.
        residual: error estimated to be left.
        least: the least of the `largest` moves so far.
        stale: rounds since that was much smaller.
        rounds: so far.
        shrinking: sizes of the moves of all rounds, for the fixed point to read rates from.
        history: the last rounds, for mixing.
        coarse: the calls that the first rounds ask, `(calls,)`; all by default.
    """

    rank: Tensor
    active: Tensor
    whole: bool
    window: int | None
    lost: Tensor
    finished: Tensor
    exact: Tensor
    frontier: Tensor
    nfe: Tensor
    residual: Tensor
    least: Tensor
    stale: Tensor
    rounds: int = 0
    shrinking: list[Tensor] = field(default_factory=list)
    history: History = field(default_factory=History)
    coarse: Tensor | None = None

    @classmethod
    def begin(cls, rank: Tensor, active: Tensor, like: Tensor, *, whole: bool, window: int | None) -> Convergence:
        """Before the first round; sizes are of the dtype of `like`."""
        none, zero = torch.zeros_like(active), torch.zeros_like(active, dtype=torch.long)
        far = torch.where(active, math.inf, 0.0).to(like)
        return cls(rank, active, whole, window, none, ~active, zero, zero, zero.clone(), far, far, zero)

    @property
    def going(self) -> Tensor:
        """The images that move."""
        return self.active & ~self.lost

    @property
    def thin(self) -> bool:
        """Whether the next round asks the coarse calls alone."""
        return self.coarse is not None and self.rounds < THIN

    def wanted(self) -> Tensor:
        """Return the calls to be asked in the next round, `(calls, batch)`."""
        rank = self.rank[:, None]
        wanted = rank >= self.frontier
        if self.coarse is not None and self.thin:
            wanted = wanted & self.coarse[:, None]
        if not self.whole:
            if self.window is not None:
                wanted = wanted & (rank < self.frontier + self.window - (self.frontier > self.exact).long())
            wanted = wanted | (rank == self.exact)
        return wanted & self.active

    def inferred(self, wanted: Tensor) -> Tensor | None:
        """Return the calls whose answers follow the coarse ones, not being asked, `(calls, batch)`."""
        return ~wanted & (self.rank[:, None] >= self.frontier) & self.active if self.thin else None

    def judge(self, largest: Tensor) -> None:
        """Find out who is lost, and who comes no nearer."""
        bad = ~largest.isfinite()
        if self.window is None:  # as a window moves on, the moves of new calls come in
            bad = bad | (largest > GROWTH * self.least)
        self.lost = self.lost | (self.active & bad)
        self.stale = torch.where(largest < 0.9 * self.least, 0, self.stale + 1)
        self.least = torch.minimum(self.least, largest.nan_to_num(math.inf))

    def advance(self, settled: Tensor) -> None:
        """One more call is exact, and some after it are settled."""
        self.exact = self.exact + self.active.long()
        if self.window is not None:
            settled = torch.minimum(settled, self.frontier + self.window) if self.window > 1 else self.exact
        self.frontier = torch.where(self.active, torch.maximum(settled, self.exact), self.frontier)

    def close(self, estimate: Tensor, done: Tensor) -> None:
        """End the round with the errors that are left, and the images that are done once rounds asked all calls."""
        if self.coarse is not None:
            done = done & ((self.exact >= len(self.rank)) | (self.rounds >= THIN + SURE))
            if self.rounds == THIN:
                self.history = History()
        self.residual = torch.where(self.active, estimate, self.residual)
        self.finished = self.finished | (self.active & done)
        self.active = self.going & ~done
        if self.whole:
            self.active = self.active & (self.stale < STALE)


class FixedPoint(Protocol):
    """What the rounds move: the states of all nodes, or their cotangents."""

    @property
    def system(self) -> System:
        """Whose stacks these are."""

    @property
    def values(self) -> Tensor:
        """What moves, a stack in the units of its `Moves`."""

    @property
    def backwards(self) -> bool:
        """Whether nodes depend on the later ones."""

    def ask(self, wanted: Tensor, inferred: Tensor | None) -> None:
        """Call the network where `wanted (calls, batch)`; answers `inferred`, likewise, follow these."""

    def moves(self, state: Convergence) -> Moves:
        """Return what the linear system asks for now."""

    def settled(self, state: Convergence, moves: Moves) -> Tensor:
        """Return calls, from the first in order, that may be left alone, `(batch,)`."""

    def free(self, state: Convergence) -> Tensor:
        """Return nodes that mixing may move, `(nodes, batch)`."""

    def move(self, state: Convergence, moves: Moves, stack: Tensor, unexplained: Tensor) -> Tensor:
        """Move by `stack`, in which images that stay have zeros, and return what all have moved by in the end.

        Past rounds do not explain moves of the sizes `unexplained`.
        """

    def left(self, state: Convergence, moves: Moves) -> tuple[Tensor, Tensor]:
        """Return the error estimated to be left, and whether that will do, each `(batch,)`."""


def converge(
    point: FixedPoint,
    state: Convergence,
    *,
    max_rounds: int | None,
    mixing: Mixing | None,
    callback: Callable[[int], None] | None = None,
) -> Convergence:
    """Take rounds until every image is done.

    Args:
        point: what moves.
        state: before the first round; it is changed and returned.
        max_rounds: stop there even if images are not done. By default after as many as there are calls, which suffice
            where these have an order; else after `ROUNDS`, and then images that are not done are lost.
        mixing: how past rounds are used, or not.
        callback: told after every round how many network evaluations it took.
    """
    limit = min(max_rounds or math.inf, ROUNDS if state.whole else len(state.rank))
    while state.rounds < limit and bool(state.active.any()):
        wanted = state.wanted()
        point.ask(wanted, state.inferred(wanted))
        state.nfe += wanted.sum(0)
        state.rounds += 1
        moves = point.moves(state)
        state.judge(moves.largest)
        if not state.whole:
            state.advance(point.settled(state, moves))
        stack, unexplained = moves.stack, moves.sizes
        if mixing is not None:
            stack, unexplained = anderson_step(point.system, stack, moves.sizes, state.history, mixing,
                                               point.free(state), backwards=point.backwards)  # fmt: skip
        stays = ~state.going
        if bool(stays.any()):
            stack = point.system.by_image(stack).masked_fill(stays[:, None], 0.0).view_as(stack)
        state.history.moved = point.move(state, moves, stack, unexplained.masked_fill(stays, 0.0))
        del stack
        state.close(*point.left(state, moves))
        if callback is not None:
            callback(int(wanted.sum()))
    state.history = History()
    if state.whole and max_rounds is None:
        state.lost = state.lost | ~state.finished
    return state
