"""Images from codes, and codes of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.denoiser import Denoiser, Wrapper
from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.guidance.invert import Method
from pushforward.guidance.invert import invert as find
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.code import Code, batches, numbered
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Encoding, Inversion
from pushforward.maps.labels import UNSAID
from pushforward.maps.spec import noisy as with_noise
from pushforward.model import Model
from pushforward.plan import Plan
from pushforward.plan.gddim import with_residuals
from pushforward.verbs.samplers import AtOnce, Given, Solver, as_batch, back_from, diffusion_of, map_of, read

__all__ = ["decode", "decode_in_batches", "encode", "invert", "sample"]


@undisturbed
def sample(
    model: Model,
    count: int = 16,
    *,
    solver: Solver = "auto",
    steps: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Tensor:
    """Draw images.

        model.sample(16, solver="gddim:order=2", steps=20)
        model.sample(4, solver="ddim:eta=0.5:steps=100", labels=["bag", "shirt", "coat", "bag"], guidance=2)

    Args:
        model: the model to draw from.
        count: how many images.
        solver: a name of `pushforward.SOLVERS` or `rk45` (adaptive steps), with settings after colons if need be:
            `name:setting=value:setting=value`. Settings of all are `steps`, `grid` (its name), `end` (the last time),
            `start` (the share of the steps that is taken) and `repeats`. Or a `Plan`.
        steps: 20 by default, or what suits the rounds of `parallel`; here or in the solver's words.
        labels: classes by name or number, or prompts, one for each image or one for all; `None` for none. By default
            those that the model was given, or else its classes, or the captions that it knows, in turn.
        guidance: weight of classifier-free guidance, by default 1, which is plain, or a pipeline's own.
        parallel: take all steps at once: `True`, the name of a way (`preconditioned`, `plain`, `picard`, `anderson`,
            `joint`, `triangular`), or a `Parallel` with settings of your own. Images are the same to its tolerance.
            `Parallel(rounds=5)` gives the best images in 5 rounds instead, with as many steps as serve that best.
        seed: image i depends on the seed and `first + i` alone, whatever the batch.
        first: number of the first image.
        batch: images at a time.
        callback: told after every network call (`execute.Progress`), or round (`execute.Round`).

    Returns:
        Images in [-1, 1], `(count, channels, height, width)`, float32 on the CPU.

    Raises:
        PushforwardError: no such solver, setting, class or way, or they do not fit the model.
    """
    sampler = read(solver, steps=steps, parallel=parallel)
    made = map_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)
    return made.sample(count, seed=seed, first=first, batch=batch, callback=callback)


@undisturbed
def invert(
    model: Model,
    images: Tensor,
    *,
    solver: Solver = "ddim",
    steps: int | None = None,
    method: Method = "exact",
    labels: Given = UNSAID,
    guidance: float | None = None,
    noisy: bool = True,
    sequential: bool = False,
    tolerance: float = 1e-4,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Inversion:
    """Find the codes behind images: decoded by the same solver, they give the images back.

        codes = model.invert(images, solver="ddim", steps=50)
        again = codes.decode()

    Args:
        model: the model whose codes are wanted.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        solver: a deterministic one, as in `sample`. It ends at the process's `t_min` unless its words say otherwise:
            a last step to clean data has no inverse.
        steps: 50 by default.
        method: `exact`, by fixed point to the tolerance; `naive`, one pass of DDIM forwards, which is nearly inverse;
            `uni-inv`, the same, nearer by an order; `direct`, a pass whose errors become part of the code, which is
            exact; `flowopt`, moved by the error of the decoded image; or `optimised`, least squares, for any solver.
        labels: what the images show, as in `sample`; by default what the model was given, or nothing.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own; strong guidance may have no
            inverse.
        noisy: whether noise of the level of the last time is added to the images, and kept with their exact codes. It
            makes the codes properly Gaussian.
        sequential: whether exact codes are sought one state after another, where the solver asks once per step: a
            quarter of the network evaluations in three times as many calls, for a CPU or one image of a large model.
        tolerance: error allowed in any value of an image, of a range of 2, for exact, flowopt's and optimised codes.
        seed: seeds that noise; image i's depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        batch: images at a time.
        callback: told after every round (`execute.Round`), call of a pass (`execute.Progress`) or step of optimisation
            (`maps.inversion.Record`).

    Returns:
        The `code`, the `residual` of each image, as measured, what it took, and `decode()`.

    Raises:
        PushforwardError: no such solver, setting, class or method, a plan that it cannot invert, or images that do not
            fit the model.
    """
    images = as_batch(images, model)
    there = diffusion_of(model, back_from(model, solver, steps, 50), labels=labels, guidance=guidance)
    there.model_for(len(images))
    numbers = numbered(first, len(images))
    plain = there.plan.solver == "ddim" and not there.noises and model.decoder is None
    found = [
        find(there.some(some), images[some], method, seed=seed, first=numbers[some], noisy=noisy,
             sequential=sequential, tolerance=tolerance, begin="forward" if plain else "random", callback=callback)
        for some in batches(len(images), batch)
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    return Inversion.cat(found, replace(there, plan=with_residuals(there.plan)) if method == "direct" else there)


@undisturbed
def encode(
    model: Model,
    images: Tensor,
    *,
    solver: Solver = "ddim",
    steps: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    independent: bool = False,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[int], None] | None = None,
) -> Encoding:
    """Draw codes of images under a stochastic sampler (DPM-Encoder): decoded again, they give the images.

    Args:
        model: the model whose codes are wanted.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        solver: a stochastic one, as in `sample`: DDIM's eta is 0.1, and the noise of others 1, unless its words say
            otherwise. It ends at the process's `t_min` by default.
        steps: 100 by default.
        labels: what the images show, as in `sample`; by default what the model was given, or nothing.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        independent: draw the noisy states one by one ("edit-friendly" codes), not as a path.
        seed: seeds the states; those of image i depend on the seed and its number alone.
        first: number of the first image, or the number of each.
        batch: states in a network call.
        callback: told after every network call how many states it saw.

    Returns:
        The `code`, what it took, and `decode()`.

    Raises:
        PushforwardError: no such solver, setting or class, a deterministic plan, or images that do not fit the model.
    """
    images = as_batch(images, model)
    sampler = back_from(model, solver, steps, 100)
    sampler = sampler if isinstance(sampler, Plan) else with_noise(sampler)
    there = diffusion_of(model, sampler, labels=labels, guidance=guidance)
    return there.encode(images, seed=seed, first=first, independent=independent, rows=batch, callback=callback)


@undisturbed
@torch.no_grad()
def decode(
    model: Model,
    codes: Code | Encoding | Inversion,
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    parallel: AtOnce | None = None,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Tensor:
    """Make the images behind codes.

    For gradients in the code or the network, decode by `diffusion`.

    Args:
        model: the model to decode by.
        codes: what `invert` or `encode` found, or a bare `Code`.
        solver: words or a plan, as in `sample`; it may be left out for what this model has found, which knows its own.
        steps: number of steps, as in `sample`.
        labels: classes or prompts, as in `sample`; by default those that the codes were found under, or
            what the model was given, or none.
        guidance: weight of classifier-free guidance, by default that of the codes, or else 1, or a pipeline's own.
        parallel: take all steps at once, as in `sample`.
        batch: images at a time.
        callback: told after every network call or round.

    Returns:
        Images in [-1, 1], `(count, channels, height, width)`, float32 on the CPU.

    Raises:
        PushforwardError: no solver is said, and the codes are bare or another model's; or they do not fit the solver.
    """
    code = getattr(codes, "code", codes)
    if not isinstance(code, Code):
        raise PushforwardError(
            f"Codes are what `invert` and `encode` find, or a Code of them; got {type(codes).__name__}."
        )
    if solver is not None:
        sampler = read(solver, steps=steps, parallel=parallel)
        made = map_of(model, sampler, labels=labels, guidance=guidance, parallel=parallel)
    else:
        known = None if isinstance(codes, Code) else codes.pushforward
        if (
            not isinstance(known, Diffusion)
            or known.model.name != model.name
            or not _same(known.model.denoiser, model.denoiser)
        ):
            raise PushforwardError(
                f"Say by which solver model {model.name!r} is to decode these codes: they are bare, or another model's."
            )
        if steps is not None:
            raise PushforwardError("These codes know their own steps; leave steps out, or say a solver beside them.")
        way = diffusion_of(model, known.plan, parallel=parallel).parallel
        made = known.run_by(parallel=way).given(labels, guidance)
    made.model_for(len(code))
    return decode_in_batches(made, code, batch, callback)


def decode_in_batches(
    there: Diffusion | AdaptiveDiffusion, code: Code, batch: int, callback: Callable[[Any], None] | None = None
) -> Tensor:
    """The images behind codes, batch after batch, on the CPU."""
    pieces = batches(len(code), batch)
    return torch.cat([there.some(some).decode(code[some], callback=callback).float().cpu() for some in pieces])


def _same(one: Denoiser, other: Denoiser) -> bool:
    """Whether two denoisers are of the same weights and wrappers, under whatever conditions."""
    if one is other:
        return True
    if isinstance(one, Wrapper) or isinstance(other, Wrapper):
        if not (isinstance(one, Wrapper) and isinstance(other, Wrapper)):
            return False
        return one.around(other.inner) == other and _same(one.inner, other.inner)
    first, second = getattr(one, "module", None), getattr(other, "module", None)
    if isinstance(first, nn.Module) and isinstance(second, nn.Module) and first is not second:
        weights, others = [*first.parameters()], [*second.parameters()]  # without the buffers, which may hold prompts
        return 0 < len(weights) == len(others) and all(
            a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in zip(weights, others, strict=True)
        )
    return one == other if first is None else first is second
