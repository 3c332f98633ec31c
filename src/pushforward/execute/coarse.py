"""Few steps asked for many: how their answers surprise tells, by a spline, how those of the steps between would.

An answer's *surprise* is what it is off from what was expected of it. Surprises are smooth along a chain while states
are far from the solution. So some rounds ask few steps, and the answers of the others follow the cubic spline through
the surprises of these, over the calls in their order. Near the solution a network is rough in time: first every other
round asks all steps, then every round does, and no image is done after one that did not.

Evidence: `benchmarks/parallel.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from pushforward.plan import Plan

WORTH = 2  # plans of no more than so many times the coarse calls ask all of them always
FIRST = 3  # rounds that ask the coarse calls alone, before every other one does
FAR = 0.05  # deviations that states still move by, at least, where coarse calls tell enough


@dataclass(frozen=True, eq=False)
class Coarse:
    """Calls that stand for all.

    Args:
        calls: theirs, increasing, `(many,)`.
        weights: what the spline takes of their surprises for each call, `(calls, many)`.
    """

    calls: Tensor
    weights: Tensor

    def to(self, like: Tensor) -> Coarse:
        """Return the same with the dtype and on the device of a tensor."""
        return Coarse(self.calls.to(like.device), self.weights.to(like))


def coarse_of(plan: Plan, many: int | None) -> Coarse | None:
    """Return `many` of a plan's calls, evenly, with the first and the last; `None` where that saves too little.

    Nor are there any where surprises are not smooth: with noises, with several calls at a time, in implicit plans.
    """
    smooth = not plan.noises and not plan.implicit and bool((plan.asked_times.diff() < 0).all())
    return _evenly(plan.nfe, many) if many and smooth and plan.nfe > WORTH * many else None


@lru_cache(maxsize=16)
def _evenly(calls: int, many: int) -> Coarse:
    chosen = np.linspace(0, calls - 1, many).round()
    weights = CubicSpline(chosen, np.eye(many))(np.arange(calls))
    return Coarse(torch.from_numpy(chosen).long(), torch.from_numpy(weights))


@dataclass(eq=False)
class Thinning:
    """Which images have the coarse calls alone asked in the next round.

    Args:
        member: whether a call is a coarse one, `(calls, 1)`.
        thin: the images, `(batch,)`.
        misled: images whose moves grew in such a round, and which have no more of them, `(batch,)`.
    """

    member: Tensor
    thin: Tensor
    misled: Tensor

    @classmethod
    def begin(cls, coarse: Coarse, active: Tensor) -> Thinning:
        """Before the first round."""
        member = torch.zeros(len(coarse.weights), 1, dtype=torch.bool, device=active.device)
        member[coarse.calls.to(active.device)] = True
        return cls(member, torch.ones_like(active), torch.zeros_like(active))

    def close(self, moves: Sequence[Tensor]) -> None:
        """End a round, with the greatest moves of all rounds so far, each `(batch,)`."""
        self.misled = self.misled | (self.thin & (moves[-1] > moves[-2:][0]))
        self.thin = (moves[-1] > FAR) & ~self.misled & (~self.thin | (len(moves) < FIRST))
