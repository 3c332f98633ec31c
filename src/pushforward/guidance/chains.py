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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.guidance.dynamics import Dynamics, Schedule
from pushforward.guidance.energies.energy import check_finite, total
from pushforward.guidance.tempering import Ladder, spacings
from pushforward.maps.code import GaussianStream, derive_seed

__all__ = ["Chains", "Draw", "Point", "Record", "Target", "walk"]

_PROJECTIONS = 8  # directions in which chains are compared, beside their energies
_JITTER = 0.2  # part by which steps of several leaps vary, so that no trajectory comes back to where it began
# Of dual averaging (Hoffman & Gelman, section 3.2.1), with a gain five times as gentle: with theirs, steps collapse in
# the first moves from the prior, and warm-ups of some dozen moves, as here, do not forget it.
_GAIN, _DELAY, _DECAY = 0.25, 10.0, 0.75
_RUNG = 40  # bits of a chain's number: above them, its rung's
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
        return total(self.energies)

    def placed(self, rows: Tensor, other: Point) -> Point:
        """The point with what another one knows of the codes numbered `rows (n,)`."""
        return Point(
            self.images.index_copy(0, rows, other.images),
            {name: value.index_copy(0, rows, other.energies[name]) for name, value in self.energies.items()},
            self.slope.index_copy(0, rows, other.slope),
        )

    def some(self, which: Tensor | slice) -> Point:
        """What is known of some of its codes: a mask `(chains,)`, numbers, or a slice."""
        energies = {name: value[which] for name, value in self.energies.items()}
        return Point(self.images[which], energies, self.slope[which])

    @classmethod
    def together(cls, pieces: Sequence[Point]) -> Point:
        """What is known of the codes of several points, one after another."""
        images, energies, slopes = zip(*pieces, strict=True)
        parts = {name: torch.cat([piece[name] for piece in energies]) for name in energies[0]}
        return cls(torch.cat(images), parts, torch.cat(slopes))

    def check(self, when: str, first: int = 0) -> None:
        """Raise unless all is finite; chains are counted from `first`.

        Raises:
            PushforwardError: an energy is not, by its name, or the gradient.
        """
        check_finite(self.energies, f"chain {{}} {when}", first)
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
        swaps: of ladders, probabilities that neighbours had to swap, `(rungs - 1, chains)`, from weight 1 on.
        arrived: of ladders, 1 where a state has come from the prior to weight 1 anew.
    """

    energies: Mapping[str, Tensor]
    prior: Tensor
    acceptance: Tensor
    step: Tensor
    projections: Tensor
    swaps: Tensor | None = None
    arrived: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, energies: Mapping[str, Tensor], acceptance: Tensor, step: Tensor) -> Record:
        """The record of variables `x (chains, numbers)`."""
        projections = (x @ _directions(x.shape[1]).to(x)).T.double()
        return cls(dict(energies), 0.5 * x.double().square().sum(1), acceptance, step, projections)

    @property
    def energy(self) -> Tensor:
        """The sum of all terms."""
        return total(self.energies)


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
        variables: where they are, `(chains, numbers)`; of ladders, rung after rung from weight 1 on.
        point: what the target knows of them.
        tuning: of dual averaging, `(3, chains)`, float64: mean error, and logarithms of the step and its mean.
        log_weights: of annealed chains, `(chains,)`, float64.
        history: a record a step; the first is of the beginning.
        draws: states that were kept.
        nfe: network evaluations of each chain, `(chains,)`, where they are known; of ladders, of all rungs.
        ladder: weights of the rungs, if there are several.
    """

    variables: Tensor
    point: Point
    tuning: Tensor
    log_weights: Tensor
    history: tuple[Record, ...] = ()
    draws: tuple[Draw, ...] = ()
    nfe: Tensor | None = None
    ladder: Ladder | None = None

    @property
    def step(self) -> int:
        """Moves so far."""
        return len(self.history) - 1

    @property
    def rungs(self) -> int:
        """Rungs of each chain; 1 without a ladder."""
        return 1 if self.ladder is None else len(self.ladder.betas)


# -- a walk ------------------------------------------------------------------------------------------------------------


