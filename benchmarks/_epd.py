r"""EPD-Solver's form (arXiv 2512.22796) on one of our models: a few parallel evaluations a step, at learned times.

In x = u / alpha and s = sigma / alpha, a step from s to s' asks at s, moves along that slope to K times between, asks
there in one call, and combines their slopes:

    d = (x - D(x, s)) / s,    s_k = s'^r_k s^(1 - r_k),    x_k = x + (s_k - s) d,
    x' = x + (s' - s) sum_k w_k (x_k - D(x_k, s_k)) / s_k.

So a step takes two rounds; with an odd number of rounds, the first slope is the one of noise alone, x / s. Theirs learn
r and w by gradient descent through all steps. Here each step, on the states that the steps before it reach, gets the r
of a list and the w (free, not on a simplex) that bring its end nearest to the flow: the best of this form step by step,
but for their scale of the time that the network is told.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.linear import Gaussian, Process
from pushforward.plan import auto
from pushforward.plan.grid import solve_for_time, spaced

STAGES = 2  # parallel evaluations a step
PLACES = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)  # that a time between may have
LAST = 0.002  # s of the last state, as EDM has it


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        first: s where it begins.
        last: s where it ends.
        places: r of the times between.
        weights: w of their slopes.
    """

    first: float
    last: float
    places: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Slopes:
    """The slopes of a network at any s."""

    process: Process
    denoiser: Denoiser

    def at(self, x: Tensor, s: float) -> Tensor:
        """The slope `dx / ds`."""
        time = times(self.process, [s])
        alpha = self.process.signal(time).entry(0, 0).to(x)
        return (x - self.denoiser.at(self.process, time, x)(0, alpha * x)) / s

    def between(self, x: Tensor, step: Step, *, free: bool) -> Tensor:
        """The slopes at a step's times between, `(times, *x.shape)`; `free`, if its first slope is not asked for."""
        slope = x / step.first if free else self.at(x, step.first)
        asked = [step.last**r * step.first ** (1 - r) for r in step.places]
        return torch.stack([self.at(x + (s - step.first) * slope, s) for s in asked])


def level(process: Process, t: Tensor) -> Tensor:
    """Return s at times."""
    return torch.exp(-process.log_snr(t))


def times(process: Process, grid: Sequence[float]) -> Tensor:
    """Return the process's times at every s of `grid`."""
    ends = (torch.tensor(t, dtype=torch.float64) for t in (process.t_max, 0.0))
    return solve_for_time(lambda t: level(process, t), torch.tensor(grid, dtype=torch.float64), *ends)


def grids(process: Process, steps: int, reference: Gaussian) -> list[list[float]]:
    """Return the s of so many steps: as EDM places them, and as `auto` does."""
    first = float(level(process, torch.tensor(process.t_max, dtype=torch.float64)))
    placed = spaced(first, LAST, steps + 1, "karras")
    return [placed.tolist(), [*level(process, auto(process, steps, reference).times[:-1]).tolist(), LAST]]


def fitted(slopes: Slopes, flow: Sequence[Tensor], grid: Sequence[float], *, free: bool) -> list[Step]:
    """Fit the steps to the flow's x at every s of `grid`."""
    x, steps = flow[0], []
    for k, (first, last) in enumerate(itertools.pairwise(grid)):
        tried = Step(first, last, tuple(PLACES.tolist()), ())
        found = slopes.between(x, tried, free=free and k == 0)
        norm = flow[-1].flatten(1).norm(dim=1)[:, None]
        ends = ((last - first) * found.flatten(2) / norm).flatten(1).double()
        missing = ((flow[k + 1] - x).flatten(1) / norm).flatten().double()
        best, least = (0, 0), torch.inf
        for chosen in itertools.combinations(range(len(PLACES)), STAGES):
            some = ends[list(chosen)].T
            weights = torch.linalg.lstsq(some, missing[:, None]).solution[:, 0]
            left = float((some @ weights - missing).square().sum())
            if left < least:
                best, least, kept = chosen, left, weights
        steps.append(Step(first, last, tuple(PLACES[list(best)].tolist()), tuple(kept.tolist())))
        x = moved(x, steps[-1], found[list(best)])
    return steps


def moved(x: Tensor, step: Step, found: Tensor) -> Tensor:
    """Return x at the step's end, by the slopes at its times between."""
    return x + (step.last - step.first) * torch.einsum("k,k...->...", torch.tensor(step.weights).to(x), found)


def sample(slopes: Slopes, start: Tensor, steps: Sequence[Step], *, free: bool) -> Tensor:
    """The last x."""
    x = start
    for k, step in enumerate(steps):
        x = moved(x, step, slopes.between(x, step, free=free and k == 0))
    return x
