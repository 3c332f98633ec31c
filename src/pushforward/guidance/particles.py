r"""Particles: many images made together by a stochastic plan, of which the promising are multiplied on the way.

The paths of a plan, tilted by `exp(-E(image))` of the image in which they end, are approached step by step. At chosen
steps k the energy E_k of the *denoised* image `E[u_0 | u_k]` foretells the last one, and a particle's weight is
multiplied by

    G_k = exp(-(lambda_k E_k - lambda_{k-1} E_{k-1})),        at the end exp(-(E(image) - lambda_k E_k)).

The product is `exp(-E(image))` whatever was foretold, so the weighted particles are samples of the tilted law, and the
mean weight is an unbiased estimate of the evidence `Z = E[exp(-E(image))]` under the plan's own law. Where few
particles have most of the weight, they are *resampled* systematically: each leaves children in proportion to its
weight, which share its code so far and take fresh noise from there on. What comes out are codes like any others, that
decode to their images.

`psi` draws the first particles by annealed chains on the part of the code that one step's denoised image is made of,
with the weights of annealed importance sampling: their steps are not adapted, so that the estimate stays unbiased.

The error of the evidence is estimated by how the final weight is spread over the first particles that it descends
from; several independent populations measure it.

References:
    Feynman-Kac Formulae, Del Moral (2004); Feynman-Kac steering, Singhal et al., arXiv 2501.06848;
    Psi-Sampler, Yoon et al., arXiv 2506.01320;
    A general theory of particle filters in hidden Markov models, Chan & Lai, arXiv 1312.5114 (the error);
    Annealed Importance Sampling, Neal, arXiv physics/9803008.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.memory import check_memory
from pushforward.denoiser import at_least_float32
from pushforward.errors import PushforwardError
from pushforward.execute import Progress
from pushforward.execute.host import undisturbed
from pushforward.execute.sequential import steps
from pushforward.guidance.chains import walk
from pushforward.guidance.dynamics import Dynamics, Schedule, mala
from pushforward.guidance.energies.energy import Energy, Function, check_finite, of, total
from pushforward.guidance.posterior import Evidence, Guided, target_of
from pushforward.linear import Operator
from pushforward.maps.code import Code, GaussianStream, derive_seed, whole_numbers
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.protocol import Pushforward
from pushforward.plan import Plan, Register
from pushforward.plan.plan import Node

__all__ = ["PARTICLES", "Lead", "Particles", "fk", "guide", "psi"]

Temper = Literal["adaptive", "increase", "constant"]

_HALVINGS = 40  # in the search for an adaptive temperature


@dataclass(frozen=True)
class Lead:
    """Chains that draw the first particles.

    Args:
        dynamics: how they move; their step stays as given.
        moves: how many each chain makes, while the weight of the energy grows to its full size.
        at: the step whose denoised image they see, as a share of the plan's network calls; 0 is the first.
    """

    dynamics: Dynamics
    moves: int
    at: float

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.moves < 2 or not 0 <= self.at < 1:
            raise PushforwardError(
                f"The chains of psi need 2 moves or more, at a share of the steps from 0 to below 1; got {self.moves} "
                f"and {self.at:g}."
            )
        if not self.dynamics.adjusted:
            raise PushforwardError("Unadjusted chains give no weights; draw the first particles by mala, pcn or ess.")


@dataclass(frozen=True)
class Particles:
    """How particles go through a plan; made by `fk` and `psi`.

    Args:
        particles: per image that is returned; with 1, all are returned with their weights, else so many of equal
            weight are drawn of each population.
        populations: that know nothing of one another, of which each returns an equal part of the images.
        share: part of the particles; when their effective number is below it, they resample. 0: never.
        temper: how lambda goes up to 1: `increase`, as the signal's share `snr / (1 + snr)`; `adaptive`, as far
            towards that as leaves the effective `share` of the particles (the evidence is then unbiased only in the
            limit of many particles); `constant`, 1 from the beginning.
        checks: times that particles are weighted on the way, evenly spaced; at all network calls by default.
        lead: chains that draw the first particles.
    """

    particles: int = 1
    populations: int = 1
    share: float = 0.5
    temper: Temper = "adaptive"
    checks: int | None = None
    lead: Lead | None = None

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.particles < 1 or self.populations < 1 or not 0 <= self.share <= 1 or (self.checks or 0) < 0:
            raise PushforwardError(
                "Particles need 1 or more per image, 1 population or more, a share from 0 to 1 and no negative number "
                f"of checks; got {self.particles}, {self.populations}, {self.share:g} and {self.checks}."
            )


def fk(
    particles: int = 1, *, populations: int = 1, share: float = 0.5, temper: Temper = "adaptive",
    checks: int | None = None,
) -> Particles:  # fmt: skip
    """Feynman-Kac steering: particles weighted on the way by the energy of the denoised image, with no gradient.

    Args:
        particles: per image; see `Particles`.
        populations: independent ones, whose evidences measure the error.
        share: effective share of the particles below which they are resampled.
        temper: `adaptive`, `increase` or `constant`.
        checks: times that they are weighted on the way.
    """
    return Particles(particles, populations, share, temper, checks)


def psi(
    particles: int = 1, *, populations: int = 1, share: float = 0.5, temper: Temper = "constant",
    checks: int | None = None, dynamics: Dynamics | None = None, moves: int = 10, at: float = 0.0,
) -> Particles:  # fmt: skip
    """Ψ-Sampler: chains on codes, by the energy of a denoised image, draw the first particles; then as `fk`.

    Args:
        particles: per image; see `Particles`.
        populations: independent ones, whose evidences measure the error.
        share: effective share of the particles below which they are resampled.
        temper: `constant`, `increase` or `adaptive`.
        checks: times that they are weighted on the way.
        dynamics: how the chains move, `mala()` by default; `pcn` and `ess` need no gradient.
        moves: how many each chain makes.
        at: the step whose denoised image they see, as a share of the plan's network calls. At the first, models that
            are not distilled see a mean of all images.
    """
    return Particles(particles, populations, share, temper, checks, Lead(dynamics or mala(), moves, at))


PARTICLES: Mapping[str, Callable[..., Particles]] = {"fk": fk, "psi": psi}


@undisturbed
@torch.no_grad()
def guide(
    pushforward: Pushforward,
    energy: Energy | Function,
    sampler: Particles,
    *,
    chains: int = 16,
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
    callback: Callable[[Progress], None] | None = None,
) -> Guided:
    """Samples of a plan's images tilted by `exp(-energy)`, by particles, with the evidence.

    Args:
        pushforward: a `Diffusion` with a stochastic plan, bound to one class or prompt for each population, or none.
        energy: `(images, code) -> (count,)`, or a sum of several; no gradient is needed.
        sampler: `fk` or `psi`.
        chains: images that are returned.
        seed: seeds all noise.
        first: number of the first image: a population depends on the seed and the numbers of its images alone.
        batch: images that the network and the energy see at a time.
        callback: told after every network call about all particles of a population.

    Raises:
        PushforwardError: a map that is no diffusion, or a plan without noise; an energy that gives not one finite
            number per image; arguments that do not fit together.
    """
    chains, first, batch = whole_numbers("Numbers of images and batches", chains, first, batch)
    if chains < 1 or batch < 1 or chains % sampler.populations:
        raise PushforwardError(
            f"Particles need 1 image or more, as many at a time, and an equal part of the images in each population; "
            f"got {chains}, {batch} and {sampler.populations} populations."
        )
    if not of(energy).terms:
        raise PushforwardError("An energy without terms guides nothing; give one term or more.")
    diffusion, size = _checked(pushforward), chains // sampler.populations
    diffusion.model_for(chains)
    found = []
    for k in range(0, chains, size):
        there = _under_one_condition(diffusion.some(slice(k, k + size)))
        found.append(_Population(there, of(energy), sampler, size, seed, first + k, batch).run(callback))
    logs = torch.stack([one.log_evidence for one in found])
    error = found[0].error
    if len(found) > 1:
        sizes = (logs - logs.max()).exp()
        error = float(sizes.std() / sizes.mean() / math.sqrt(len(found)))
    evidence = Evidence(
        float(_log_mean(logs)), error, len(found), min(one.effective for one in found),
        sum(one.resampled for one in found) / len(found), sum(one.ancestors for one in found),
    )  # fmt: skip
    weights = torch.cat([one.log_weights + log for one, log in zip(found, logs, strict=True)]).softmax(0)
    return Guided(
        Code.cat([one.code for one in found]),
        torch.cat([one.images for one in found]),
        {term.name: torch.cat([one.energies[term.name] for one in found]) for term in of(energy).terms},
        weights,
        torch.arange(first, first + chains, device="cpu"),
        torch.cat([one.nfe for one in found]),
        (),
        evidence,
    )


def _checked(pushforward: Pushforward) -> Diffusion:
    """The map, if particles can go through it."""
    if not isinstance(pushforward, Diffusion):
        raise PushforwardError(
            f"Particles go through the given steps of a diffusion's plan, and a {type(pushforward).__name__} has none; "
            "sample its codes by chains, such as ess."
        )
    if pushforward.parallel is not None:
        raise PushforwardError("Particles are chosen between the steps, which cannot be taken all at once.")
    plan = pushforward.plan
    if not plan.noises or plan.implicit:
        raise PushforwardError(
            f"Particles need a plan with noise, by which children come to differ from their parents; that of "
            f"{plan.solver!r} has none: take dpm++, gddim or exponential with noise=1, ddim with eta=1, ddpm or "
            "euler-maruyama."
        )
    return pushforward


def _under_one_condition(there: Diffusion) -> Diffusion:
    """The map of a population for any number of particles; raise if its images have different conditions."""
    if there.bound.conditions <= 1:
        return there
    labels = there.labels
    listed = labels.tolist() if isinstance(labels, Tensor) else [*labels] if isinstance(labels, Sequence) else []
    if len(set(listed)) != 1:
        raise PushforwardError(
            "The particles of a population are weighed against one another, so they need one label or prompt; give the "
            "same to all, or each its own population."
        )
    return there.some(torch.tensor([0], device="cpu"))


# -- a population ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Found:
    """What a population found: `images` with their weights, and the logarithm of its evidence."""

    code: Code
    images: Tensor
    energies: dict[str, Tensor]
    log_weights: Tensor  # which mean 1
    nfe: Tensor
    log_evidence: Tensor
    error: float
    effective: float
    resampled: int
    ancestors: int


class _Population:
    """The particles of a population, on their way.

    Args:
        diffusion: the map.
        energy: of its images.
        sampler: how they go.
        size: images to return.
        seed: seeds all noise.
        first: number of the first image.
        batch: particles that the network sees at a time.
    """

    def __init__(
        self, diffusion: Diffusion, energy: Energy, sampler: Particles, size: int, seed: int, first: int, batch: int
    ) -> None:
        self.diffusion, self.energy, self.sampler, self.size, self.batch = diffusion, energy, sampler, size, batch
        self.plan, self.count, self.seed = diffusion.plan, size * sampler.particles, seed
        self.model, self.number = diffusion.model_for(self.count), first * sampler.particles
        shape, dtype = self.model.state_shape(1)[1:], at_least_float32(diffusion.dtype)
        check_memory(
            4 * (len(self.plan.noises) + 2) * self.count * math.prod(shape), f"The codes of {self.count:,} particles"
        )
        self.stream = GaussianStream(seed, range(self.number, self.number + self.count), shape)
        self.uniform = torch.Generator().manual_seed(derive_seed(seed, ~self.number))
        self.start = self.stream.draw().to(dtype)
        self.noises = torch.empty(len(self.plan.noises), self.count, *shape, dtype=dtype, device="cpu")
        self.drawn = 0
        self.log_weights = torch.zeros(self.count, dtype=torch.float64, device="cpu")
        self.paid = torch.zeros(self.count, dtype=torch.float64, device="cpu")  # of the energy, by the weights so far
        self.ancestor = torch.arange(self.count, device="cpu")
        self.log_evidence = torch.zeros((), dtype=torch.float64, device="cpu")
        self.inverse_temperature, self.effective, self.resampled = 0.0, 1.0, 0

    @property
    def code(self) -> Code:
        """The codes so far."""
        return Code(self.start, self.noises[: self.drawn] if self.drawn else None)

    def run(self, callback: Callable[[Progress], None] | None) -> _Found:
        """Take all steps."""
        nfe, checks, given = self._begin()
        plan, start = self.plan, self.diffusion.start(self.start)
        ask = self.model.denoiser.at(plan.process, plan.asked_times, start)

        def noise(_: int) -> Tensor:
            own, k = self.stream.draw(), self.drawn  # which is passed over where chains have found another
            self.noises[k] = own if given is None or k >= len(given) else given[k]
            self.drawn += 1
            return self.noises[k]

        path = steps(plan, start, noise=noise)
        state = next(path)
        for call, time in enumerate(plan.asked_times.tolist()):
            answer = torch.cat([ask(call, state[some], some) for some in self._pieces()])
            if callback is not None:
                callback(Progress(call + 1, plan.nfe, time, state, answer, self.count, call))
            rows = self._weighed(total(self._energies(answer)[1]), checks[call]) if call in checks else None
            state = path.send((state, answer) if rows is None else (state, answer, rows))
        images, parts = self._energies(state)
        self._weighed(total(parts), 1.0, resample=False)
        return self._found(images, parts, nfe)

    def _pieces(self) -> Sequence[Tensor]:
        """The numbers of the particles that the network sees together."""
        return torch.arange(self.count, device="cpu").split(self.batch)

    def _begin(self) -> tuple[int, dict[int, float], Tensor | None]:
        """Network evaluations so far, lambda at the calls that weigh, and noises that chains have found."""
        plan, sampler = self.plan, self.sampler
        calls, number = range(plan.nfe), plan.nfe if sampler.checks is None else sampler.checks
        if number < plan.nfe:
            calls = [round(j * plan.nfe / (number + 1)) for j in range(1, number + 1)]  # type: ignore[assignment]
        lambdas = torch.ones(plan.nfe, dtype=torch.float64, device="cpu")
        if sampler.temper != "constant":
            lambdas = torch.sigmoid(2 * plan.process.log_snr(plan.asked_times))
        if sampler.lead is None:
            return self.count * plan.nfe, {call: float(lambdas[call]) for call in calls}, None
        lead = sampler.lead
        at = int(lead.at * plan.nfe)
        there = replace(self.diffusion, plan=_head(plan, plan.asked[at]))
        part = float(lambdas[at]) * self.energy
        target = target_of(there, part, self.count, self.seed, self.number, None, self.batch,
                           gradient=lead.dynamics.gradient)  # fmt: skip
        schedule = Schedule(lead.moves, lead.moves - 1, lead.moves - 1)
        moved = walk(target, target.code.variables(), replace(lead.dynamics, adapted=False), schedule,
                     seed=self.seed, first=self.number)  # fmt: skip
        (chains,) = deque(moved, maxlen=1)
        code = target.code.with_variables(chains.variables)
        self.start = code.start.to(self.start)
        self.log_weights, self.paid = chains.log_weights.cpu(), chains.point.energy.cpu()
        nfe = self.count * plan.nfe + int(target.counted.nfe.sum())
        return nfe, {call: float(lambdas[call]) for call in {at, *calls} if call >= at}, code.noises

    def _energies(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The images of clean states, and the value of each term of the energy, on the CPU."""
        images, found, code = [], [], self.code
        for some in self._pieces():
            there = self.model.images(states[some])
            found.append(self.energy.parts(there, code[some].to(states)))
            images.append(there.float().cpu())
        parts = {name: torch.cat([one[name].double().cpu() for one in found]) for name in found[0]}
        check_finite(parts, "particle {}", self.number)
        return torch.cat(images), parts

    def _weighed(self, energy: Tensor, inverse_temperature: float, *, resample: bool = True) -> Tensor | None:
        """Weigh particles by an energy; if few have most of the weight, resample them and return which go on."""
        before, least = self.log_weights + self.paid, self.sampler.share * self.count
        if self.sampler.temper == "adaptive" and resample:
            inverse_temperature = self._adaptive(before, energy, least, inverse_temperature)
        self.inverse_temperature, self.paid = inverse_temperature, inverse_temperature * energy
        self.log_weights = before - self.paid
        effective = _effective(self.log_weights)
        self.effective = min(self.effective, effective / self.count)
        if not resample or not effective < least:
            return None
        self.log_evidence = self.log_evidence + _log_mean(self.log_weights)
        rows = self._systematic(self.count)
        self.log_weights, self.resampled = torch.zeros_like(self.log_weights), self.resampled + 1
        self.start, self.paid, self.ancestor = self.start[rows], self.paid[rows], self.ancestor[rows]
        self.noises[: self.drawn] = self.noises[: self.drawn, rows]
        return rows

    def _adaptive(self, before: Tensor, energy: Tensor, least: float, high: float) -> float:
        """The greatest lambda up to the highest that leaves the effective share, no smaller than the last one."""
        low = self.inverse_temperature
        if _effective(before - energy) >= least:
            return high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if _effective(before - middle * energy) >= least else (low, middle)
        return high

    def _systematic(self, count: int) -> Tensor:
        """The numbers of particles drawn in proportion to their weights, evenly."""
        steps = self.log_weights.softmax(0).cumsum(0)
        offset = torch.rand((), dtype=torch.float64, generator=self.uniform, device="cpu")
        at = (torch.arange(count, device="cpu") + offset) / count
        return torch.searchsorted(steps, at * steps[-1], right=True).clamp(max=self.count - 1)

    def _found(self, images: Tensor, parts: dict[str, Tensor], nfe: int) -> _Found:
        """The images to return."""
        log_mean = _log_mean(self.log_weights)
        weights = self.log_weights.softmax(0)
        lines = torch.zeros_like(weights).index_add(0, self.ancestor, weights)  # of descendants of each first particle
        rows, log_weights = torch.arange(self.count, device="cpu"), self.log_weights - log_mean
        if self.sampler.particles > 1:
            rows, log_weights = self._systematic(self.size), torch.zeros(self.size, dtype=torch.float64, device="cpu")
        return _Found(
            self.code[rows], images[rows], {name: value[rows] for name, value in parts.items()}, log_weights,
            torch.full((self.size,), round(nfe / self.size), device="cpu"), self.log_evidence + log_mean,
            float((lines - 1 / self.count).square().sum().sqrt()), self.effective, self.resampled,
            len(self.ancestor[rows].unique()),
        )  # fmt: skip


def _head(plan: Plan, node: int) -> Plan:
    """The plan as far as a node, ending in the denoised state there."""
    end = Node(0.0, {Register("answer", node): Operator.scalar(1.0, plan.process.blocks)}, asks=False)
    steps = (*(k for k in plan.steps if k <= node), node + 1)
    return replace(plan, nodes=(*plan.nodes[: node + 1], end), steps=steps)


def _log_mean(logs: Tensor) -> Tensor:
    """The logarithm of the mean of numbers, from their logarithms; exactly 0 where these are."""
    most = logs.max()
    return most + (logs - most).exp().mean().log()


def _effective(log_weights: Tensor) -> float:
    """The effective number of weighted particles."""
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.sum().square() / weights.square().sum())
