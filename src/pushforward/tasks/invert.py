r"""Codes behind images by optimisation: the least squares of decoding.

For each image of a batch, alone,

    minimise over its code z:    loss(z) = || decode(z) - image ||^2,

the sum over the image's values. Every plan has such codes, of which the exact inverse, where there is one, is a code
of loss 0: a plan that ends at time 0, or takes noises, has none, and strong guidance may have none. A fixed-point
inversion that did not converge is refined by beginning at what it found.

The gradient of all images' losses comes by any of the ways of `execute.adjoint`; approximate ones (`Phantom`,
`Skeleton`) may not lead to the least loss. The code returned for an image is the best of all that were tried.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (inversion);
    Numerical Optimization, Nocedal & Wright, 2nd edition, algorithms 7.4 and 3.1 (L-BFGS, line search).
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
from pushforward.execute import Adaptive, Exact, Gradient, Implicit, Parallel, Phantom
from pushforward.execute.reversible import naive_inversion
from pushforward.linear import Process
from pushforward.model.network import Ask, Denoiser
from pushforward.plan import Plan
from pushforward.pushforward import Code, Diffusion, Labels, Stream, chosen

__all__ = ["Optimised", "Record", "naive", "optimise"]

_EXACT = Exact()
_HISTORY = 10  # pairs that L-BFGS keeps
_LONGEST = 1.0  # root mean square of its longest step; a code's own is 1
_ENOUGH = 1e-4  # part of the expected decrease that it takes for one
_TRIES = 8  # points along one direction, before it begins anew and, without success, ends


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
    diffusion: Diffusion,
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
        diffusion: of any plan, stochastic ones included.
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
    plan = _checked(diffusion, images, labels, begin, noises)
    _check_numbers(steps, learning_rate, tolerance)
    began = time.perf_counter()
    problem = _Problem.make(diffusion, images, labels, guidance, gradient, parallel)
    start = _beginning(problem, plan, begin, seed, first)
    x, code_of = _packed(start, noises)
    descend = (_adam if optimiser == "adam" else _lbfgs)(x, learning_rate)
    best, least = x.clone(), torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    history: list[Record] = []
    for step in range(steps + 1):
        some = active.nonzero()[:, 0]
        variable = x[some].detach().requires_grad_(step < steps)
        with torch.enable_grad():
            losses = problem.losses(code_of(variable, some), some)
        loss = least.index_copy(0, some, losses.detach())
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better[:, None], x, best)
        active = active & ~(loss <= tolerance)
        slopes = torch.zeros_like(x)
        if step < steps and bool(active.any()):
            with torch.enable_grad():
                slopes[some] = torch.autograd.grad(losses[active[some]].sum(), variable)[0]
        history.append(Record(step, loss.cpu(), problem.nfe.clone().cpu(), time.perf_counter() - began))
        if callback is not None:
            callback(history[-1])
        active = active & slopes.isfinite().all(1) & loss.isfinite()
        if step == steps or not bool(active.any()):
            break
        x, stuck = descend(loss, slopes)
        active = active & ~stuck
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
    plan = _checked(diffusion, images, labels, "forward", noises=False)
    end, like = plan.times[-1:], diffusion.start(torch.zeros(diffusion.model.state_shape(1)))
    model = diffusion.model.to(like.device).given(labels, guidance)
    state = plan.process.transition(end, torch.zeros_like(end))[0](plan.process.lift(images.to(like)))
    return Code(diffusion.code(naive_inversion(plan, model.denoiser, state)))


# -- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Problem:
    """The decoding of some images with its loss, and a count of network evaluations."""

    diffusion: Diffusion
    images: Tensor
    labels: Labels
    guidance: float
    gradient: Gradient
    parallel: Parallel | None
    nfe: Tensor

    @classmethod
    def make(
        cls,
        diffusion: Diffusion,
        images: Tensor,
        labels: Labels,
        guidance: float,
        gradient: Gradient,
        parallel: Parallel | None,
    ) -> _Problem:
        model = diffusion.model
        device = diffusion.start(torch.zeros(model.state_shape(1))).device
        if isinstance(gradient, Implicit | Phantom) and gradient.reference is None:
            # The same one at every step, so that its linear system is made once.
            gradient = replace(gradient, reference=model.gaussian.tempered())
        nfe = torch.zeros(len(images), dtype=torch.long, device=device)
        diffusion = replace(diffusion, model=model.to(device), device=device)
        return cls(diffusion, images.to(device), labels, guidance, gradient, parallel, nfe)

    def losses(self, code: Code, some: Tensor) -> Tensor:
        """Sums of squares of the images numbered `some (n,)` whose codes these are, `(n,)`, float64."""
        images = self.of(some).decode(code, gradient=self.gradient, parallel=self.parallel)
        wanted = self.images[some]
        if images.shape != wanted.shape:
            got, made = tuple(wanted.shape[1:]), tuple(images.shape[1:])
            msg = f"Model {self.diffusion.model.name!r} makes images of shape {made}; got images of shape {got}."
            raise PushforwardError(msg)
        return (images.double() - wanted).square().flatten(1).sum(1)

    def of(self, some: Tensor) -> Diffusion:
        """The diffusion under the labels of some images, its network evaluations counted for them."""
        model = self.diffusion.model.given(chosen(self.labels, some.cpu()), self.guidance)
        counted = replace(model, denoiser=_Counted(model.denoiser, self.nfe, some))
        return replace(self.diffusion, model=counted)


@dataclass(frozen=True)
class _Counted:
    """A denoiser that adds the rows it is asked about to those of the images `some` in `nfe`.

    A gradient's vector-Jacobian product asks once, and so counts as one.
    """

    denoiser: Denoiser
    nfe: Tensor
    some: Tensor

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.denoiser.at(process, times, like)

        def counted(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            rows = self.some if of is None else self.some[of]
            self.nfe.index_add_(0, rows, torch.ones_like(rows))
            return ask(k, u, of)

        return counted


# -- the variables ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _beginning(
    problem: _Problem, plan: Plan, begin: Literal["random", "forward"] | Code, seed: int, first: int
) -> Code:
    """The first codes, on the images' device."""
    images, model = problem.images, problem.diffusion.model
    like = torch.zeros((), device=images.device, dtype=torch.promote_types(problem.diffusion.dtype, torch.float32))
    if isinstance(begin, Code):
        parts = (None if part is None else part.detach().to(like) for part in (begin.start, begin.noises, begin.end))
        return Code(*parts)  # type: ignore[arg-type]
    if begin == "random":
        stream = Stream(seed, range(first, first + len(images)), model.state_shape(1)[1:])
        start = stream.draw().to(like)
        return Code(start, torch.stack([stream.draw() for _ in plan.noises]).to(like) if plan.noises else None)
    found = naive(problem.of(torch.arange(len(images), device=images.device)), images)
    return Code(found.start.to(like))


