r"""Codes behind images by optimisation: the least squares of decoding.

For each image of a batch, alone,

    minimise over its code z:    loss(z) = || decode(z) - image ||^2,

the sum over the image's values. Every plan has such codes, of which the exact inverse, where there is one, is a code
of loss 0: a plan that ends at time 0, or takes noises, has none, and strong guidance may have none. A fixed-point
inversion that did not converge is refined by beginning at what it found.

The gradient of all images' losses comes by any of the ways of `execute.adjoint`; approximate ones (`Phantom`,
`Skeleton`) may not lead to the least loss. The code returned for an image is the best of all that were tried.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (inversion).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Adaptive, Exact, Gradient, Parallel
from pushforward.execute.backward import naive_inversion
from pushforward.guidance.decoding import Decoding
from pushforward.guidance.optimisers import OPTIMISERS
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import Labels
from pushforward.maps.protocol import Pushforward
from pushforward.plan import Plan

__all__ = ["Optimised", "Record", "naive", "optimise"]

_EXACT = Exact()


@dataclass(frozen=True)
class Record:
    """What is known after a step.

    Args:
        step: steps so far; 0 is the beginning.
        loss: of each image at the code tried in this step, or, for an image that is done, its least, `(count,)`.
        nfe: network evaluations of each image so far, `(count,)`; a vector-Jacobian product counts as one.
        seconds: so far.
    """

    step: int
    loss: Tensor
    nfe: Tensor
    seconds: float


@dataclass(frozen=True)
class Optimised:
    """Codes found behind images.

    Args:
        code: the best of each image.
        loss: of those codes, the sum of squares over the values of each image, `(count,)`.
        history: a record a step, the beginning's first.
    """

    code: Code
    loss: Tensor
    history: tuple[Record, ...]

    @property
    def nfe(self) -> Tensor:
        """Network evaluations of each image, `(count,)`."""
        return self.history[-1].nfe


def optimise(
    pushforward: Pushforward,
    images: Tensor,
    labels: Labels = None,
    guidance: float = 1.0,
    *,
    gradient: Gradient = _EXACT,
    parallel: Parallel | None = None,
    optimiser: Literal["adam", "l-bfgs"] = "adam",
    steps: int = 200,
    learning_rate: float = 0.05,
    begin: Literal["random", "forward"] | Code = "random",
    noises: bool = False,
    seed: int = 0,
    first: int = 0,
    tolerance: float = 1e-4,
    callback: Callable[[Record], None] | None = None,
) -> Optimised:
    """Codes that decode to images as nearly as can be, found by descending the squared error.

    A step is one decoding and one gradient of the images that are not done, all in one batch; what becomes of an image
    does not depend on the others.

    Args:
        pushforward: a diffusion of any plan, stochastic ones included, or another map, such as a GAN.
        images: in [-1, 1], `(count, channels, height, width)`.
        labels: classes, `(count,)`, for a model that has them.
        guidance: weight of classifier-free guidance.
        gradient: how the loss is differentiated (see `execute.adjoint`).
        parallel: decode with all steps at once, so.
        optimiser: `adam`, or `l-bfgs` with a line search, which wants an accurate gradient (`Exact`, `Implicit`).
        steps: at most so many.
        learning_rate: Adam's; or the root mean square of the first move of L-BFGS. A code's own is 1.
        begin: at the codes that `Diffusion.sample` has for the seed (`random`); at those of a plain `forward` pass of
            DDIM, which is nearly inverse for a deterministic one-step plan; or at any `Code`, whose `end` is kept.
        noises: whether the noises of a stochastic plan are sought too; else they stay as they are at the beginning.
        seed: of a random beginning, and of the noises.
        first: number of the first image: image i begins as the seed and `first + i` say.
        tolerance: an image is done when its loss is not above this.
        callback: told after every step.

    Raises:
        PushforwardError: adaptive steps, images, labels or a code that do not fit, noises sought of a plan that takes
            none, a forward beginning of another plan; and as `Diffusion.decode`.
    """
    _check(pushforward, images, begin, noises)
    _check_numbers(optimiser, steps, learning_rate, tolerance)
    began = time.perf_counter()
    decoding = Decoding.make(pushforward, len(images), labels, guidance, gradient, parallel)
    images = images.to(decoding.device)
    start = _beginning(decoding, images, begin, seed, first)
    x, code_of = _packed(start, noises)
    method = OPTIMISERS[optimiser]
    state = method.begin(x)
    best, least = x.clone(), torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    history: list[Record] = []
    for step in range(steps + 1):
        some = active.nonzero()[:, 0]
        variable = x[some].detach().requires_grad_(step < steps)
        with torch.enable_grad():
            losses = _losses(decoding(code_of(variable, some), some), images[some])
        loss = least.index_copy(0, some, losses.detach())
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better[:, None], x, best)
        active = active & ~(loss <= tolerance)
        slopes = torch.zeros_like(x)
        if step < steps and bool(active.any()):
            with torch.enable_grad():
                slopes[some] = torch.autograd.grad(losses[active[some]].sum(), variable)[0]
        history.append(Record(step, loss.cpu(), decoding.nfe.clone().cpu(), time.perf_counter() - began))
        if callback is not None:
            callback(history[-1])
        active = active & slopes.isfinite().all(1) & loss.isfinite()
        if step == steps or not bool(active.any()):
            break
        state = method.advance(state, loss, slopes, learning_rate)
        x, active = state["point"], active & ~state["stuck"]
        if not bool(active.any()):
            break
    every = torch.arange(len(x), device=x.device)
    return Optimised(code_of(best, every), least.cpu(), tuple(history))


@torch.no_grad()
def naive(diffusion: Diffusion, images: Tensor, labels: Labels = None, guidance: float = 1.0) -> Code:
    """The field's plain inversion of DDIM: nearly the codes behind images, by one network evaluation a step.

    Args:
        diffusion: of a deterministic one-step plan.
        images: in [-1, 1], `(count, channels, height, width)`.
        labels: classes, `(count,)`, for a model that has them.
        guidance: weight of classifier-free guidance.

    Raises:
        PushforwardError: another plan, or images or labels that do not fit.
    """
    _check(diffusion, images, "forward", noises=False)
    plan = diffusion.plan
    assert isinstance(plan, Plan)
    end, like = plan.times[-1:], diffusion.start(torch.zeros(diffusion.model.state_shape(1)))
    model = diffusion.model.to(like.device).given(labels, guidance)
    state = plan.process.signal(end)[0](plan.process.lift(images.to(like)))
    return Code(diffusion.code(naive_inversion(plan, model.denoiser, state)))


def _losses(images: Tensor, wanted: Tensor) -> Tensor:
    """Sums of squares `(n,)`, float64."""
    if images.shape != wanted.shape:
        got, made = tuple(wanted.shape[1:]), tuple(images.shape[1:])
        raise PushforwardError(f"The model makes images of shape {made}; got images of shape {got}.")
    return (images.double() - wanted).square().flatten(1).sum(1)


# -- the variables ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _beginning(
    decoding: Decoding, images: Tensor, begin: Literal["random", "forward"] | Code, seed: int, first: int
) -> Code:
    """The first codes, on the images' device."""
    like = torch.zeros((), device=images.device)
    if isinstance(decoding.pushforward, Diffusion):
        like = like.to(torch.promote_types(decoding.pushforward.dtype, torch.float32))
    if isinstance(begin, Code):
        parts = (None if part is None else part.detach().to(like) for part in (begin.start, begin.noises, begin.end))
        return Code(*parts)  # type: ignore[arg-type]
    if begin == "random":
        return decoding.pushforward.draw(len(images), seed=seed, first=first)
    found = naive(decoding.of(torch.arange(len(images), device=images.device)), images)
    return Code(found.start.to(like))


