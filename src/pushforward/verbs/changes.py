"""Images made of other images: translated, edited, or painted anew in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute.host import undisturbed
from pushforward.guidance.inpaint import inpaint as paint
from pushforward.maps.labels import UNSAID, check_told
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.plan import Plan
from pushforward.translation.translate import Method, Translation, sampler_for
from pushforward.translation.translate import translate as pass_on
from pushforward.verbs.samplers import Given, Solver, as_batch, diffusion_of, read

__all__ = ["edit", "inpaint", "translate"]


@undisturbed
def translate(
    model: Model,
    images: Tensor,
    to: Model | None = None,
    *,
    source: Given = UNSAID,
    target: Given = UNSAID,
    method: Method = "stochastic",
    solver: Solver = "ddim",
    steps: int | None = None,
    start: float | None = None,
    source_guidance: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Translation:
    """Translate images to another model's data, or to another class or prompt, by their codes; no training.

        noto.translate(faces, twemoji, start=0.7).images
        model.translate(shoes, source="sneaker", target="ankle boot").images

    Args:
        model: the model whose data the images are.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        to: the model of what they become, with states of the same shape; by default the same model.
        source: classes or prompts of the images, as the labels of `sample`; by default what the model was given, or
            none.
        target: classes or prompts of what they become, given in the same way.
        method: `stochastic` codes (CycleDiffusion), `independent` ones ("edit-friendly"), `deterministic` ones (DDIB),
            those of one pass (`uni-inv`, `direct`), none (`flowedit`, `flowalign`: the difference of both ends moves
            the image), or `sdedit`, the baseline that takes nothing from the first model.
        solver: words or a plan, as in `sample`. What its words leave open is chosen for the method: DDIM's eta is 0.1,
            the noise of others 1, the grid the model's own or uniform.
        steps: 100 by default.
        start: share of the steps that is taken, from the image: more of them change more; 0.85 by default.
        source_guidance: weight of classifier-free guidance when codes are made, by default 1, or a pipeline's own.
        guidance: the same when they are decoded.
        seed: seeds what is drawn; image i depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        batch: images at a time, and states in a network call while codes are drawn.
        callback: told after every network call.

    Returns:
        The `images`, float32 on the CPU, their common `code`, and what it took.

    Raises:
        PushforwardError: no such solver, setting, class or method, models of other shapes, or both ends are the same.
    """
    if to in (None, model) and (source is target or (isinstance(source, str | int) and source == target)):
        raise PushforwardError("Both ends are the same: say `to` which model, or give another `source` or `target`.")
    sampler = read(solver, steps=steps, start=start, usual={"steps": 100, "start": 0.85})
    ends = ((model, source, source_guidance), (to or model, target, guidance))
    return _between(ends, images, sampler, method, seed, first, batch, callback)


@undisturbed
def edit(
    model: Model,
    images: Tensor,
    source: Given,
    target: Given,
    *,
    method: Method = "stochastic",
    solver: Solver = "ddim",
    steps: int | None = None,
    start: float | None = None,
    source_guidance: float = 1.0,
    guidance: float = 3.0,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Translation:
    """Edit images by text or class: the code of an image under one, decoded under another.

        model.edit(image, source="sneaker", target="ankle boot").images

    Several edits of an image, to choose from, come of several seeds; `translation.edit` searches more widely.

    Args:
        model: that reads prompts, or has classes.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        source: prompts or classes of what they show, one for each or one for all.
        target: prompts or classes of what they shall show.
        method: see `translate`.
        solver: see `translate`.
        steps: 100 by default.
        start: share of the steps that is taken, from the image: more of them change more; 0.8 by default.
        source_guidance: weight of classifier-free guidance when codes are made; 1 in the paper.
        guidance: the same when they are decoded.
        seed: see `translate`.
        first: see `translate`.
        batch: see `translate`.
        callback: told after every network call.

    Returns:
        The `images`, float32 on the CPU, their `code`, and what it took.

    Raises:
        PushforwardError: as `translate`; or a model that reads no prompts and has no classes.
    """
    check_told(model)
    sampler = read(solver, steps=steps, start=start, usual={"steps": 100, "start": 0.8})
    ends = ((model, source, source_guidance), (model, target, guidance))
    return _between(ends, images, sampler, method, seed, first, batch, callback)


def _between(
    ends: tuple[tuple[Model, Given, float | None], tuple[Model, Given, float | None]],
    images: object,
    sampler: SamplerSpec | Plan,
    method: Method,
    seed: int,
    first: int | Sequence[int],
    batch: int,
    callback: Callable[[object], None] | None,
) -> Translation:
    """Images as the second end has them, whose model, labels and guidance these are."""
    source, target = (
        diffusion_of(
            model,
            sampler if isinstance(sampler, Plan) else sampler_for(model, sampler, method),
            labels=labels,
            guidance=guidance,
        )
        for model, labels, guidance in ends
    )
    return pass_on(
        as_batch(images, source.model),
        source,
        target,
        method=method,
        seed=seed,
        first=first,
        rows=batch,
        callback=callback,
    )


@undisturbed
def inpaint(
    model: Model,
    images: Tensor,
    mask: Tensor,
    *,
    solver: Solver = "ddpm",
    steps: int | None = None,
    repeats: int | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Tensor:
    """Paint parts of images anew, by a model of what such images are; the other pixels stay, to the last bit.

        heel = torch.zeros(28, 28, dtype=torch.bool)
        heel[14:] = True
        model.inpaint(shoes, heel, labels="ankle boot")

    Args:
        model: a model of images, not of latents.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`.
        mask: true, or 1, where they are painted; broadcasts to the images.
        solver: words or a plan, as in `sample`; `ddpm` by default.
        steps: 25 by default.
        repeats: times that each step is taken; with more, the parts agree better. 4 by default.
        labels: classes or prompts of the images, as in `sample`; by default what the model was given, or none.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        seed: seeds the codes; that of an image depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        batch: images at a time.
        callback: told after every network call.

    Returns:
        Images in [-1, 1], `(count, channels, height, width)`, float32 on the CPU.

    Raises:
        PushforwardError: no such solver, setting or class, a model of latents, or images or a mask that do not fit.
    """
    sampler = read(solver, steps=steps, repeats=repeats, usual={"steps": 25, "repeats": 4})
    there = diffusion_of(model, sampler, labels=labels, guidance=guidance)
    if not isinstance(mask, Tensor):
        raise PushforwardError(f"A mask is a tensor that says true or false of each pixel; got {type(mask).__name__}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PushforwardError(
            f"A mask says true or false of each pixel; got numbers from {float(mask.min()):g} to "
            f"{float(mask.max()):g}: compare them, as in mask > 0."
        )
    images, known = as_batch(images, model), ~mask.bool()
    return paint(there, images, known, seed=seed, first=first, batch=batch, callback=callback)[:, 0]
