r"""Codes behind images, by one of several methods that return one type.

    exact       the inverse of a deterministic plan that ends above time 0, by fixed point (`Diffusion.invert`)
    naive       DDIM run forwards, the field's plain inversion: one network call per step, nearly the code
    uni-inv     the same with the answers about where each step will lead: one call more, nearer by an order
    direct      the plain inversion, and what its steps miss as part of the code: exact, but not the code of the plan
    flowopt     moved by how far the decoded image is off, time and again; no gradient
    optimised   least squares, for all plans and other maps

The least squares are of decoding. For each image of a batch, alone,

    minimise over its code z:    loss(z) = || decode(z) - image ||^2,

the sum over the image's values. Every plan has such codes, of which the exact inverse, where there is one, is a code
of loss 0: a plan that ends at time 0, or takes noises, has none, and strong guidance may have none. A fixed-point
inversion that did not converge is refined by beginning at what it found.

The gradient of all images' losses comes by any of the ways of `execute.adjoint`; approximate ones (`Phantom`,
`Skeleton`) may not lead to the least loss. The code returned for an image is the best of all that were tried.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (inversion);
    UniEdit-Flow, arXiv 2504.13109 (uni-inv); Direct Inversion, arXiv 2310.01506, and DirectEdit, arXiv 2605.02417
    (direct); FlowOpt, arXiv 2510.22010 (flowopt).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.execute import INVERSE, Implicit, Parallel, Progress
from pushforward.guidance.decoding import Counted
from pushforward.guidance.optimisers import OptimiserName, optimiser_of
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Inversion, Record
from pushforward.maps.passes import gaps, last_states, passed, passing
from pushforward.maps.protocol import Pushforward

__all__ = ["METHODS", "Beginning", "Method", "invert", "optimise"]

Method = Literal["exact", "naive", "uni-inv", "direct", "flowopt", "optimised"]
METHODS: tuple[Method, ...] = get_args(Method)
Beginning = Literal["random", "forward"]

MOVE = 0.5  # of flowopt, in parts of the error
_TOGETHER = Parallel(tolerance=1e-5)  # for plans that have no other way


def invert(
    diffusion: Diffusion,
    images: Tensor,
    method: Method = "exact",
    *,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    noisy: bool = True,
    sequential: bool = False,
    tolerance: float = 1e-4,
    begin: Beginning = "forward",
    iterations: int = 60,
    callback: Callable[[Any], None] | None = None,
) -> Inversion:
    """Codes behind images, and how near they lead when they are decoded.

    Args:
        diffusion: bound to the images' classes or prompts. The plan is deterministic and ends above time 0 for `exact`
            codes, and is deterministic with one answer per step for those of a pass (`naive`, `uni-inv`, `direct`).
        images: in [-1, 1], `(count, channels, height, width)`.
        method: see the module's docstring.
        seed: seed of the noise that exact codes have at their last time, and of an optimisation's beginning; image i's
            depends on the seed and its number alone.
        first: number of the first image, or the number of each.
        noisy: whether exact codes have such noise (see `Diffusion.invert`).
        sequential: whether exact codes are sought state after state: fewer evaluations, more rounds (see there).
        tolerance: error allowed in any value of an image, for exact, flowopt's and optimised codes.
        begin: where an optimisation begins, see `optimise`; flowopt begins at random or at uni-inv's codes (`forward`).
        iterations: most steps of an optimisation, by L-BFGS, or of flowopt.
        callback: told after every round of network calls (`Round`), call of a pass (`Progress`) or step of optimisation
            (`Record`).

    Raises:
        PushforwardError: no such method, or a plan or images that it cannot invert.
    """
    if method == "exact":
        way = replace(INVERSE, tolerance=tolerance)
        return diffusion.invert(images, seed=seed, first=first, noisy=noisy, sequential=sequential,
                                parallel=way, callback=callback)  # fmt: skip
    if method in ("naive", "uni-inv", "direct"):
        return passed(diffusion, images, method, callback)
    if method == "flowopt":
        return _moved(diffusion, images, begin, seed, first, iterations, tolerance, callback)
    if method != "optimised":
        raise PushforwardError(f"Codes are found by one of {', '.join(METHODS)}; got {method!r}.")
    if diffusion.plan.implicit:
        diffusion = diffusion.run_by(
            gradient=diffusion.gradient or Implicit(), parallel=diffusion.parallel or _TOGETHER
        )
    # A squared error of no more than `tolerance^2` keeps every value within the tolerance.
    return optimise(diffusion, images, optimiser="l-bfgs", steps=iterations, learning_rate=0.1, begin=begin, seed=seed,
                    first=first, tolerance=tolerance**2, callback=callback)  # fmt: skip


def optimise(
    pushforward: Pushforward,
    images: Tensor,
    *,
    optimiser: OptimiserName = "adam",
    steps: int = 200,
    learning_rate: float | None = None,
    begin: Beginning | Code = "random",
    noises: bool = False,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    tolerance: float = 1e-4,
    callback: Callable[[Record], None] | None = None,
) -> Inversion:
    """Codes that decode to images as nearly as can be, found by descending the squared error.

    A step is one decoding and one gradient of the images that are not done, all in one batch; what becomes of an image
    does not depend on the others.

    Args:
        pushforward: a diffusion of any plan, stochastic ones included, or another map, such as a GAN, bound to the
            classes or prompts of the images. A diffusion is differentiated as its `run_by` says, by default with the
            memory of one network call.
        images: in [-1, 1], `(count, channels, height, width)`.
        optimiser: `adam`; `l-bfgs` with a line search, which wants an accurate gradient (`Exact`, `Implicit`); or
            `white`, whose codes have the spectrum of noise.
        steps: at most so many.
        learning_rate: Adam's, 0.05 by default; the root mean square of the first move of L-BFGS, 0.05, or of the steps
            of `white`, 0.6. A code's own is 1.
        begin: at the codes that the map draws for the seed (`random`); at those of a plain `forward` pass of DDIM,
            which is nearly inverse for a deterministic one-step plan; or at any `Code`, whose `end` is kept.
        noises: whether the noises of a stochastic plan are sought too; else they stay as they are at the beginning.
        seed: seed of a random beginning, and of the noises.
        first: number of the first image, or the number of each.
        tolerance: an image is done when its loss is not above this.
        callback: told after every step.

    Raises:
        PushforwardError: adaptive steps, images, labels or a code that do not fit, noises sought of a plan that takes
            none, a forward beginning of another plan; and as `Diffusion.decode`.
    """
    _check_images(images)
    method, learning_rate = optimiser_of(optimiser, steps, learning_rate)
    if not 0 <= tolerance < math.inf:
        raise PushforwardError(f"The tolerance of the loss must be 0 or more; got {tolerance}.")
    began = time.perf_counter()
    counted = Counted.of(pushforward, len(images))
    images = images.to(counted.nfe.device)
    start = _beginning(counted, images, begin, seed, first)
    if noises and start.noises is None:
        raise PushforwardError(
            "The map takes no noises that could be sought; leave `noises` out, or take a stochastic plan."
        )
    x, code_of = _packed(start, noises)
    state = method.begin(x)
    best, least = x.clone(), torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    history: list[Record] = []
    for step in range(steps + 1):
        some = active.nonzero()[:, 0]
        variable = x[some].detach().requires_grad_(step < steps)
        with torch.enable_grad():
            losses = _losses(counted.decode(code_of(variable, some), some), images[some])
        loss = least.index_copy(0, some, losses.detach())
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better[:, None], x, best)
        active = active & ~(loss <= tolerance)
        slopes = torch.zeros_like(x)
        if step < steps and bool(active.any()):
            with torch.enable_grad():
                slopes[some] = torch.autograd.grad(losses[active[some]].sum(), variable)[0]
        history.append(Record(step, loss.cpu(), counted.nfe.clone().cpu(), time.perf_counter() - began))
        if callback is not None:
            callback(history[-1])
        active = active & slopes.isfinite().all(1) & loss.isfinite()
        if step == steps or not bool(active.any()):
            break
        state = method.advance(state, loss, slopes, learning_rate, start.start.shape[1:])
        x, active = state["point"], active & ~state["stuck"]
        if not bool(active.any()):
            break
    every = torch.arange(len(x), device=x.device)
    code, loss, nfe = code_of(best, every), least.cpu(), history[-1].nfe
    return Inversion(code, pushforward, len(history), 0, nfe, loss.sqrt(), loss, tuple(history))


@torch.no_grad()
def _moved(
    diffusion: Diffusion,
    images: Tensor,
    begin: Beginning,
    seed: int,
    first: int | Sequence[int],
    iterations: int,
    tolerance: float,
    callback: Callable[[Progress], None] | None,
) -> Inversion:
    """The nearest of the codes that moving against the error of the decoded image leads to (FlowOpt)."""
    clean, calls, begun = last_states(diffusion, images), diffusion.plan.nfe, 0
    code = diffusion.draw(len(images), seed=seed, first=first)
    if begin == "forward":
        code, _, begun = passing(diffusion, clean, "uni-inv", callback)
    z = code.start.clone()
    best, least = z.clone(), z.new_full((len(z),), math.inf)
    nfe = torch.full((len(z),), begun, device="cpu")
    some, rounds = torch.arange(len(z), device=z.device), 0
    while len(some):
        gap = gaps(diffusion.some(some), Code(z[some]), clean[some], callback)
        size = gap.flatten(1).abs().amax(1).nan_to_num(math.inf)
        better = some[size < least[some]]
        best[better], least[some] = z[better], torch.minimum(least[some], size)
        nfe[some.cpu()], rounds = nfe[some.cpu()] + calls, rounds + 1
        z[some] -= MOVE * gap
        some = some[(size > tolerance) & size.isfinite()] if rounds <= iterations else some[:0]
    return Inversion(Code(best), diffusion, begun + (rounds - 1) * calls, calls, nfe, least.cpu())


def _losses(images: Tensor, wanted: Tensor) -> Tensor:
    """Sums of squares `(n,)`, float64."""
    if images.shape != wanted.shape:
        got, made = tuple(wanted.shape[1:]), tuple(images.shape[1:])
        raise PushforwardError(f"The model makes images of shape {made}; got images of shape {got}.")
    return (images.double() - wanted).square().flatten(1).sum(1)


# -- the variables ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _beginning(
    counted: Counted, images: Tensor, begin: Beginning | Code, seed: int, first: int | Sequence[int]
) -> Code:
    """The first codes, where the map's own are and in their dtype."""
    drawn = counted.pushforward.draw(len(images), seed=seed, first=first)
    if isinstance(begin, Code):
        _check_begin(begin, drawn)
        return replace(begin, residual=None).to(drawn.start)
    if begin == "random":
        return drawn
    if begin != "forward":
        raise PushforwardError(f"Optimisation begins at random, forward or a code; got {begin!r}.")
    there = counted.some(torch.arange(len(images), device=images.device))
    if not isinstance(there, Diffusion):
        raise PushforwardError("Only a diffusion has a forward pass to begin at; begin at random.")
    if there.model.decoder is not None:
        raise PushforwardError(
            f"A forward pass needs a model of images, but model {there.model.name!r} diffuses none; begin at random."
        )
    code, *_ = passing(there, last_states(there, images), "naive")
    return Code(code.start.to(drawn.start))


