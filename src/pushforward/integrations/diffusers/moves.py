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
    """A random move: the plan, the node whose noise it is, and how far the state is from its mean."""

    plan: Plan
    node: int
    gap: Tensor

    def log_prob(self) -> Tensor:
        """The logarithm of its density, `(batch,)`."""
        how = unmixing(self.plan, self.node)
        noise, reached = unmixed(self.plan, self.node, how, self.plan.basis.forward(self.gap))
        return log_density(noise, how, self.plan, reached)


def move_of(plan: Plan, call: int, drawn: Mapping[int, Tensor], following: Tensor, given: Tensor | None) -> Move | None:
    """The random move between two calls of the network, or to the last state; `None` unless there is one.

    Args:
        plan: the plan.
        call: the number of the call about the state that is led to; of the last state, that of all calls.
        drawn: noises of the nodes in between.
        following: the state that they led to.
        given: the state that counts instead, which is as far from the mean as it is.
    """
    ends = [*(k for k, node in enumerate(plan.nodes) if node.asks), len(plan.nodes) - 1]
    if len(drawn) != 1 or ends[call] not in drawn:
        return None
    ((node, noise),) = drawn.items()
    mean = following - plan.nodes[node].terms[Register("noise", node)](noise)
    return Move(plan, node, (following.detach() if given is None else given) - mean)