def walk(
    target: Target, begin: Tensor | Chains, sampler: Dynamics, schedule: Schedule, *, seed: int = 0, first: int = 0
) -> Iterator[Chains]:
    """The chains at their beginning, and after every step.

    Args:
        target: energy and gradient.
        begin: variables `(chains, numbers)`, of ladders rung after rung; or chains that go on.
        sampler: how they move.
        schedule: what is done when.
        seed: seed of all noise.
        first: number of the first chain.

    Raises:
        PushforwardError: an energy that is not finite at the beginning, or chains that diverge.
    """
    chains = begin if isinstance(begin, Chains) else _begun(target, begin, sampler, schedule, first)
    yield chains
    while chains.step < schedule.steps:
        chains = _moved(target, chains, sampler, schedule, seed, first)
        yield chains


def _begun(target: Target, x: Tensor, sampler: Dynamics, schedule: Schedule, first: int) -> Chains:
    point, rungs = target(x), schedule.rungs
    for rung in torch.arange(len(x), device=x.device).chunk(rungs):
        point.some(rung).check("at the beginning", first)
    none = x.new_zeros(len(x), dtype=torch.float64)
    tuning = torch.stack([none, none + math.log(sampler.step), none + math.log(sampler.step)])
    one, *others = none.chunk(rungs)
    cold = slice(len(one))
    record = Record.of(x[cold], point.some(cold).energies, one + 1, one + sampler.step)
    if rungs == 1:
        return Chains(x, point, tuning, one, (record,))
    record = replace(record, swaps=torch.stack(others), arrived=one)
    return Chains(x, point, tuning, one, (record,), ladder=Ladder.begun(rungs, one))


