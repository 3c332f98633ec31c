"""Images that follow a wish, told by an energy: one number per image, low where it is as wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.guidance import particles, posterior
from pushforward.guidance.chains import Chains
from pushforward.guidance.dynamics import Dynamics, Schedule, langevin
from pushforward.guidance.energies.energy import Energy, Function
from pushforward.guidance.particles import Particles
from pushforward.guidance.posterior import Guided
from pushforward.guidance.steering import STEERINGS, Steering, steered
from pushforward.maps.code import Code
from pushforward.maps.labels import UNSAID
from pushforward.maps.protocol import Pushforward
from pushforward.model import Model
from pushforward.verbs.samplers import AtOnce, Given, Solver, diffusion_of, read

__all__ = ["guide", "steer"]

_LANGEVIN, _SCHEDULE = langevin(), Schedule()
_Steered = TypeVar("_Steered", bound=Model)


@undisturbed
def guide(
    model: Model | Pushforward,
    energy: Energy | Function,
    dynamics: Dynamics | Particles = _LANGEVIN,
    schedule: Schedule = _SCHEDULE,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
    chains: int = 16,
    seed: int = 0,
    first: int = 0,
    begin: Code | None = None,
    resume: Chains | None = None,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Guided:
    """Draw images whose energy is low, by Markov chains over their codes: samples of `N(z; 0, I) exp(-E(image(z)))`.

        energy = 5 * energies.classifier(network, "sneaker")
        model.guide(energy, mala(), Schedule(steps=100), solver="dpm++", steps=4).images

    Or by particles, which go once through a stochastic solver's steps together and estimate the evidence too:

        found = model.guide(energy, fk(particles=8), chains=16)
        found.images, found.evidence.log

    Args:
        model: a model, or any map from codes to images, such as a GAN or a `Diffusion`, which has its own solver.
        energy: `(images, code) -> (count,)` or of the images alone, or a sum of several; see `energies`.
        dynamics: how the chains move: `langevin`, `mala` or `hmc`; or, without a gradient, `ess` or `pcn`. Or how
            particles go: `fk` or `psi`, which take no schedule and no codes to begin at or go on with.
        schedule: moves, warm-up, annealing, draws, and rungs of tempered chains.
        solver: words or a plan, as in `sample`, for a model; `dpm++` by default, `dpm++:noise=1` for particles.
        steps: number of steps, 10 by default, 20 for particles: the solver makes every image that the chains look at.
        labels: classes or prompts, as in `sample`, one per chain; by default what the model was given, or none.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        parallel: take all steps of the solver at once, as in `sample`.
        chains: how many; they know nothing of one another. Of particles: images that are returned.
        seed: seeds where the chains begin, and all noise.
        first: number of the first chain: chain i depends on the seed and `first + i` alone.
        begin: codes to begin at, one per chain; by default those that `sample` draws, as annealed chains must.
        resume: chains of an earlier call with the same arguments, to go on with.
        batch: chains at a time.
        callback: told at the beginning and after every move; of particles, after every network call (`Progress`).

    Returns:
        The `images`, their `code`, energies and weights, and the history of the chains or the evidence of particles.

    Raises:
        PushforwardError: an energy that gives not one finite number per image with a gradient; chains that diverge;
            arguments that do not fit together.
    """
    _check_ways(dynamics, schedule)
    if isinstance(model, Model):
        usual, few = ("dpm++:noise=1", 20) if isinstance(dynamics, Particles) else ("dpm++", 10)
        sampler = read(solver or usual, steps=steps, parallel=parallel, usual={"steps": few})
        made: Pushforward = diffusion_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)
    elif any(said is not None for said in (solver, steps, guidance, parallel)) or labels is not UNSAID:
        raise PushforwardError("A map has its own solver, labels and guidance: bind it to them before it is guided.")
    else:
        made = model
    if isinstance(dynamics, Particles):
        if schedule is not _SCHEDULE or begin is not None or resume is not None:
            raise PushforwardError("Particles go once through the plan; leave schedule, begin and resume out.")
        return particles.guide(
            made, energy, dynamics, chains=chains, seed=seed, first=first, batch=batch, callback=callback
        )
    return posterior.guide(
        made, energy, dynamics, schedule,
        chains=chains, seed=seed, first=first, begin=begin, resume=resume, batch=batch, callback=callback,
    )  # fmt: skip


def _check_ways(dynamics: object, schedule: object) -> None:
    if not isinstance(dynamics, Dynamics | Particles):
        raise PushforwardError(f"Say how chains move, as by mala(), or particles go, as by fk(); got {dynamics!r}.")
    if not isinstance(schedule, Schedule):
        raise PushforwardError(f"Say how often chains move, as by Schedule(steps=100); got {schedule!r}.")


def steer(model: _Steered, energy: Energy | Function, by: str | Steering = "dps") -> _Steered:
    """Make a model whose every step follows an energy of images: cheaper than `guide`, and no sample of a law.

        model.steer(5 * energies.classifier(network, "sneaker"), by="tfg").sample(16, solver="ddim", steps=50)

    What comes back is a model: it samples with every solver, encodes, translates and inpaints.

    Args:
        model: a model of images, or of latents with a decoder that PyTorch differentiates.
        energy: an energy of images; its weight is the strength.
        by: a published method (`dps`, `lgd`, `mpgd`, `freedom`, `ugd`, `tfg`), or a `Steering` with your own settings.

    Raises:
        PushforwardError: no such method; while sampling: an energy that is not finite or has no gradient.
    """
    way = STEERINGS.get(by) if isinstance(by, str) else by
    if not isinstance(way, Steering):
        raise PushforwardError(f"Unknown way {by!r} to steer; known are {', '.join(STEERINGS)}.")
    return steered(model, energy, way)
