"""Cotangents of all nodes at once: the transposed system as a fixed point, and damped steps of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.execute.adjoint.products import Products
from pushforward.execute.anderson import Mixing
from pushforward.execute.convergence import Convergence, Moves, converge
from pushforward.execute.parallel import Round
from pushforward.execute.remainder import tail
from pushforward.execute.states import SETTLED
from pushforward.execute.system import System, root_mean_square
from pushforward.linear import products as block_products

_FLOOR = 1e-3  # cotangents below this part of the image's largest count as that large, so that rounding can settle


class Cotangents:
    """The cotangents of all nodes, in units of the squares of the states' deviations: they scale as 1 / states.

    Args:
        system: the plan's, with a response.
        products: products of the network.
        source: cotangents that the loss itself gives, a stack as in `System`.
        tolerance: relative error allowed in any node's cotangent.
    """

    backwards = True

    def __init__(self, system: System, products: Products, source: Tensor, tolerance: float) -> None:
        self.system = system
        self._products, self._source, self._tolerance = products, source, tolerance
        self._nodes = torch.tensor(system.asked, device=source.device)
        self._every = torch.arange(system.size, device=source.device)[:, None]
        self._weight = system.whitened(torch.ones_like(source[..., :1]))
        self._units = self._weight.square()  # mixing divides by the deviation, and a cotangent is to be multiplied
        self._set(system.transposed(source))
        self._pulled = _responded(system, self._on_answers)
        self.active = self._sizes(source).amax(0) > 0

    @property
    def values(self) -> Tensor:
        """The cotangents in those units."""
        return self.cotangents / self._units

    def ask(self, wanted: Tensor, inferred: Tensor | None) -> None:  # noqa: ARG002 - the protocol's arguments
        """Take the products `J^T B^T lambda` where `wanted (calls, batch)`."""
        self._products.evaluate(self._on_answers, self._pulled, wanted)

    def moves(self, state: Convergence) -> Moves:
        """Return what the transposed linear system asks for; sizes are relative to the cotangents."""
        gap = self._source + self._through_states + self._pulled - self.cotangents
        stack = self.system.transposed(gap)
        own, absolute = self._sizes(self.cotangents), self._sizes(stack)
        sizes = torch.where(state.active, absolute / torch.maximum(own, _FLOOR * own.amax(0)), 0.0)
        return Moves(stack / self._units, sizes, absolute.amax(0))

    def settled(self, state: Convergence, moves: Moves) -> Tensor:  # noqa: ARG002 - the protocol's arguments
        """Return calls, from the last one on, whose products were made of cotangents that hardly move."""
        later = moves.sizes.flip(0).cumsum(0).flip(0)[self._nodes + 1]
        return (later <= SETTLED * self._tolerance).sum(0)

    def free(self, state: Convergence) -> Tensor:
        """Return nodes up to the first call, from the data's end, that is not settled."""
        count = len(state.rank)
        return (self._every <= self._nodes[(count - 1 - state.frontier).clamp_min(0)]) & (state.frontier < count)

    def move(self, state: Convergence, moves: Moves, stack: Tensor, unexplained: Tensor) -> Tensor:  # noqa: ARG002
        """Move, and let the products follow as they are expected to."""
        expected = self._on_answers
        self._set(self.cotangents + self._units * stack)
        self._pulled += _responded(self.system, self._on_answers - expected)
        return stack

    def left(self, state: Convergence, moves: Moves) -> tuple[Tensor, Tensor]:
        """Return the moves' tail; once all products are settled, no more than what that allows."""
        state.shrinking.append(moves.sizes.amax(0))
        estimate = tail(state.shrinking)
        if not state.whole:
            settled = estimate.clamp_max(SETTLED * self._tolerance)
            estimate = torch.where(state.frontier >= len(state.rank), settled, estimate)
        return estimate, estimate <= self._tolerance

    def _set(self, cotangents: Tensor) -> None:
        self.cotangents = cotangents
        self._through_states, self._on_answers = self.system.pulled(cotangents)

    def _sizes(self, cotangents: Tensor) -> Tensor:
        """Return root mean squares of nodes' cotangents for states in units of their deviation, `(nodes, batch)`."""
        return root_mean_square(self.system.by_image(cotangents / self._weight), 0, 2, 4)


def solved(
    system: System, products: Products, source: Tensor, *, tolerance: float, max_rounds: int | None,
    mixing: Mixing | None, callback: Callable[[Round], None] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return cotangents of all nodes, and the images for which they diverged, `(batch,)`."""
    point, count = Cotangents(system, products, source, tolerance), len(system.asked)
    rank = torch.arange(count, device=source.device).flip(0)  # a product depends on those of later calls
    state = Convergence.begin(rank, point.active, source, whole=system.plan.implicit, window=None)

    def tell(nfe: int) -> None:
        assert callback is not None
        callback(Round(state.rounds, float(state.residual.max()), int(state.active.sum()), nfe))

    converge(point, state, max_rounds=max_rounds, mixing=mixing, callback=callback and tell)
    return point.cotangents, state.lost


def damped(system: System, products: Products, source: Tensor, steps: int, tau: float) -> Tensor:
    """Return cotangents of all states after the given damped steps from zero."""
    cotangents = tau * system.transposed(source)
    pulled = torch.zeros_like(source)
    every = torch.ones(products.states.shape[:2], dtype=torch.bool, device=source.device)
    for _ in range(steps - 1):
        through_states, on_answers = system.pulled(cotangents)
        products.evaluate(on_answers, pulled, every)
        cotangents = cotangents + tau * system.transposed(source + through_states + pulled - cotangents)
    return cotangents


def _responded(system: System, on_answers: Tensor) -> Tensor:
    """Return `L^T` of the answers' cotangents: what their products are expected to be."""
    return torch.zeros_like(on_answers) if system.response is None else block_products(system.response.mT, on_answers)