def _moved(target: Target, chains: Chains, sampler: Dynamics, schedule: Schedule, seed: int, first: int) -> Chains:
    """The chains one step on."""
    x, now, step, ladder, count = chains.variables, chains.point, chains.step, chains.ladder, len(chains.log_weights)
    own, numbers = derive_seed(seed, step + 1), range(first, first + count)
    streams = [number + (rung << _RUNG) for rung in range(chains.rungs) for number in numbers]
    noise = GaussianStream(own, streams, (x.shape[1] + 2,)).draw().to(x)
    weight = schedule.weight(step)
    log_weights, weights = chains.log_weights, torch.full_like(chains.tuning[0], weight)
    if schedule.anneal:
        log_weights = log_weights - (weight - (schedule.weight(step - 1) if step else 0.0)) * now.energy
    if ladder is not None:
        weights = ladder.betas.flatten()
    walking = slice(len(x) if ladder is None else len(x) - count)  # the last rung is drawn from the prior
    more = partial(GaussianStream, derive_seed(own, 1), streams[walking], ())
    x, now, tuning, probability, length = _walked(
        target, x[walking], now.some(walking), chains.tuning[:, walking], sampler, weights[walking], noise[walking],
        more, step + 1 if step < schedule.warmed else 0,
    )  # fmt: skip
    if not sampler.adjusted and not bool(probability.all()):
        chain = first + int((probability == 0).nonzero()[0, 0]) % count
        raise PushforwardError(
            f"Chain {chain} diverged in move {step + 1}: its image is far outside the data, or its energy not finite. "
            "Take a smaller step size, or mala."
        )
    if ladder is None:
        return _recorded(chains, schedule, x, now, tuning, log_weights, probability, length)
    prior = torch.arange(len(x), len(x) + count, device=x.device)
    free = noise[prior, :-2]
    x, now = torch.cat([x, free]), Point.together([now, target(free, prior)])
    luck = GaussianStream(derive_seed(own, 2), numbers, (chains.rungs - 1,)).draw()
    sound = now.energy.where(now.slope.isfinite().all(1), torch.inf).view_as(ladder.betas)
    ladder, order, swaps, arrived = ladder.swapped(sound, _uniform(luck.T).to(sound))
    place = (order * count + torch.arange(count, device=x.device)).flatten()
    after = _recorded(chains, schedule, x[place], now.some(place), torch.cat([tuning, chains.tuning[:, prior]], 1),
                      log_weights, probability[:count], length[:count])  # fmt: skip
    record = replace(after.history[-1], swaps=swaps, arrived=arrived)
    history = (*chains.history, record)
    if after.step in spacings(schedule.warmed):
        ladder = ladder.spaced(
            torch.stack([past.swaps for past in history[-(after.step // 2) :] if past.swaps is not None])
        )
    return replace(after, history=history, ladder=ladder)


def _walked(
    target: Target, x: Tensor, now: Point, tuning: Tensor, sampler: Dynamics, weights: Tensor, noise: Tensor,
    more: Callable[[], GaussianStream], warm: int,
) -> tuple[Tensor, Point, Tensor, Tensor, Tensor]:  # fmt: skip
    """Where chains are after a move, what is known there, their tuning, probabilities of accepting, and lengths.

    Args:
        target: energy and gradient.
        x: where they are, `(chains, numbers)`.
        now: what is known there.
        tuning: of dual averaging.
        sampler: how they move.
        weights: by which the energy counts, `(chains,)`, float64.
        noise: standard normal numbers, `(chains, numbers + 2)`.
        more: makes the streams of further ones, for slices.
        warm: number of the move in the warm-up, counted from 1; 0 after it.
    """
    velocity = noise[:, :-2]
    accept, vary = _uniform(noise[:, -2:]).unbind(1)
    if sampler.sliced:
        level = accept.log() - weights * now.energy
        y, then, probability, length = _sliced(target, x, velocity, now, level, 2 * math.pi * vary, more(), weights)
        return y, then, tuning, probability, length
    warming = sampler.adjusted and sampler.adapted and warm > 0
    length = tuning[1 if warming else 2].exp()
    if sampler.leaps > 1:
        length = length * (1 + _JITTER * (2 * vary - 1))
    y, faster, then, lost = _leaps(target, x, velocity, now, length.to(x)[:, None], sampler, weights)
    before, after = (
        0.5 * (a.double().square().sum(1) + v.double().square().sum(1)) + weights * point.energy
        for a, v, point in ((x, velocity, now), (y, faster, then))
    )
    lost = lost | ~after.isfinite()
    probability = torch.where(lost, 0.0, (before - after).clamp(max=0).exp())
    if not sampler.adjusted:
        return y, then, tuning, (~lost).to(probability), length
    if warming:
        tuning = _tuned(tuning, probability, warm, sampler)
    taken = (accept < probability).nonzero()[:, 0]
    return x.index_copy(0, taken, y[taken]), now.placed(taken, then.some(taken)), tuning, probability, length


def _recorded(
    before: Chains, schedule: Schedule, x: Tensor, now: Point, tuning: Tensor, log_weights: Tensor, probability: Tensor,
    length: Tensor,
) -> Chains:  # fmt: skip
    """The chains after a move, with its record, and a draw if one is kept."""
    draws, step, one = before.draws, before.step + 1, slice(len(log_weights))
    energies = now.some(one).energies
    if step in schedule.kept:
        draws = (*draws, Draw(step, x[one], now.images[one], energies, log_weights))
    record = Record.of(x[one], energies, probability, length)
    return Chains(x, now, tuning, log_weights, (*before.history, record), draws)


def _uniform(normal: Tensor) -> Tensor:
    """Numbers between 0 and 1, float64, of standard normal ones."""
    return torch.special.ndtr(normal.double())


def _sliced(
    target: Target, x: Tensor, velocity: Tensor, now: Point, level: Tensor, angle: Tensor, more: GaussianStream,
    weights: Tensor,
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
        above = -weights[left] * point.energy > level[left]  # not where the energy is not a number
        rows = left[above]
        y[rows], found[rows] = place[above], angle[rows]
        now = now.placed(rows, point.some(above))
        left = left[~above]
        if not len(left):
            break
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
        part = _uniform(more.draw(left.tolist()).to(angle))
        angle = angle.index_copy(0, left, low[left] + (high - low)[left] * part)
    return y, now, 1 / tried, found.abs()


def _leaps(
    target: Target, x: Tensor, velocity: Tensor, now: Point, h: Tensor, sampler: Dynamics, weights: Tensor
) -> tuple[Tensor, Tensor, Point, Tensor]:
    """End and velocity after the leaps, what is known there, and which chains left the finite numbers.

    A lost chain goes on from where it began, so that the others' batch stays whole.
    """
    lost = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    begin, start, point = x, velocity, now
    cos, sin, weight = h.cos(), h.sin(), weights.to(x)[:, None]

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
    generator = torch.Generator().manual_seed(0)
    return torch.randn(numbers, _PROJECTIONS, generator=generator, dtype=torch.float32, device="cpu") / numbers**0.5
