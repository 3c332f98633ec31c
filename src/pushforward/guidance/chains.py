r"""Markov chains whose limit is `exp(-|x|^2 / 2 - E(x))`: a standard normal prior, tilted by an energy.

A chain moves by Hamiltonian dynamics. With a fresh velocity v ~ N(0, I) it takes some leaps of length h,

    v <- v - h/2 grad E(x);    (x, v) <- (x cos h + v sin h, v cos h - x sin h);    v <- v - h/2 grad E(x),

in which the normal prior's own dynamics is the rotation, solved exactly, so that the step need not shrink as there are
more numbers (`preconditioned`); or the plain leapfrog of both forces. `adjusted` chains accept the end of the leaps by
the Metropolis rule and have the right limit; without it there is a bias that falls with h. One leap is Langevin
dynamics: the plain unadjusted one is `x <- x - s/2 grad U + sqrt(s) xi` with the step size s = h^2.

Without the gradient (`pcn`) the leap is the rotation alone, and the Metropolis rule asks for the energies before and
after. A *slice* (`ess`) draws a level `-E(x) + log u` first, then points of the whole ellipse `x cos t + v sin t`: the
first t is any angle, and the range of the next shrinks from a point below the level towards t = 0, where x itself is
above it. So every move ends, and none is rejected.

*Annealed* chains begin at draws of the prior and raise the weight of the energy little by little; the weights of what
they draw make up for not having arrived (annealed importance sampling): exactly for adjusted chains whose steps are
not adapted meanwhile, nearly for the others.

Every chain has random numbers of its own, made from the seed, its number and the step: it is the same whatever the
batch, and whether or not it was interrupted.

References:
    Hybrid Monte Carlo on Hilbert spaces, Beskos et al., Stochastic Processes and their Applications 121 (2011);
    MCMC methods for functions, Cotter et al., arXiv 1202.0709 (preconditioned proposals, pCN);
    Elliptical slice sampling, Murray et al., arXiv 1001.0175;
    Annealed Importance Sampling, Neal, arXiv physics/9803008;
    The No-U-Turn Sampler, Hoffman & Gelman, arXiv 1111.4246, section 3.2 (step sizes by dual averaging).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.guidance.dynamics import Dynamics, Schedule
from pushforward.maps.code import GaussianStream, derive_seed

__all__ = [
    "Chains", "Draw", "Point", "Record", "Target", "walk",
]  # fmt: skip

_PROJECTIONS = 8  # directions in which chains are compared, beside their energies
_JITTER = 0.2  # part by which steps of several leaps vary, so that no trajectory comes back to where it began
# Of dual averaging (Hoffman & Gelman, section 3.2.1), with a gain five times as gentle: with theirs, steps collapse in
# the first moves from the prior, and warm-ups of some dozen moves, as here, do not forget it.
_GAIN, _DELAY, _DECAY = 0.25, 10.0, 0.75
_TRIES = 100  # points of a slice: after so many its range is below rounding, or the energy changes from call to call


class Point(NamedTuple):
    """What a target knows of variables `(chains, numbers)`.

    Args:
        images: that they decode to, `(chains, ...)`.
        energies: each term times its weight, `(chains,)` by name, float64.
        slope: gradient of their sum, `(chains, numbers)`; zeros where it is not followed.
    """

    images: Tensor
    energies: dict[str, Tensor]
    slope: Tensor

    @property
    def energy(self) -> Tensor:
        """The sum of all terms."""
        return torch.stack(list(self.energies.values())).sum(0)

    def replaced(self, some: Tensor, other: Point) -> Point:
        """The point with what another one knows of some of its codes, a mask `(chains,)`."""
        return Point(
            torch.where(some.view(-1, *[1] * (self.images.ndim - 1)), other.images, self.images),
            {name: torch.where(some, other.energies[name], value) for name, value in self.energies.items()},
            torch.where(some[:, None], other.slope, self.slope),
        )

    def placed(self, rows: Tensor, other: Point) -> Point:
        """The point with what another one knows of the codes numbered `rows (n,)`."""
        return Point(
            self.images.index_copy(0, rows, other.images),
            {name: value.index_copy(0, rows, other.energies[name]) for name, value in self.energies.items()},
            self.slope.index_copy(0, rows, other.slope),
        )

    def some(self, which: Tensor) -> Point:
        """What is known of some of its codes, a mask `(chains,)`."""
        energies = {name: value[which] for name, value in self.energies.items()}
        return Point(self.images[which], energies, self.slope[which])

    def check(self, when: str, first: int = 0) -> None:
        """Raise unless all is finite; chains are counted from `first`.

        Raises:
            PushforwardError: an energy is not, by its name, or the gradient.
        """
        for name, value in self.energies.items():
            if not bool(value.isfinite().all()):
                bad = first + int((~value.isfinite()).nonzero()[0, 0])
                raise PushforwardError(
                    f"Energy {name!r} is {float(value[bad])} for chain {bad} {when}; it must be finite for any image."
                )
        if not bool(self.slope.isfinite().all()):
            names = ", ".join(self.energies)
            raise PushforwardError(f"The gradient of {names} is not finite {when}; look for roots or logarithms of 0.")


Target = Callable[..., Point]  # of variables `(n, numbers)`, of the chains numbered `(n,)`: by default, all


# -- what is known of chains -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """What is known of all chains after a step; each figure is `(chains,)`, float64.

    Args:
        energies: each term times its weight, by name.
        prior: `|z|^2 / 2`.
        acceptance: probability that the move had to be accepted; 1 where nothing is rejected; of a slice, 1 / its
            points.
        step: length h of the leaps; of a slice, the angle.
        projections: projections of the codes on fixed random directions, `(directions, chains)`.
    """

    energies: Mapping[str, Tensor]
    prior: Tensor
    acceptance: Tensor
    step: Tensor
    projections: Tensor

    @classmethod
    def of(cls, x: Tensor, energies: Mapping[str, Tensor], acceptance: Tensor, step: Tensor) -> Record:
        """The record of variables `x (chains, numbers)`."""
        projections = (x @ _directions(x.shape[1]).to(x)).T.double()
        return cls(dict(energies), 0.5 * x.double().square().sum(1), acceptance, step, projections)

    @property
    def energy(self) -> Tensor:
        """The sum of all terms."""
        return torch.stack(list(self.energies.values())).sum(0)


class Draw(NamedTuple):
    """A state of all chains that was kept: the step, variables `(chains, numbers)`, images, energies, log weights."""

    step: int
    variables: Tensor
    images: Tensor
    energies: Mapping[str, Tensor]
    log_weights: Tensor


@dataclass(frozen=True, eq=False)
class Chains:
    """Chains at a step: all that is needed to go on.

    Args:
        variables: where they are, `(chains, numbers)`.
        point: what the target knows of them.
        tuning: of dual averaging, `(3, chains)`, float64: mean error, and logarithms of the step and its mean.
        log_weights: of annealed chains, `(chains,)`, float64.
        history: a record a step; the first is of the beginning.
        draws: states that were kept.
        nfe: network evaluations of each chain, `(chains,)`, where they are known.
    """

    variables: Tensor
    point: Point
    tuning: Tensor
    log_weights: Tensor
    history: tuple[Record, ...] = ()
    draws: tuple[Draw, ...] = ()
    nfe: Tensor | None = None

    @property
    def step(self) -> int:
        """Moves so far."""
        return len(self.history) - 1


# -- a walk ------------------------------------------------------------------------------------------------------------


def walk(
    target: Target, begin: Tensor | Chains, sampler: Dynamics, schedule: Schedule, *, seed: int = 0, first: int = 0
) -> Iterator[Chains]:
    """The chains at their beginning, and after every step.

    Args:
        target: energy and gradient.
        begin: variables `(chains, numbers)`, or chains that go on.
        sampler: how they move.
        schedule: what is done when.
        seed: seed of all noise.
        first: number of the first chain.

    Raises:
        PushforwardError: an energy that is not finite at the beginning, or chains that diverge.
    """
    chains = begin if isinstance(begin, Chains) else _begun(target, begin, sampler, first)
    numbers = range(first, first + len(chains.variables))
    yield chains
    while chains.step < schedule.steps:
        own = derive_seed(seed, chains.step + 1)
        noise = GaussianStream(own, numbers, (chains.variables.shape[1] + 2,)).draw()
        more = GaussianStream(derive_seed(own, 1), numbers, ())
        chains = _moved(target, chains, sampler, schedule, noise, more, first)
        yield chains


def _begun(target: Target, x: Tensor, sampler: Dynamics, first: int) -> Chains:
    point = target(x)
    point.check("at the beginning", first)
    none = x.new_zeros(len(x), dtype=torch.float64)
    tuning = torch.stack([none, none + math.log(sampler.step), none + math.log(sampler.step)])
    return Chains(x, point, tuning, none, (Record.of(x, point.energies, none + 1, none + sampler.step),))


def _moved(
    target: Target, chains: Chains, sampler: Dynamics, schedule: Schedule, noise: Tensor, more: GaussianStream,
    first: int,
) -> Chains:  # fmt: skip
    """The chains one step on, with standard normal numbers for it, `(chains, numbers + 2)`, and `more` for slices."""
    x, step, now = chains.variables, chains.step, chains.point
    weight = schedule.weight(step)
    log_weights = chains.log_weights
    if schedule.anneal:
        log_weights = log_weights - (weight - (schedule.weight(step - 1) if step else 0.0)) * now.energy
    noise = noise.to(x)
    velocity = noise[:, :-2]
    accept, vary = _uniform(noise[:, -2:]).unbind(1)
    if sampler.sliced:
        level = accept.log() - weight * now.energy
        x, now, probability, length = _sliced(target, x, velocity, now, level, 2 * math.pi * vary, more, weight)
        return _recorded(chains, schedule, x, now, chains.tuning, log_weights, probability, length)
    warming = sampler.adjusted and sampler.adapted and step < schedule.warmed
    length = chains.tuning[1 if warming else 2].exp()
    if sampler.leaps > 1:
        length = length * (1 + _JITTER * (2 * vary - 1))
    y, faster, then, lost = _leaps(target, x, velocity, now, length.to(x)[:, None], sampler, weight)
    before, after = (
        0.5 * (a.double().square().sum(1) + v.double().square().sum(1)) + weight * point.energy
        for a, v, point in ((x, velocity, now), (y, faster, then))
    )
    lost = lost | ~after.isfinite()
    probability = torch.where(lost, 0.0, (before - after).clamp(max=0).exp())
    tuning = chains.tuning
    if sampler.adjusted:
        taken = accept < probability
        if warming:
            tuning = _tuned(tuning, probability, step + 1, sampler)
    elif bool(lost.any()):
        chain = first + int(lost.nonzero()[0, 0])
        raise PushforwardError(
            f"Chain {chain} diverged in step {step + 1}: its energy is not finite. Take a smaller step size, or mala."
        )
    else:
        taken, probability = torch.ones_like(lost), torch.ones_like(probability)
    x, now = torch.where(taken[:, None], y, x), now.replaced(taken, then)
    return _recorded(chains, schedule, x, now, tuning, log_weights, probability, length)


def _recorded(
    before: Chains, schedule: Schedule, x: Tensor, now: Point, tuning: Tensor, log_weights: Tensor, probability: Tensor,
    length: Tensor,
) -> Chains:  # fmt: skip
    """The chains after a move, with its record, and a draw if one is kept."""
    draws, step = before.draws, before.step + 1
    if step in schedule.kept:
        draws = (*draws, Draw(step, x, now.images, now.energies, log_weights))
    record = Record.of(x, now.energies, probability, length)
    return Chains(x, now, tuning, log_weights, (*before.history, record), draws)


def _uniform(normal: Tensor) -> Tensor:
    """Numbers between 0 and 1, float64, of standard normal ones."""
    return torch.special.ndtr(normal.double())


def _sliced(
    target: Target, x: Tensor, velocity: Tensor, now: Point, level: Tensor, angle: Tensor, more: GaussianStream,
    weight: float,
) -> tuple[Tensor, Point, Tensor, Tensor]:  # fmt: skip
    """A point of each chain's ellipse above its level, what is known there, 1 / the points tried, and its angle."""
    high, low = angle.clone(), angle - 2 * math.pi
    y, tried, found = x.clone(), torch.zeros_like(angle), torch.zeros_like(angle)
    left = torch.arange(len(x), device=x.device)
    for _ in range(_TRIES):
        turn = angle[left].to(x)[:, None]
        place = x[left] * turn.cos() + velocity[left] * turn.sin()
        point = target(place, left)
        tried[left] += 1
        above = -weight * point.energy > level[left]  # not where the energy is not a number
        rows = left[above]
        y[rows], found[rows] = place[above], angle[rows]
        now = now.placed(rows, point.some(above))
        left = left[~above]
        if not len(left):
            break
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
        angle = low + (high - low) * _uniform(more.draw().to(angle))
    return y, now, 1 / tried, found.abs()


