"""Plans as pipelines run them: one call of `step` for each call of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Operator
from pushforward.model import Model
from pushforward.plan import Node, Plan, Register

__all__ = ["Order", "beginnings", "idling", "runnable"]


class Order(int):
    """Calls a step; a step's number times this is the call where the step begins, as pipelines reckon.

    Some steps make fewer calls than others: the last one, and the first where there is no signal yet. So it is looked
    up. It equals no number: where it equals 2, pipelines of Stable Diffusion XL begin a refiner's part one call before
    the time that its state has.
    """

    _begins: tuple[int, ...]  # of the steps, then of the end

    def __new__(cls, calls: int, begins: tuple[int, ...]) -> Order:
        made = super().__new__(cls, calls)
        made._begins = begins
        return made

    def __rmul__(self, step: int) -> int:
        return self._begins[min(step, len(self._begins) - 1)] if step >= 0 else int(self) * step

    def __eq__(self, other: object) -> bool:
        return self is other

    __mul__, __hash__ = __rmul__, object.__hash__


def beginnings(plan: Plan) -> tuple[int, ...]:
    """Return the calls where the steps of a plan begin.

    The first call about a step's state, or, where the state is corrected by an answer that it shares, that answer's.
    """
    before = np.cumsum([0, *(node.asks for node in plan.nodes)])
    last = len(plan.nodes) - 1
    return tuple(int(before[k]) - (not plan.nodes[k].asks) for k in plan.steps if k < last or plan.nodes[k].asks)


def idling(model: Model, solver: str, times: Tensor, made: Callable[[Tensor], Plan]) -> Plan:
    """Make a plan whose last step goes from the last of `times` to itself, as `diffusers` takes one.

    The network is asked, and its answer corrects the state there if the solver does so before a step. So a step to a
    later time is planned, and left out; at time 0 there is none.

    Args:
        model: model of the pipeline.
        solver: name of its solver.
        times: where all steps begin.
        made: makes the solver's plan on a grid.
    """
    end = float(times[-1])
    if len(times) == 1:
        plan = Plan(model.process, solver, (Node(end, {}, asks=True),), (0,))
    elif end == 0:
        plan = made(times)
        plan = replace(plan, nodes=(*plan.nodes[:-1], replace(plan.nodes[-1], asks=True)))
    else:
        plan = made(torch.cat([times, times[-1:] / 2]))
        plan = replace(plan, nodes=plan.nodes[: plan.steps[-2] + 1], steps=plan.steps[:-1])
    count = len(plan.nodes)
    stay = Node(end, {Register("state", count - 1): Operator.scalar(1.0)}, asks=False)
    return replace(plan, nodes=(*plan.nodes, stay), steps=(*plan.steps, count))


def runnable(plan: Plan, solver: str) -> Plan:
    """Return a plan that a pipeline can run."""
    if plan.implicit:
        why = "solves for all steps together"
    elif not plan.nodes[0].asks:
        why = "moves before it asks the network"
    else:
        return plan
    raise PushforwardError(f"A pipeline cannot run {solver!r}, which {why}; name another solver.")
