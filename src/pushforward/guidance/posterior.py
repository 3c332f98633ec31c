"""Plug-and-play guidance in the space of codes.

Codes are standard normal, so wishes about their images, told by an energy E, make a posterior over codes

    p(z | y)  ~  N(z; 0, I) exp(-E(decode(z), z)),

for every map `decode` from codes to images: a diffusion model of any process and plan, its noises among the variables,
or a GAN. `guide` draws from it by Markov chains (`guidance.chains`), and `best` seeks the single codes of least energy,
which are *no* samples. The picture that the energy saw is the picture that comes out: one plan decodes for both.

References:
    Unifying Diffusion Models' Latent Space, Wu & De la Torre, arXiv 2210.05559, section 4.3;
    ReNO, Eyring et al., arXiv 2406.04312 (the prior of `best`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.data.words import many
from pushforward.errors import Diverged, FarOutside, PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.guidance.chains import Chains, Point, Record, walk
from pushforward.guidance.decoding import Counted
from pushforward.guidance.dynamics import Dynamics, Schedule, langevin
from pushforward.guidance.energies.codes import chi, gaussian
from pushforward.guidance.energies.energy import Energy, Function, of, total
from pushforward.guidance.optimisers import OptimiserName, State, optimiser_of
from pushforward.maps.code import Code, derive_seed, whole_numbers
from pushforward.maps.protocol import Pushforward

__all__ = ["Descents", "Evidence", "Guided", "Prior", "best", "guide", "target_of", "with_prior"]

Prior = Literal["chi", "gaussian"]

_LANGEVIN, _SCHEDULE = langevin(), Schedule()
_COPIES = 5  # of all codes, that a move holds: where chains are and where they go, the gradients there, and the noise
_PRIORS: Mapping[str, Callable[[], Energy]] = {"chi": chi, "gaussian": gaussian}


@dataclass(frozen=True)
class Evidence:
    """How probable low energies are of themselves: `Z = E[exp(-energy)]` over the map's own images, by particles.

    Args:
        log: logarithm of the estimate of Z; the estimate is unbiased, but with adaptive temperatures.
        error: standard error of `log`; estimated from the weights of one population, measured with several. Where
            `effective` is below a tenth, weights have a heavy tail: `log` is then likely too low, and the error too
            small.
        populations: independent ones.
        effective: share of the particles that the weights were worth when they were worth least.
        resampled: times that a population was resampled, on average.
        ancestors: different first particles that the samples descend from.
    """

    log: float
    error: float
    populations: int
    effective: float
    resampled: float
    ancestors: int


@dataclass(frozen=True, eq=False)
class Guided:
    """Codes and their images: of chains one draw of all after another, or the best of each.

    Args:
        code: as `decode` takes it, on the CPU.
        images: in [-1, 1], `(samples, channels, height, width)`, on the CPU.
        energies: each term times its weight, `(samples,)` by name, float64.
        weights: weights of the samples, `(samples,)`, their sum 1; equal unless the chains were annealed.
        chain: number of the chain that each is of, `(samples,)`.
        nfe: network evaluations of each chain, `(chains,)`; a vector-Jacobian product counts as one.
        history: a record a step; the first is of the beginning. Empty for particles.
        evidence: of particles.
    """

    code: Code
    images: Tensor = field(repr=False)
    energies: Mapping[str, Tensor] = field(repr=False)
    weights: Tensor = field(repr=False)
    chain: Tensor = field(repr=False)
    nfe: Tensor = field(repr=False)
    history: tuple[Record, ...] = field(repr=False)
    evidence: Evidence | None = None

    @property
    def energy(self) -> Tensor:
        """The sum of all terms, `(samples,)`."""
        return total(self.energies)


@dataclass(frozen=True, eq=False)
class Descents:
    """Descents after some steps: all that is needed to go on.

    Args:
        state: state of the method, see `guidance.optimisers`; its `point` is where the next gradient is taken.
        variables: the best so far, `(count, numbers)`.
        point: what is known of them.
        history: a record a step; the first is of the beginning.
        nfe: network evaluations of each, `(count,)`.
    """

    state: State
    variables: Tensor
    point: Point
    history: tuple[Record, ...]
    nfe: Tensor

    @property
    def step(self) -> int:
        """Steps so far."""
        return len(self.history) - 1


@undisturbed
@torch.no_grad()
def guide(
    pushforward: Pushforward,
    energy: Energy | Function,
    dynamics: Dynamics = _LANGEVIN,
    schedule: Schedule = _SCHEDULE,
    *,
    chains: int = 16,
    seed: int = 0,
    first: int = 0,
    begin: Code | None = None,
    resume: Chains | None = None,
    batch: int = 64,
    callback: Callable[[Chains], None] | None = None,
) -> Guided:
    """Samples of the posterior of codes under an energy, by chains that know nothing of one another.

    `pushforward.guide` says what the arguments are. The map is bound to the classes or prompts of the chains; a
    diffusion is differentiated as its `run_by` says, by default with the memory of one network call.

    Raises:
        PushforwardError: an energy that gives not one finite number per image with a gradient; chains that diverge;
            arguments that do not fit together; and as `Diffusion.decode`.
    """
    target = target_of(
        pushforward, energy, chains, seed, first, begin, batch, gradient=dynamics.gradient, rungs=schedule.rungs
    )
    if resume is not None:
        if resume.rungs != schedule.rungs:
            raise PushforwardError(f"The chains to go on with have {many(resume.rungs, 'rung')}, not {schedule.rungs}.")
        _go_on("chains", resume, target)
    if begin is not None and schedule.anneal:
        raise PushforwardError(
            "Annealed chains begin at draws of the prior, by which they are weighted; leave `begin` out."
        )
    before = 0 if resume is None or resume.nfe is None else resume.nfe
    state = None
    for step in walk(target, resume or target.code.variables(), dynamics, schedule, seed=seed, first=first):
        state = replace(step, nfe=before + target.counted.nfe.view(-1, chains).sum(0))
        if callback is not None:
            callback(state)
    assert state is not None  # a walk has a beginning
    draws = state.draws
    if not draws:
        raise PushforwardError(
            f"Chains of {many(state.step, 'step')} kept no draw: resume them with the schedule that they began with."
        )
    one = target.code[:chains]
    code = Code.cat([one.with_variables(draw.variables) for draw in draws])
    energies = {name: torch.cat([draw.energies[name] for draw in draws]).cpu() for name in draws[0].energies}
    weights = torch.cat([draw.log_weights for draw in draws]).softmax(0).cpu()
    number = torch.arange(first, first + chains, device="cpu").repeat(len(draws))
    images = torch.cat([draw.images for draw in draws]).float().cpu()
    assert state.nfe is not None
    return Guided(code, images, energies, weights, number, state.nfe.cpu(), state.history)


@undisturbed
@torch.no_grad()
def best(
    pushforward: Pushforward,
    energy: Energy | Function,
    *,
    optimiser: OptimiserName = "adam",
    steps: int = 100,
    learning_rate: float | None = None,
    prior: Prior | None = "chi",
    candidates: int = 1,
    count: int = 1,
    seed: int = 0,
    first: int = 0,
    begin: Code | None = None,
    resume: Descents | None = None,
    batch: int = 64,
    callback: Callable[[Descents], None] | None = None,
) -> Guided:
    """The codes of least energy that a descent finds: single best images, not samples of the posterior.

    Args:
        pushforward: what makes images of codes: a `Diffusion` with any plan, or a GAN, bound to classes or prompts.
        energy: `(images, code) -> (count,)`, or a sum of several; see `guidance.energies`.
        optimiser: `adam`; `l-bfgs` with a line search; or `white`, which moves among codes with the spectrum of noise
            and takes fewer steps than Adam.
        steps: moves, with a gradient each and one at the beginning.
        learning_rate: Adam's, 0.05 by default; the root mean square of the first move of L-BFGS, 0.05, or of the steps
            of `white`, 0.6. A code's own is 1.
        prior: added to the energy. `chi` keeps a code as long as codes are; `gaussian` draws it to 0, where no codes
            are, and is there for comparison; `None` lets it go anywhere. `white` needs none.
        candidates: codes drawn for each descent, which begins at the one of least energy. An image of each is decoded,
            without a gradient, which costs about half a move.
        count: descents, each from a code of its own.
        seed: of where they begin.
        first: number of the first one.
        begin: codes to begin at; by default those that `sample` draws, and further ones as candidates.
        resume: descents of an earlier call with the same arguments, to go on with.
        batch: images at a time.
        callback: told at the beginning and after every step.

    Returns:
        The best code of each descent of all it tried, with equal weights.

    Raises:
        PushforwardError: as `guide`; or no such optimiser, or numbers out of range.
    """
    method, learning_rate = optimiser_of(optimiser, steps, learning_rate)
    if prior not in (None, *_PRIORS):
        raise PushforwardError(f"The prior of a descent is {', '.join(_PRIORS)} or None; got {prior!r}.")
    (candidates,) = whole_numbers("Candidates", candidates)
    if candidates < 1 or (candidates > 1 and begin is not None):
        raise PushforwardError(
            f"A descent begins at the best of 1 candidate or more, or at a code that is given; got {candidates} "
            f"candidates{'' if begin is None else ' and codes to begin at'}."
        )
    target = target_of(pushforward, with_prior(energy, prior), count, seed, first, begin, batch)
    if resume is not None:
        _go_on("descents", resume, target)
    before, x = 0 if resume is None else resume.nfe, target.code.variables()
    if candidates > 1 and resume is None:
        more = (pushforward.draw(count, seed=derive_seed(seed, k), first=first) for k in range(1, candidates))
        drawn, free = torch.stack([x, *(code.variables() for code in more)]), replace(target, gradient=False)
        lowest = torch.stack([free(one).energy for one in drawn]).nan_to_num(torch.inf).argmin(0)
        x = drawn[lowest, torch.arange(len(x), device=x.device)]
    now, state, shape = resume, method.begin(x), target.code.start.shape[1:]
    if resume is not None:
        wanted, found = ({k: (v.shape, v.dtype) for k, v in one.items()} for one in (state, resume.state))
        if wanted != found:
            raise PushforwardError(f"The descents to go on with are not of {optimiser}: begin anew.")
        state = resume.state
    while now is None or (now.step < steps and not bool(state["stuck"].all())):
        x, alive = state["point"], (~state["stuck"]).nonzero()[:, 0]
        point = target(x[alive], alive)
        if now is None:
            point.check("at the beginning", first)
            variables, least = x, point
        else:
            point = now.point.placed(alive, point)
            better = ((point.energy < now.point.energy) & point.slope.isfinite().all(1)).nonzero()[:, 0]
            variables = now.variables.index_copy(0, better, x[better])
            least = now.point.placed(better, point.some(better))
        one = point.energy.new_ones(len(x))
        record = Record.of(x, point.energies, one, learning_rate * one)
        state = method.advance(state, point.energy, point.slope, learning_rate, shape)
        history = (record,) if now is None else (*now.history, record)
        now = Descents(state, variables, least, history, before + target.counted.nfe)
        if callback is not None:
            callback(now)
    code = Code.cat([target.code.with_variables(now.variables)])
    equal = torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
    number = torch.arange(first, first + count, device="cpu")
    energies = {name: value.cpu() for name, value in now.point.energies.items()}
    return Guided(code, now.point.images.float().cpu(), energies, equal, number, now.nfe.cpu(), now.history)


def with_prior(energy: Energy | Function, prior: Prior | None) -> Energy:
    """What a descent lowers: an energy, and that of its prior, if it has one."""
    return of(energy) if prior is None else of(energy) + _PRIORS[prior]()


# -- the posterior -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Target:
    """Energy of variables, and its `gradient` if asked for, `batch` chains at a time."""

    counted: Counted
    energy: Energy
    code: Code
    batch: int
    gradient: bool = True
    seen: list[Point] = field(default_factory=list)  # the first point that could be decoded

    def __call__(self, x: Tensor, some: Tensor | None = None) -> Point:
        """What is known at variables `(n, numbers)`, those of the images `some (n,)`: by default, all."""
        some = torch.arange(len(x), device=x.device) if some is None else some
        point = Point.together(
            [self._some(*piece) for piece in zip(x.split(self.batch), some.split(self.batch), strict=True)]
        )
        if not self.seen:
            self.seen.append(point)
        return point

    def _some(self, x: Tensor, some: Tensor) -> Point:
        """As above; what cannot be decoded, too far from all codes, has infinite energy."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FarOutside)
                return self._decoded(x, some)
        except Diverged:
            if not self.seen:
                raise
            if len(some) > 1:
                halves = (some[: len(some) // 2], some[len(some) // 2 :])
                return Point.together(
                    [self._some(*half) for half in zip(x.split([*map(len, halves)]), halves, strict=True)]
                )
            first = self.seen[0]
            energies = {name: torch.full_like(value[:1], torch.inf) for name, value in first.energies.items()}
            return Point(torch.zeros_like(first.images[:1]), energies, torch.zeros_like(x))

    def _decoded(self, x: Tensor, some: Tensor) -> Point:
        with torch.set_grad_enabled(self.gradient):
            variables = x.detach().requires_grad_(self.gradient)
            code = self.code[some].with_variables(variables)
            images = self.counted.decode(code, some)
            parts = self.energy.parts(images, code)
            slope = torch.zeros_like(x)
            if self.gradient:
                (slope,) = torch.autograd.grad(total(parts).sum(), variables, allow_unused=True)
        if slope is None:
            names = ", ".join(parts)
            raise PushforwardError(
                f"Energy {names} has no gradient in the code: compute it from the images or the code, without "
                "detach(); or sample by ess or pcn, which need none."
            )
        return Point(images.detach(), {name: value.detach().double() for name, value in parts.items()}, slope)


def target_of(
    pushforward: Pushforward,
    energy: Energy | Function,
    count: int,
    seed: int,
    first: int,
    begin: Code | None,
    batch: int,
    gradient: bool = True,
    rungs: int = 1,
) -> _Target:
    """The posterior of `count` codes, of which its `code` are the ones to begin at; of ladders, rung after rung."""
    count, first, batch = whole_numbers("Numbers of chains and batches", count, first, batch)
    if count < 1 or batch < 1:
        raise PushforwardError(f"Guidance needs 1 chain or more, and as many at a time; got {count} and {batch}.")
    if not of(energy).terms:
        raise PushforwardError("An energy without terms guides nothing; give one term or more.")
    counted = Counted.of(pushforward, count, gradient=gradient)
    code = pushforward.draw(count, seed=seed, first=first)
    if begin is not None:
        given, wanted = ([x if x is None else tuple(x.shape) for x in (c.start, c.noises)] for c in (begin, code))
        if given != wanted:
            raise PushforwardError(
                f"{count} chains of this plan begin at codes with a start of shape {wanted[0]} and noises of shape "
                f"{wanted[1]}; got {given[0]} and {given[1]}."
            )
        code = begin.to(code.start)
    if rungs > 1:
        numbers = _COPIES * code.variables().numel() * code.start.itemsize
        check_memory(numbers * rungs, f"The {rungs:,} rungs of {count:,} chains", code.start.device)
        every = torch.arange(count, device=code.start.device).repeat(rungs)
        counted = Counted.of(counted.pushforward.some(every), len(every), gradient=gradient)
        codes = [code if begin is not None else pushforward.draw(count, seed=derive_seed(seed, rung), first=first)
                 for rung in range(1, rungs)]  # fmt: skip
        code = code[every].with_variables(torch.cat([one.variables() for one in (code, *codes)]))
    return _Target(counted, of(energy), code, batch, gradient)


def _go_on(what: str, before: Chains | Descents, target: _Target) -> None:
    """Tell a target what an earlier run has seen; raise unless chains or descents can go on with it."""
    wanted, terms = target.code.variables(), [term.name for term in target.energy.terms]
    if before.variables.shape != wanted.shape or list(before.point.energies) != terms:
        raise PushforwardError(
            f"The {what} to go on with have {len(before.variables)} x {before.variables.shape[1]} variables and the "
            f"energies {', '.join(before.point.energies)}; these are {len(wanted)} x {wanted.shape[1]}, and "
            f"{', '.join(terms)}."
        )
    if before.variables.device != wanted.device:
        raise PushforwardError(
            f"The {what} to go on with are on {before.variables.device}, the model is on {wanted.device}."
        )
    target.seen.append(before.point)