def _packed(start: Code, noises: bool) -> tuple[Tensor, Callable[[Tensor, Tensor], Code]]:
    """The variables `(count, numbers)` of a code, and the way from those of images `some (n,)` to their code."""
    if noises:
        return start.variables(), lambda x, some: start[some].with_variables(x)

    def code_of(x: Tensor, some: Tensor) -> Code:
        return replace(start[some], start=x.reshape(len(x), *start.start.shape[1:]))

    return start.start.flatten(1), code_of


# -- arguments -------------------------------------------------------------------------------------------------------


def _check_images(images: Tensor) -> None:
    if not len(images) or images.ndim < 2 or not images.is_floating_point() or not bool(images.isfinite().all()):
        raise PushforwardError(
            f"The images must be one or more, of finite numbers in [-1, 1]; got {images.dtype} {tuple(images.shape)}."
        )


def _check_begin(begin: Code, drawn: Code) -> None:
    """Raise unless a code to begin at has the parts that the map's own have."""
    if len(begin) != len(drawn):
        raise PushforwardError(f"For {many(len(drawn), 'image')} give as many codes to begin at; got {len(begin)}.")
    for name, part, wanted in (
        ("start", begin.start, drawn.start),
        ("noises", begin.noises, drawn.noises),
        ("end", begin.end, None if begin.end is None else drawn.start),
    ):
        found, expected = (None if x is None else tuple(x.shape) for x in (part, wanted))
        if found != expected:
            raise PushforwardError(
                f"The {name} of the code to begin at must have shape {expected} for these images; got {found}."
            )
