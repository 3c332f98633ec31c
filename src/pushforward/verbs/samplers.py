"""How the verbs read what they are told of a sampler: a solver, its steps, and whether they are taken all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Parallel
from pushforward.execute.host import undisturbed
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import UNSAID, Condition, Unsaid, is_guided
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Model
from pushforward.plan import Plan

__all__ = ["AtOnce", "Given", "Solver", "as_batch", "back_from", "diffusion", "diffusion_of", "map_of", "plan", "read"]

Solver = str | Plan  # in words, as `gddim:order=2:steps=20`, or ready
AtOnce = bool | str | Parallel  # the best way, one of `PARALLEL_METHODS`, or one of your own
Given = Condition | Unsaid

_USUAL: Mapping[str, object] = MappingProxyType({})


@undisturbed
def plan(model: Model, solver: str = "auto", steps: int | None = None) -> Plan:
    """Make the coefficients of a solver for a model.

    Args:
        model: the model whose process the plan is for.
        solver: its name and settings in words, as in `sample`.
        steps: 20 by default.

    Raises:
        PushforwardError: no such solver or setting, or `rk45`, which chooses its steps as it goes.
    """
    return parse(solver, _said(steps=steps)).plan(model)


@undisturbed
def diffusion(
    model: Model,
    solver: Solver = "auto",
    steps: int | None = None,
    *,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
) -> Diffusion:
    """Make the map from Gaussian codes to images beneath all verbs, differentiable and to be run in many ways.

    Args:
        model: network and process.
        solver: its name and settings in words, or a plan, as in `sample`.
        steps: 20 by default.
        labels: classes or prompts, as in `sample`.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        parallel: take all steps at once, as in `sample`.

    Raises:
        PushforwardError: no such solver, setting, class or way, or `rk45`, which chooses its steps as it goes.
    """
    sampler = read(solver, steps=steps, parallel=parallel)
    return diffusion_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)


def read(
    solver: Solver,
    *,
    steps: int | None = None,
    start: float | None = None,
    repeats: int | None = None,
    parallel: AtOnce | None = None,
    usual: Mapping[str, object] = _USUAL,
) -> SamplerSpec | Plan:
    """Read a solver with what is said beside it.

    Args:
        solver: words, or a plan, of which nothing more can be said.
        steps: number of steps.
        start: share of the steps that is taken.
        repeats: number of times that each step is taken.
        parallel: how all steps are taken at once; its `rounds` say what `auto` and the usual number of steps are.
        usual: settings where nothing is said.

    Raises:
        PushforwardError: words of another form, something said twice, or something said beside a plan.
    """
    said = _said(steps=steps, start=start, repeats=repeats)
    if isinstance(solver, str):
        if isinstance(parallel, Parallel) and parallel.rounds is not None:
            budget = {"rounds": parallel.rounds, "max_evaluations": parallel.max_evaluations}
            usual = {**usual, **_said(**budget)}
        return parse(solver, said, usual)
    if not isinstance(solver, Plan):
        raise PushforwardError(f"A solver is told in words, as ddim:steps=20, or by a plan; got {solver!r}.")
    if said:
        raise PushforwardError(f"A plan has all its settings already; leave {' and '.join(said)} out.")
    return solver


def diffusion_of(
    model: Model,
    sampler: SamplerSpec | Plan,
    *,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
) -> Diffusion:
    """The map that a sampler makes of a model, bound to its labels, and run as is said."""
    spec = SamplerSpec() if isinstance(sampler, Plan) else sampler
    made = sampler if isinstance(sampler, Plan) else sampler.plan(model, guided=is_guided(model, guidance))
    if isinstance(parallel, Parallel):
        way: Parallel | None = parallel
    else:
        named = replace(spec, parallel="preconditioned" if parallel is True else parallel) if parallel else spec
        way = named.method(made)
    return Diffusion(model, made, parallel=way).given(labels, guidance)


def map_of(
    model: Model,
    sampler: SamplerSpec | Plan,
    *,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
) -> Diffusion | AdaptiveDiffusion:
    """As `diffusion_of`, and with adaptive steps where the sampler takes them."""
    if isinstance(sampler, Plan) or not sampler.adaptive:
        return diffusion_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)
    if parallel:
        raise PushforwardError("Adaptive steps follow one another, never all at once; name a solver, e.g. ddim.")
    return sampler.diffusion(model, guidance).given(labels, guidance)


def back_from(model: Model, solver: Solver, steps: int | None, usual: int) -> SamplerSpec | Plan:
    """The sampler by which images are followed back to codes: it ends at `t_min`, unless its words say otherwise.

    Args:
        model: the model whose codes are wanted.
        solver: words, or a plan.
        steps: number of steps.
        usual: number of steps where nothing is said.

    Raises:
        PushforwardError: a solver that always ends in clean data.
    """
    sampler = read(solver, steps=steps, usual={"steps": usual})
    return sampler if isinstance(sampler, Plan) else sampler.invertible(model)


def as_batch(images: Any, model: Model) -> Tensor:
    """Images of a model, checked; a single one, or video or sound, as a batch of one.

    Raises:
        PushforwardError: they are no images of the model.
    """
    single = getattr(images, "ndim", None) == (3 if model.image_shape is None else len(model.image_shape))
    images = images[None] if single else images
    model.check_images(images)
    return images.clone() if images.is_inference() else images


def _said(**settings: object) -> dict[str, object]:
    return {name: value for name, value in settings.items() if value is not None}
