"""The random part of a scheduler's step, for the density of what it led to (see `execute.density`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from pushforward.execute.density import log_density
from pushforward.execute.encode import unmixed, unmixing
from pushforward.plan import Plan, Register

__all__ = ["Move", "move_of"]


class Move(NamedTuple):
    """A random move: the plan, the node whose noise it is, that noise, and the state that it led to.

    A state that is `given` counts instead: it is as far from the move's mean as it is.
    """

    plan: Plan
    node: int
    noise: Tensor
    following: Tensor
    given: Tensor | None

    def log_prob(self) -> Tensor:
        """Return the logarithm of its density, `(batch,)`."""
        plan, node = self.plan, self.node
        mean = self.following - plan.nodes[node].terms[Register("noise", node)](self.noise)
        gap = (self.following.detach() if self.given is None else self.given) - mean
        how = unmixing(plan, node)
        noise, reached = unmixed(plan, node, how, plan.basis.forward(gap))
        return log_density(noise, how, plan, reached)


def move_of(plan: Plan, call: int, drawn: Mapping[int, Tensor], following: Tensor, given: Tensor | None) -> Move | None:
    """Return the random move between two calls of the network, or to the last state; `None` unless there is one.

    Args:
        plan: the plan.
        call: the number of the call about the state that is led to; of the last state, that of all calls.
        drawn: noises of the nodes in between.
        following: the state that they led to.
        given: see `Move`.
    """
    if len(drawn) != 1:
        return None
    ((node, noise),) = drawn.items()
    ends = (*plan.asked, len(plan.nodes) - 1)
    return Move(plan, node, noise, following, given) if ends[call] == node else None