def _packed(start: Code, noises: bool) -> tuple[Tensor, Callable[[Tensor, Tensor], Code]]:
    """The variables `(count, numbers)` of a code, and the way from those of images `some (n,)` to their code."""
    shape, size = start.start.shape[1:], start.start[0].numel()
    parts = [start.start.flatten(1)]
    if noises and start.noises is not None:
        parts.append(start.noises.movedim(1, 0).flatten(1))

    def code_of(x: Tensor, some: Tensor) -> Code:
        if len(parts) == 2:
            drawn: Tensor | None = x[:, size:].reshape(len(x), -1, *shape).movedim(0, 1)
        else:
            drawn = None if start.noises is None else start.noises[:, some]
        end = None if start.end is None else start.end[some]
        return Code(x[:, :size].reshape(len(x), *shape), drawn, end)

    return torch.cat(parts, 1), code_of


# -- descent ---------------------------------------------------------------------------------------------------------

# From the loss `(count,)` and its gradient `(count, numbers)` at the present point to the next one, and which images
# have come to a dead end. Every image is a problem of its own.
_Descend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _adam(x: Tensor, learning_rate: float) -> _Descend:
    point = x.clone()
    method = torch.optim.Adam([point], lr=learning_rate)

    def descend(loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        point.grad = gradient.nan_to_num(0, 0, 0)
        method.step()
        return point.clone(), torch.zeros_like(loss, dtype=torch.bool)

    return descend


def _lbfgs(x: Tensor, learning_rate: float) -> _Descend:
    """L-BFGS on all images at once, each in a line search of its own: a step is one point tried."""
    count = len(x)
    base, base_loss, base_gradient = x.clone(), torch.full_like(x[:, 0], math.inf).double(), torch.zeros_like(x)
    direction, length, slope = torch.zeros_like(x), torch.ones_like(base_loss), torch.zeros_like(base_loss)
    tries = torch.zeros(count, dtype=torch.long, device=x.device)
    moves, changes = x.new_zeros(_HISTORY, *x.shape), x.new_zeros(_HISTORY, *x.shape)
    inverse = x.new_zeros(_HISTORY, count)  # of <move, change>, or 0: no such pair
    point = x.clone()

    def descend(loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal direction, length, slope, tries, point
        taken = loss <= base_loss + _ENOUGH * length * slope
        move, change = point - base, gradient - base_gradient
        product = _dot(move, change)
        new = (taken & (product > 1e-8 * change.norm(dim=1) * move.norm(dim=1))).nonzero()[:, 0]
        for held, latest in ((moves, move), (changes, change), (inverse, 1 / product)):
            held[:, new] = torch.cat([held[1:, new], latest[None, new]])
        base[taken], base_gradient[taken], base_loss[taken] = point[taken], gradient[taken], loss[taken]
        tries = torch.where(taken, 0, tries + 1)
        again = (tries >= _TRIES) & (inverse != 0).any(0)  # along the gradient, with nothing remembered
        stuck = (tries >= _TRIES) & ~again
        inverse[:, again] = 0
        tries = torch.where(again, 0, tries)
        turn = taken | again
        ahead = _direction(base_gradient, moves, changes, inverse, learning_rate)
        direction = torch.where(turn[:, None], ahead, direction)
        rise = loss - base_loss - slope * length  # above the tangent: a parabola through it has its least here
        parabola = (-0.5 * slope * length.square() / rise).nan_to_num(0)
        shorter = torch.minimum(torch.maximum(parabola, 0.1 * length), 0.5 * length)
        length = torch.where(turn, 1.0, shorter)
        slope = torch.where(turn, _dot(base_gradient, direction).double(), slope)
        point = base + length[:, None].to(x) * direction
        return point.clone(), stuck

    return descend


def _direction(gradient: Tensor, moves: Tensor, changes: Tensor, inverse: Tensor, first: float) -> Tensor:
    """The two loops of L-BFGS over the pairs remembered, latest last; a move of size `first` if there are none."""
    q, weights = gradient, []
    for s, y, rho in reversed(list(zip(moves, changes, inverse, strict=True))):
        weights.append(rho * _dot(s, q))
        q = q - weights[-1][:, None] * y
    alone = first / _size(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    scale = torch.where(inverse[-1] != 0, 1 / (inverse[-1] * _dot(changes[-1], changes[-1])), alone)
    q = scale[:, None] * q
    for s, y, rho in zip(moves, changes, inverse, strict=True):
        q = q + (weights.pop() - rho * _dot(y, q))[:, None] * s
    return -q * (_LONGEST / _size(q).clamp_min(_LONGEST))[:, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _size(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


# -- arguments -------------------------------------------------------------------------------------------------------


def _checked(
    diffusion: Diffusion,
    images: Tensor,
    labels: Labels,
    begin: Literal["random", "forward"] | Code,
    noises: bool,
) -> Plan:
    """The plan, if all fits together."""
    plan, model = diffusion.plan, diffusion.model
    if isinstance(plan, Adaptive):
        msg = "Adaptive steps have no gradient; name a solver, e.g. ddim."
        raise PushforwardError(msg)
    if not len(images) or images.ndim < 2 or not images.is_floating_point() or not bool(images.isfinite().all()):
        msg = f"The images must be one or more, of finite numbers in [-1, 1]; got {images.dtype} {tuple(images.shape)}."
        raise PushforwardError(msg)
    if model.decoder is None and tuple(images.shape[1:]) != model.shape:
        msg = f"Model {model.name!r} has images of shape {model.shape}; got {tuple(images.shape[1:])}."
        raise PushforwardError(msg)
    if labels is not None and len(labels) != len(images):
        msg = f"{len(images)} images need as many labels; got {len(labels)}."
        raise PushforwardError(msg)
    if noises and not plan.noises:
        msg = f"The plan of {plan.solver!r} takes no noises that could be sought; leave `noises` out, or raise eta."
        raise PushforwardError(msg)
    if begin == "forward" and (plan.noises or model.decoder is not None):
        what = f"plan of {plan.solver!r} takes noises" if plan.noises else f"model {model.name!r} diffuses no images"
        msg = f"A forward pass needs a deterministic plan and a model of images, but the {what}; begin at random."
        raise PushforwardError(msg)
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
                msg = f"The {name} of the code to begin at must have shape {wanted} for these images; got {found}."
                raise PushforwardError(msg)
    return plan


def _check_numbers(steps: int, learning_rate: float, tolerance: float) -> None:
    if steps < 1:
        msg = f"Optimisation needs at least 1 step; got {steps}."
        raise PushforwardError(msg)
    if not 0 < learning_rate < math.inf:
        msg = f"The learning rate must be positive; got {learning_rate}."
        raise PushforwardError(msg)
    if not 0 <= tolerance < math.inf:
        msg = f"The tolerance of the loss must be 0 or more; got {tolerance}."
        raise PushforwardError(msg)