def _packed(start: Code, noises: bool) -> tuple[Tensor, Callable[[Tensor, Tensor], Code]]:
    """The variables `(count, numbers)` of a code, and the way from those of images `some (n,)` to their code."""
    if noises:
        return start.variables(), lambda x, some: start[some].with_variables(x)

    def code_of(x: Tensor, some: Tensor) -> Code:
        return replace(start[some], start=x.reshape(len(x), *start.start.shape[1:]))

    return start.start.flatten(1), code_of


# -- arguments -------------------------------------------------------------------------------------------------------


def _check(
    pushforward: Pushforward,
    images: Tensor,
    begin: Literal["random", "forward"] | Code,
    noises: bool,
) -> None:
    """Raise unless all fits together."""
    if not len(images) or images.ndim < 2 or not images.is_floating_point() or not bool(images.isfinite().all()):
        raise PushforwardError(
            f"The images must be one or more, of finite numbers in [-1, 1]; got {images.dtype} {tuple(images.shape)}."
        )
    if isinstance(begin, str) and begin not in ("random", "forward"):
        raise PushforwardError(f"Optimisation begins at random, forward or a code; got {begin!r}.")
    if isinstance(begin, Code) and len(begin) != len(images):
        raise PushforwardError(f"{len(images)} images need as many codes to begin at; got {len(begin)}.")
    if not isinstance(pushforward, Diffusion):
        if noises or begin == "forward":
            raise PushforwardError(
                "Only a diffusion has noises to seek, or a forward pass to begin at; leave them out."
            )
        return
    plan, model = pushforward.plan, pushforward.model
    if isinstance(plan, Adaptive):
        raise PushforwardError("Adaptive steps have no gradient; name a solver, e.g. ddim.")
    if model.decoder is None and tuple(images.shape[1:]) != model.shape:
        raise PushforwardError(
            f"Model {model.name!r} has images of shape {model.shape}; got {tuple(images.shape[1:])}."
        )
    if noises and not plan.noises:
        raise PushforwardError(
            f"The plan of {plan.solver!r} takes no noises that could be sought; leave `noises` out, or raise eta."
        )
    if begin == "forward" and (plan.noises or model.decoder is not None):
        what = f"plan of {plan.solver!r} takes noises" if plan.noises else f"model {model.name!r} diffuses no images"
        raise PushforwardError(
            f"A forward pass needs a deterministic plan and a model of images, but the {what}; begin at random."
        )
    if isinstance(begin, Code):
        shape = model.state_shape(len(images))
        count = len(plan.noises)
        for name, part, wanted in (
            ("start", begin.start, shape),
            ("noises", begin.noises, (count, *shape) if count else None),
            ("end", begin.end, shape if begin.end is not None else None),
        ):
            found = None if part is None else tuple(part.shape)
            if found != wanted:
                raise PushforwardError(
                    f"The {name} of the code to begin at must have shape {wanted} for these images; got {found}."
                )


def _check_numbers(optimiser: str, steps: int, learning_rate: float, tolerance: float) -> None:
    if optimiser not in OPTIMISERS:
        raise PushforwardError(f"The optimiser is one of {', '.join(OPTIMISERS)}; got {optimiser!r}.")
    if steps < 1:
        raise PushforwardError(f"Optimisation needs at least 1 step; got {steps}.")
    if not 0 < learning_rate < math.inf:
        raise PushforwardError(f"The learning rate must be positive; got {learning_rate}.")
    if not 0 <= tolerance < math.inf:
        raise PushforwardError(f"The tolerance of the loss must be 0 or more; got {tolerance}.")
