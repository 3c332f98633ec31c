"""From one model's images to another's, by a common code.

Two diffusion models of different data have codes of one kind, standard normal. An image's code under the source model,
decoded by the target model, is an image of the target's data that has the source image's composition: so no pairs of
images are needed, nor training. The models may be one network under two conditions, or two networks trained apart.

    stochastic      codes drawn under a stochastic plan (DPM-Encoder): CycleDiffusion
    independent     the same with states drawn one by one: "edit-friendly" codes
    deterministic   the one code of a deterministic plan, by exact inversion: DDIB
    uni-inv         one code of a deterministic plan, by one nearly exact pass
    direct          that of a plain pass, with what it misses, so that the source decodes it exactly
    flowedit        no code: the difference of the ends' answers moves the image (see `translation.flowedit`)
    flowalign       the same, guided from the source's condition to the target's, and pulled to the source
    sdedit          the baseline: noise, then denoise by the target model; the source model is not used

What decides how much is kept is the plan's first time (`SamplerSpec.start`): less noise, more of the source.

References:
    CycleDiffusion: Wu & De la Torre, arXiv 2210.05559, algorithm 1; DDIB: Su et al., arXiv 2203.08382, algorithm 1;
    SDEdit: Meng et al., arXiv 2108.01073, algorithm 1; edit-friendly codes: Huberman-Spiegelglas et al.,
    arXiv 2304.06140.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Solution
from pushforward.maps.code import Code, batches, numbered
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.passes import last_states, passing
from pushforward.maps.spec import SamplerSpec, noisy
from pushforward.model import Model
from pushforward.plan.gddim import with_residuals
from pushforward.translation.flowedit import flowedit

__all__ = [
    "CODELESS",
    "ONE_CODE",
    "TRANSLATIONS",
    "Coded",
    "Method",
    "Translation",
    "code_of",
    "decoded",
    "method_named",
    "refined",
    "sampler_for",
    "translate",
]

Method = Literal["stochastic", "independent", "deterministic", "uni-inv", "direct", "flowedit", "flowalign", "sdedit"]
TRANSLATIONS: tuple[Method, ...] = get_args(Method)
CODELESS = ("flowedit", "flowalign")
ONE_CODE = ("deterministic", "uni-inv", "direct")  # per image, whatever the seed


@dataclass(frozen=True)
class Translation:
    """What a translation gave.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`, on the CPU.
        code: the common one; `None` for methods that need none.
        rounds: batched network calls on the critical path; the most of any batch.
        nfe: network evaluations of an image, on average, counted as by `Plan.nfe`.
        residual: of exactly inverted codes, how far each image is from its own decoded under the source, `(count,)`.
    """

    images: Tensor = field(repr=False)
    code: Code | None
    rounds: int
    nfe: float
    residual: Tensor | None = field(default=None, repr=False)

    @staticmethod
    def cat(parts: Sequence[Translation]) -> Translation:
        """Those of several batches as one."""
        codes = [one.code for one in parts if one.code is not None]
        residuals = [one.residual for one in parts if one.residual is not None]
        images = torch.cat([one.images for one in parts])
        return Translation(
            images,
            Code.cat(codes) if codes else None,
            max(one.rounds for one in parts),
            sum(one.nfe * len(one.images) for one in parts) / len(images),
            torch.cat(residuals) if residuals else None,
        )


class Coded(NamedTuple):
    """A common code, and what it took: rounds, and network evaluations per image; `residual` as in `Translation`."""

    code: Code
    rounds: int
    nfe: float
    residual: Tensor | None = None


def method_named(name: str, purpose: str = "translate") -> Method:
    """One of `TRANSLATIONS` by its name.

    Raises:
        PushforwardError: there is none of that name.
    """
    for method in TRANSLATIONS:
        if name == method:
            return method
    raise PushforwardError(f"Unknown way {name!r} to {purpose}; known are {', '.join(TRANSLATIONS)}.")


def sampler_for(model: Model, sampler: SamplerSpec, method: Method) -> SamplerSpec:
    """The sampler as a method needs it: with noise, or without and ending at `t_min`, where it has an inverse.

    Args:
        model: either end's.
        sampler: as wanted; what it leaves open is chosen here: DDIM's eta is 0.1, lambda of other solvers 1, and the
            grid the model's own or uniform, so that a share of the steps is a share of the time, as in the papers;
            where the time is the noise level, whose last steps are all that matters, it is the solver's usual one.
        method: method of the translation.

    Raises:
        PushforwardError: unknown method.
    """
    method = method_named(method)
    if sampler.filed:  # which has all its settings
        return sampler
    if sampler.grid is None and not model.grid and not model.process.time_is_noise:
        sampler = replace(sampler, grid="uniform")
    if method in CODELESS:
        return sampler
    if method in ONE_CODE:
        return sampler.invertible(model)
    if model.process.blocks > 1 and sampler.solver in ("gddim", "exponential") and sampler.end is None:
        sampler = replace(sampler, end=model.process.t_min)  # into time 0 their noise reaches velocities alone
    return noisy(sampler)


@torch.no_grad()
def translate(
    images: Tensor,
    source: Diffusion,
    target: Diffusion,
    *,
    method: Method = "stochastic",
    seed: int = 0,
    first: int | Sequence[int] = 0,
    rows: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Translation:
    """Images of the target's data with the codes that these have under the source.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`.
        source: where the images come from, bound to their classes or prompts.
        target: where they go, bound to the classes or prompts wanted, with a plan of the same shape.
        method: see the module's docstring.
        seed: of what is drawn; image i's depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        rows: images at a time, and states in a network call while codes are drawn.
        callback: told after every network call.

    Raises:
        PushforwardError: plans that do not fit the method or each other.
    """
    if len(images) > rows:
        for end in (source, target):
            end.model_for(len(images))
        numbers = numbered(first, len(images))
        return Translation.cat([
            translate(images[some], source.some(some), target.some(some), method=method, seed=seed,
                      first=numbers[some], rows=rows, callback=callback)
            for some in batches(len(images), rows)
        ])  # fmt: skip
    if method in CODELESS:
        align = target.guidance if method == "flowalign" else None
        to = target if align is None else target.given(guidance=1.0)
        edited = flowedit(images, source, to, align=align, seed=seed, first=first, callback=callback)
        calls = (2 if align is None else 3) * target.plan.nfe
        return Translation(edited, None, calls, float(calls))
    found = code_of(images, source, target, method=method, seed=seed, first=first, rows=rows, callback=callback)
    result, plan = decoded(found.code, target, method, callback), target.plan
    return Translation(result, found.code, found.rounds + plan.rounds, found.nfe + plan.nfe, found.residual)


@torch.no_grad()
def decoded(
    code: Code,
    target: Diffusion,
    method: Method,
    callback: Callable[[object], None] | None = None,
    *,
    found: Callable[[Solution], None] | None = None,
) -> Tensor:
    """The images of a method's codes under the target, the second half of `translate`, on the CPU.

    `callback` and `found` are those of `Diffusion.decode`.
    """
    if method == "direct":
        target = replace(target, plan=with_residuals(target.plan))
    return target.decode(code, callback=callback, found=found).float().cpu()


@torch.no_grad()
def code_of(
    images: Tensor,
    source: Diffusion,
    target: Diffusion,
    *,
    method: Method = "stochastic",
    seed: int = 0,
    first: int | Sequence[int] = 0,
    rows: int = 64,
    callback: Callable[[object], None] | None = None,
) -> Coded:
    """The common code alone, the first half of `translate`, for one that is decoded in several ways.

    Where the last step takes no noise, what it leaves out of the image is left out of the code: it is the source's.
    """
    _check(source, target, method)
    if method == "sdedit":
        return Coded(target.perturb(images, seed=seed, first=first), 0, 0.0)
    if method == "deterministic":
        found = source.invert(images, seed=seed, first=first, callback=callback)
        nfe = float(found.nfe.double().mean())
        return Coded(found.code, found.rounds + found.decoding, nfe, found.residual)
    if method in ("uni-inv", "direct"):
        code, _, calls = passing(source, last_states(source, images), method, callback)
        return Coded(code, calls, float(calls))
    if method in CODELESS:
        raise PushforwardError(f"The method {method!r} finds no code; call translate.")
    drawn = source.encode(
        images, seed=seed, first=first, independent=method == "independent", rows=rows, callback=callback
    )
    return Coded(replace(drawn.code, residual=None), drawn.rounds, float(drawn.nfe))


@torch.no_grad()
def refined(images: Tensor, target: Diffusion, *, seed: int = 0, first: int | Sequence[int] = 0) -> Tensor:
    """A stage of its own after a translation: a little noise, then denoising by the target model (SDEdit).

    The experiments of CycleDiffusion end with it (100 to 150 of 1000 steps, eta 1). It makes images more like the
    target's data, and less like the source.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`.
        target: with a plan that begins at low noise (`SamplerSpec.start`).
        seed: seed of the noise.
        first: number of the first image, or the number of each.
    """
    return target.decode(target.perturb(images, seed=seed, first=first)).float().cpu()


def _check(one: Diffusion, other: Diffusion, method: Method) -> None:
    """Raise unless codes of one diffusion can be decoded by the other."""
    if method_named(method) == "sdedit":
        return
    shapes = [d.model.state_shape(1)[1:] for d in (one, other)]
    if shapes[0] != shapes[1]:
        raise PushforwardError(
            f"Codes of model {one.model.name!r} have shape {shapes[0]}, those of {other.model.name!r} {shapes[1]}: "
            "translate between models of one shape."
        )
    if one.noises != other.noises:
        raise PushforwardError(
            f"The source's plan takes {one.noises} noises and the target's {other.noises}; give both one solver and "
            "steps."
        )