def _leaps(
    target: Target, x: Tensor, velocity: Tensor, now: Point, h: Tensor, sampler: Dynamics, weight: float
) -> tuple[Tensor, Tensor, Point, Tensor]:
    """End and velocity after the leaps, what is known there, and which chains left the finite numbers.

    A lost chain goes on from where it began, so that the others' batch stays whole.
    """
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    begin, start, point = x, velocity, now
    cos, sin = h.cos(), h.sin()

    def force(x: Tensor, slope: Tensor) -> Tensor:
        return weight * slope if sampler.preconditioned else weight * slope + x

    kick = force(x, point.slope)
    for _ in range(sampler.leaps):
        velocity = velocity - h / 2 * kick
        if sampler.preconditioned:
            x, velocity = cos * x + sin * velocity, cos * velocity - sin * x
        else:
            x = x + h * velocity
        point = target(x)
        lost = lost | ~(point.energy.isfinite() & point.slope.isfinite().all(1))
        x, velocity = torch.where(lost[:, None], begin, x), torch.where(lost[:, None], start, velocity)
        point = point._replace(slope=torch.where(lost[:, None], now.slope, point.slope))
        kick = force(x, point.slope)
        velocity = velocity - h / 2 * kick
    return x, velocity, point, lost


def _tuned(tuning: Tensor, probability: Tensor, step: int, sampler: Dynamics) -> Tensor:
    """Dual averaging of each chain's step towards the acceptance aimed at."""
    error, _, mean = tuning
    error = error + (sampler.acceptance - probability - error) / (step + _DELAY)
    log_step = math.log(2 * sampler.step) - math.sqrt(step) / _GAIN * error
    if sampler.preconditioned:
        log_step = log_step.clamp(max=math.log(math.pi / 2))  # the prior forgets all in a quarter of a turn
    share = step**-_DECAY
    return torch.stack([error, log_step, share * log_step + (1 - share) * mean])


@lru_cache(maxsize=4)
def _directions(numbers: int) -> Tensor:
    """Fixed random directions, `(numbers, _PROJECTIONS)`, on which a standard normal has variance about 1."""
    return torch.randn(numbers, _PROJECTIONS, generator=torch.Generator().manual_seed(0)) / numbers**0.5
