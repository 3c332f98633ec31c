"""Few steps asked for many: how their answers surprise tells, by a spline, how those of the steps between would.

An answer's *surprise* is what it is off from what was expected of it. Surprises are smooth along a chain while states
are far from the solution. So the first rounds ask few steps, and the answers of the others follow the cubic spline
through the surprises of these, over the calls in their order. Nearer, networks are rough in time: all later rounds ask
all steps and are mixed from their own like alone, and no image is done before several of them.

The roughness is the embedding of time: its fastest waves turn once in some six of a thousand steps. At the solution of
a thousand steps, as the linear system tells, the spline through every second answer leaves images off by some 1e-5 of
their size, through every third by 5e-5, through every eighth by 2e-4 to 1e-3. Of a hundred steps it can follow no such
wave.

Evidence: `benchmarks/parallel.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from pushforward.plan import Plan

WORTH = 2  # plans of no more than so many times the coarse calls ask all of them always
THIN = 3  # rounds that ask the coarse calls alone
SURE = 3  # rounds after these before an image can be done


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

    def member(self) -> Tensor:
        """Return whether a call is one of these, `(calls,)`."""
        every = torch.arange(len(self.weights), device=self.calls.device)
        return torch.isin(every, self.calls)


def coarse_of(plan: Plan, many: int | None) -> Coarse | None:
    """Return `many` of a plan's calls, evenly, with the first and the last; `None` where that saves too little.

    Nor are there any where surprises are not smooth: with noises, with several calls at a time, in implicit plans.
    """
    if many is None or plan.nfe <= WORTH * many or plan.noises or plan.implicit:
        return None
    return _evenly(plan.nfe, many) if bool((plan.asked_times.diff() < 0).all()) else None


@lru_cache(maxsize=16)
def _evenly(calls: int, many: int) -> Coarse:
    chosen = np.linspace(0, calls - 1, many).round()
    weights = CubicSpline(chosen, np.eye(many))(np.arange(calls))
    return Coarse(torch.from_numpy(chosen).long(), torch.from_numpy(weights))
