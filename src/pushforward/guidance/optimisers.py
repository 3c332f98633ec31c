"""Descent on many functions at once, one per image: Adam, L-BFGS with a line search, and descent among white codes.

A method's state is a mapping of tensors. Among them are the `point` at which it asks for loss and gradient, and a flag
for the images that are `stuck` at a dead end:

    state = LBFGS.begin(x)
    state = LBFGS.advance(state, loss, gradient, 0.05, (1, 28, 28))     # told of state["point"]

References:
    Numerical Optimization, Nocedal & Wright, 2nd edition, algorithms 7.4 and 3.1 (L-BFGS, line search).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from pushforward.errors import PushforwardError
from pushforward.execute.system import root_mean_square
from pushforward.guidance.spectrum import bands, evened, tangent, white

__all__ = ["ADAM", "LBFGS", "OPTIMISERS", "WHITE", "Optimiser", "OptimiserName", "State", "optimiser_of"]

_HISTORY = 10  # pairs that L-BFGS keeps
_LONGEST = 1.0  # root mean square of the longest step; a code's own is 1
_ENOUGH = 1e-4  # part of the expected decrease that it takes for one
_MOMENTUM = 0.8  # of the last directions in the next, among white codes; and of what sets their bands apart
_LONGER, _SHORTER = 1.1, 0.6  # factors of a step among white codes after a lower loss, and after a higher one
_TRIES = 8  # points along one direction, before it begins anew and, without success, ends

State = Mapping[str, Tensor]
OptimiserName = Literal["adam", "l-bfgs", "white"]


class Optimiser(NamedTuple):
    """A method of descent.

    Args:
        begin: function from points `(count, numbers)` to a state.
        advance: function from a state, the losses `(count,)` and gradients `(count, numbers)` at its `point`, the
            learning rate, and the shape `(channels, *field)` of the parts that points are made of, to the next state.
        rate: the learning rate to begin with; a code's own size is 1.
    """

    begin: Callable[[Tensor], State]
    advance: Callable[[State, Tensor, Tensor, float, Sequence[int]], State]
    rate: float = 0.05


def _adam_begin(x: Tensor) -> State:
    none = torch.zeros_like(x)
    stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return {"point": x, "stuck": stuck, "mean": none, "square": none, "steps": torch.tensor(0.0, device="cpu")}


@torch.no_grad()
def _adam_advance(
    state: State,
    loss: Tensor,  # noqa: ARG001
    gradient: Tensor,
    learning_rate: float,
    shape: Sequence[int],  # noqa: ARG001
) -> State:
    point, mean, square, steps = (state[name].clone() for name in ("point", "mean", "square", "steps"))
    adam(
        [point], [gradient.nan_to_num(0, 0, 0)], [mean], [square], [], [steps],
        amsgrad=False, beta1=0.9, beta2=0.999, lr=learning_rate, weight_decay=0.0, eps=1e-8, maximize=False,
    )  # fmt: skip
    return {**state, "point": point, "mean": mean, "square": square, "steps": steps}


def _lbfgs_begin(x: Tensor) -> State:
    none, zero = torch.zeros_like(x), x.new_zeros(len(x), dtype=torch.float64)
    return {
        "point": x, "stuck": zero.bool(), "base": x, "base_loss": zero + math.inf, "base_gradient": none,
        "direction": none, "length": zero + 1, "slope": zero, "tries": zero.long(),
        "moves": x.new_zeros(_HISTORY, *x.shape), "changes": x.new_zeros(_HISTORY, *x.shape),
        "inverse": x.new_zeros(_HISTORY, len(x)),  # of <move, change>, or 0: no such pair
    }  # fmt: skip


@torch.no_grad()
def _lbfgs_advance(
    state: State,
    loss: Tensor,
    gradient: Tensor,
    learning_rate: float,
    shape: Sequence[int],  # noqa: ARG001
) -> State:
    s = {name: tensor.clone() for name, tensor in state.items()}
    base, base_loss, base_gradient, inverse = s["base"], s["base_loss"], s["base_gradient"], s["inverse"]
    length, slope = s["length"], s["slope"]
    taken = loss <= base_loss + _ENOUGH * length * slope
    move, change = s["point"] - base, gradient - base_gradient
    product = _dot(move, change)
    new = (taken & (product > 1e-8 * change.norm(dim=1) * move.norm(dim=1))).nonzero()[:, 0]
    for held, latest in ((s["moves"], move), (s["changes"], change), (inverse, 1 / product)):
        held[:, new] = torch.cat([held[1:, new], latest[None, new]])
    base[taken], base_gradient[taken], base_loss[taken] = s["point"][taken], gradient[taken], loss[taken].double()
    tries = torch.where(taken, 0, s["tries"] + 1)
    again = (tries >= _TRIES) & (inverse != 0).any(0)  # along the gradient, with nothing remembered
    stuck = s["stuck"] | ((tries >= _TRIES) & ~again)  # for good, whatever the others do
    inverse[:, again] = 0
    turn = taken | again
    ahead = _direction(base_gradient, s["moves"], s["changes"], inverse, learning_rate)
    direction = torch.where(turn[:, None], ahead, s["direction"])
    rise = loss - base_loss - slope * length  # above the tangent: a parabola through it has its least here
    parabola = (-0.5 * slope * length.square() / rise).nan_to_num(0)
    shorter = torch.minimum(torch.maximum(parabola, 0.1 * length), 0.5 * length)
    length = torch.where(turn, 1.0, shorter)
    return {
        **s, "point": base + length[:, None].to(base) * direction, "stuck": stuck, "direction": direction,
        "length": length, "slope": torch.where(turn, _dot(base_gradient, direction).double(), slope),
        "tries": torch.where(again, 0, tries),
    }  # fmt: skip


def _direction(gradient: Tensor, moves: Tensor, changes: Tensor, inverse: Tensor, first: float) -> Tensor:
    """Run the two loops of L-BFGS over the pairs remembered, latest last; a move of size `first` if there are none."""
    q, weights = gradient, []
    for s, y, rho in reversed(list(zip(moves, changes, inverse, strict=True))):
        weights.append(rho * _dot(s, q))
        q = q - weights[-1][:, None] * y
    alone = first / root_mean_square(gradient, 1).clamp_min(torch.finfo(gradient.dtype).tiny)
    scale = torch.where(inverse[-1] != 0, 1 / (inverse[-1] * _dot(changes[-1], changes[-1])), alone)
    q = scale[:, None] * q
    for s, y, rho in zip(moves, changes, inverse, strict=True):
        q = q + (weights.pop() - rho * _dot(y, q))[:, None] * s
    return -q * (_LONGEST / root_mean_square(q, 1).clamp_min(_LONGEST))[:, None]


def _white_begin(x: Tensor) -> State:
    one = x.new_ones(len(x))
    return {
        "point": x, "stuck": ~one.bool(), "mean": torch.zeros_like(x), "steps": 0 * one, "length": one,
        "last": math.inf * one.double(),
    }  # fmt: skip


@torch.no_grad()
def _white_advance(state: State, loss: Tensor, gradient: Tensor, learning_rate: float, shape: Sequence[int]) -> State:
    point, steps = state["point"], state["steps"] + 1
    field = bands(tuple(shape)).to(point.device)
    along = evened(tangent(point, gradient.nan_to_num(0, 0, 0), field), field, 1 - 2 * _MOMENTUM**steps)
    mean = _MOMENTUM * tangent(point, state["mean"], field) + (1 - _MOMENTUM) * along
    length = torch.where(loss < state["last"], _LONGER * state["length"], _SHORTER * state["length"])
    length = length.clamp_max(_LONGEST / learning_rate)
    move = learning_rate * length / (1 - _MOMENTUM**steps)
    point = white(point - move[:, None] * mean, field)
    return {**state, "point": point, "mean": mean, "steps": steps, "length": length, "last": loss.double()}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


ADAM = Optimiser(_adam_begin, _adam_advance)
"""Adam (Kingma & Ba, arXiv 1412.6980), each number for itself; the learning rate is about the size of its steps."""

LBFGS = Optimiser(_lbfgs_begin, _lbfgs_advance)
"""L-BFGS on all images at once, each in a line search of its own: a step is one point tried; the learning rate is the
root mean square of the first move."""

WHITE = Optimiser(_white_begin, _white_advance, 0.6)
"""Descent with momentum among white codes, see `guidance.spectrum`. Its first steps turn the bands whose gradient is
steep, its last ones all bands equally far: what an image is gets decided before details that fool a network. The
learning rate is the root mean square of the first step, whatever the length of the gradient. An image's steps grow a
little as long as its loss falls, and shrink where it rises."""

OPTIMISERS: Mapping[str, Optimiser] = {"adam": ADAM, "l-bfgs": LBFGS, "white": WHITE}


def optimiser_of(name: str, steps: int, learning_rate: float | None) -> tuple[Optimiser, float]:
    """The method of that name, and the learning rate: by default, its own.

    Raises:
        PushforwardError: there is no such method, or a number is out of range.
    """
    method = OPTIMISERS.get(name)
    rate = method.rate if method is not None and learning_rate is None else learning_rate
    if method is None or steps < 1 or not (isinstance(rate, Real) and 0 < rate < math.inf):
        raise PushforwardError(
            f"A descent needs an optimiser ({', '.join(OPTIMISERS)}), 1 step or more and a positive learning rate; got "
            f"{name!r}, {steps} and {learning_rate!r}."
        )
    return method, rate
