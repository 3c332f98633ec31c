"""How chains move, and what is done at which of their moves; `chains` derives it and does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

from pushforward.data import schema
from pushforward.data.memory import check_memory
from pushforward.data.words import many
from pushforward.errors import PushforwardError

__all__ = ["SAMPLERS", "Dynamics", "Schedule", "ess", "hmc", "langevin", "mala", "pcn"]


@dataclass(frozen=True)
class Dynamics:
    """How chains move; made by `langevin`, `mala`, `hmc`, `pcn` and `ess`.

    Args:
        step: length h of a leap; of adjusted chains the first one, which the warm-up adapts.
        leaps: of one move, each a gradient.
        adjusted: accept or reject by the Metropolis rule.
        preconditioned: solve the prior's part exactly.
        acceptance: share of moves that adapted steps shall have accepted.
        gradient: follow the energy's gradient; else the energy may be any number, and has none.
        sliced: seek a point of a slice on an ellipse, instead of leaps.
        adapted: adapt the step of adjusted chains in the warm-up.
    """

    step: float
    leaps: int = 1
    adjusted: bool = True
    preconditioned: bool = True
    acceptance: float = 0.65
    gradient: bool = True
    sliced: bool = False
    adapted: bool = True

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if not 0 < self.step < math.inf or not self.leaps >= 1 or not 0 < self.acceptance < 1:
            raise PushforwardError(
                f"Chains need a positive step, 1 leap or more, and an acceptance between 0 and 1; got {self.step:g}, "
                f"{self.leaps} and {self.acceptance:g}."
            )


def langevin(step_size: float = 0.05, *, preconditioned: bool = False) -> Dynamics:
    """Unadjusted Langevin dynamics; the step size and 200 steps are those of arXiv 2210.05559.

    Args:
        step_size: s in `z - s/2 grad U + sqrt(s) xi`.
        preconditioned: solve the prior's part exactly.
    """
    return Dynamics(_leap(step_size), 1, adjusted=False, preconditioned=preconditioned)


def mala(step_size: float = 0.05, *, preconditioned: bool = True, acceptance: float = 0.574) -> Dynamics:
    """Langevin dynamics with the Metropolis rule; give it a warm-up of 50 steps or more to find its step.

    Args:
        step_size: the first; see `langevin`.
        preconditioned: solve the prior's part exactly; without, it is the textbook's MALA.
        acceptance: aimed at by the warm-up; the default is best in high dimensions (Roberts & Rosenthal, 1998).
    """
    return Dynamics(_leap(step_size), 1, True, preconditioned, acceptance)


def _leap(step_size: float) -> float:
    """The length h whose square is Langevin's step size.

    Raises:
        PushforwardError: the step size is no positive number.
    """
    if not (isinstance(step_size, Real) and 0 < step_size < math.inf):
        raise PushforwardError(f"The step size of Langevin dynamics must be a positive number; got {step_size!r}.")
    return math.sqrt(step_size)


def hmc(step: float = 0.2, leaps: int = 5, *, preconditioned: bool = True, acceptance: float = 0.65) -> Dynamics:
    """Hamiltonian Monte Carlo: several leaps per move.

    Args:
        step: length of the first leaps.
        leaps: gradients per move.
        preconditioned: solve the prior's part exactly.
        acceptance: aimed at by the warm-up; the default is best in high dimensions (Beskos et al., arXiv 1001.4460).
    """
    return Dynamics(step, leaps, True, preconditioned, acceptance)


def pcn(step: float = 0.2, *, acceptance: float = 0.234) -> Dynamics:
    """Preconditioned Crank-Nicolson moves: turns towards fresh noise, accepted by the energy alone; no gradient.

    (With the gradient they are called pCNL, and are `mala`.)

    Args:
        step: the first angle h in `z cos h + xi sin h`, in radians.
        acceptance: aimed at by the warm-up; the default is best for moves without a gradient (Roberts et al., 1997).
    """
    return Dynamics(step, acceptance=acceptance, gradient=False)


def ess() -> Dynamics:
    """Elliptical slice sampling: always moves, with no gradient and no step to tune, by a few energies per move."""
    return Dynamics(math.pi, gradient=False, sliced=True)


SAMPLERS: Mapping[str, Callable[..., Dynamics]] = {
    "langevin": langevin, "mala": mala, "hmc": hmc, "pcn": pcn, "ess": ess,
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """What is done at which step.

    Args:
        steps: moves of a chain, in all.
        warm_up: first moves, from which no draws are kept and in which the leaps of adjusted chains are
            adapted; half by default.
        anneal: moves over which the energy's weight grows from 0 to 1, with weights of the draws; 0: it is 1 at once.
        draws: states of a chain that are kept, evenly spaced after the warm-up, the last one among them.
        rungs: chains that each chain is a ladder of, with weights of the energy from 1 to 0 that the warm-up spaces;
            1: no ladder. Every rung moves, and costs, as a chain of its own.
    """

    steps: int = 200
    warm_up: int | None = None
    anneal: int = 0
    draws: int = 1
    rungs: int = 1

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.steps < 1 or not 0 <= self.warmed < self.steps or not 0 <= self.anneal <= self.warmed:
            raise PushforwardError(
                f"Chains need 1 step or more, a warm-up of fewer, and no more annealing than warm-up; got {self.steps} "
                f"steps, a warm-up of {self.warmed} and an annealing of {self.anneal}."
            )
        if not 1 <= self.draws <= self.steps - self.warmed:
            raise PushforwardError(
                f"There are at most as many draws as steps after the warm-up, {self.steps - self.warmed}; got "
                f"{self.draws}."
            )
        if self.rungs - 1 > 2 * self.steps:
            raise PushforwardError(
                f"A state climbs 2 rungs in a move at most, so none would reach the top of {self.rungs:,} in "
                f"{many(self.steps, 'move')}; take fewer rungs, or more moves."
            )
        if self.rungs < 1 or (self.rungs > 1 and self.anneal):
            raise PushforwardError(
                f"Ladders need 1 rung or more, and stand in the place of annealing; got {self.rungs} rungs and an "
                f"annealing of {self.anneal}."
            )
        check_memory(1000 * self.draws, f"The {self.draws:,} draws of a chain")

    @property
    def warmed(self) -> int:
        """Steps of the warm-up."""
        return self.steps // 2 if self.warm_up is None else self.warm_up

    @property
    def kept(self) -> frozenset[int]:
        """The steps after which a draw is kept, counted from 1."""
        after = self.steps - self.warmed
        return frozenset(self.warmed + -(-after * k // self.draws) for k in range(1, self.draws + 1))

    def weight(self, step: int) -> float:
        """The weight of the energy in move number `step`, counted from 0."""
        return min(1.0, (step + 1) / self.anneal) if self.anneal else 1.0
