r"""Anderson's mixing of fixed-point iterates, for chains.

With the states `x_i` and moves `r_i` of the last rounds, `dX_i = x_{i+1} - x_i` and `dR_i = r_{i+1} - r_i`, the next
states are `x + r - (dX + dR) gamma`, where gamma makes `r - dR gamma` small in least squares over some of the steps:
over the step itself (`step`), over all (`joint`), or over it and all before it (`triangular`), which respects that no
step depends on later ones. The least squares are regularised by `ridge`, relative to their own size or absolute.

Of past rounds `dX + dR` and `dR` are all that is needed. Those of float32 are kept in float16, in units of each node's
root mean square: what is lost lies below the default `ridge`. All is worked out a few nodes at a time, so that nothing
as large as a stack is made but these and the moves.

References:
    Iterative Procedures for Nonlinear Integral Equations, Anderson, J. ACM 12 (1965);
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (`step`);
    Accelerating Parallel Sampling of Diffusion Models, Tang et al., arXiv 2402.09970, section 3 (`triangular`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.errors import PushforwardError
from pushforward.execute.system import System, root_mean_square


@dataclass(frozen=True)
class Mixing:
    """How past rounds are combined.

    Args:
        over: which steps each step's combination is fitted to.
        history: past rounds in use.
        ridge: regularisation of the least squares.
        relative: `ridge` is relative to the mean square of the moves' differences; else it penalises the squares of
            the combination's weights, which sum to 1, in absolute terms.
        shrink: use the rounds since which the greatest move up to a step has shrunk below this part of the last
            round's, every time; `None`: all of the `history`.
    """

    over: Literal["triangular", "joint", "step"] = "triangular"
    history: int = 4
    ridge: float = 1e-6
    relative: bool = True
    shrink: float | None = 0.8

    def __post_init__(self) -> None:
        schema.check_fields(self)
        if self.history < 1 or not self.ridge > 0:
            raise PushforwardError(
                f"Mixing needs a history of at least 1 and a positive ridge; got {self.history} and {self.ridge}."
            )


@dataclass(frozen=True, eq=False)
class _Difference:
    """A difference of two rounds.

    Args:
        values: in units of `unit`, `(nodes, k, batch, rest, frequencies)`.
        unit: each node's root mean square, `(nodes, batch)`.
    """

    values: Tensor
    unit: Tensor


@dataclass(eq=False)
class History:
    """Past rounds.

    Args:
        last: what the last round asked for, a stack as in `System`.
        moved: what it moved all by, likewise.
        sizes: sizes of the moves of the last rounds, each `(nodes, batch)`.
        totals: `dX + dR` between the last rounds.
        moves: `dR` between them, in units of the marginals' deviations.
    """

    last: Tensor | None = None
    moved: Tensor | None = None
    sizes: list[Tensor] = field(default_factory=list)
    totals: list[_Difference] = field(default_factory=list)
    moves: list[_Difference] = field(default_factory=list)

    def add(self, system: System, moves: Tensor, sizes: Tensor, most: int) -> None:
        """Take in a round, and forget all but the `most` latest differences."""
        self.sizes = [*self.sizes, sizes][-most - 1 :]
        if self.last is not None and self.moved is not None:
            many = max(0, len(self.moves) + 1 - most)
            del self.totals[:many], self.moves[:many]
            moved, past, now = (system.lanes(x) for x in (self.moved, self.last, moves))
            total, move = _room(now), _room(now)
            for some in system.parts(moves):
                d_moves = now[some] - past[some]
                _put(moved[some] + d_moves, total, some)
                _put(d_moves.mul_(system.weight[some]), move, some)
            self.totals.append(total)
            self.moves.append(move)
        self.last, self.moved = moves, None


def anderson_step(
    system: System,
    moves: Tensor,
    sizes: Tensor,
    history: History,
    mixing: Mixing,
    free: Tensor,
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mix moves with past ones, and return them with the sizes of what past ones do not explain; update `history`.

    Args:
        system: whose stacks these are.
        moves: of this round.
        sizes: sizes of the moves, `(nodes, batch)`.
        history: past rounds; to be told what all are `moved` by in the end.
        mixing: how.
        free: nodes that are not settled yet, `(nodes, batch)`; the others keep their moves, and count for nothing.
        backwards: steps depend on the later ones, not on those before.
    """
    history.add(system, moves, sizes, mixing.history)
    many = len(history.moves)
    if not many:
        return moves, sizes
    products = _products(system, moves, history.moves)
    gram, right = (x * free[..., None, None] for x in (products[..., :many, :many], products[..., :many, many:]))
    gram, right = (_over(mixing.over, x, backwards=backwards) for x in (gram, right[..., 0]))
    if mixing.shrink is not None:
        kept = _shrinking([x * free for x in history.sizes], mixing.shrink, backwards=backwards).to(gram)
        gram, right = gram * kept[..., None, :] * kept[..., None], right * kept
    if mixing.relative:
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        gram = gram + (mixing.ridge * size + 1e-30) * torch.eye(many, device="cpu").to(gram)
    else:  # weights alpha = e_last - T gamma
        to_weights = torch.zeros(many + 1, many, device="cpu").to(gram)
        index = torch.arange(many, device="cpu")
        to_weights[index, index], to_weights[index + 1, index] = -1.0, 1.0
        gram = gram + mixing.ridge * to_weights.mT @ to_weights
        right = right + mixing.ridge * to_weights[-1]
    gamma = torch.linalg.solve(gram, right[..., None])[..., 0]
    usable = gamma.isfinite().all(-1, keepdim=True) & free[..., None]
    gamma = torch.where(usable, gamma, 0.0)
    weights = torch.cat([-gamma, torch.ones_like(gamma[..., :1])], -1)[..., None]
    unexplained = (weights.mT @ products @ weights)[..., 0, 0].clamp_min(0).sqrt()
    return _mixed(system, moves, history.totals, gamma), unexplained.to(moves)


def _products(system: System, moves: Tensor, past: Sequence[_Difference]) -> Tensor:
    """Return mean products of moves' differences and of these moves by node, `(nodes, batch, many + 1, many + 1)`."""
    now, found = system.lanes(moves), []
    for some in system.parts(moves, len(past) + 1):
        own = now[some] * system.weight[some]
        each = own.new_empty(*own.shape[:3], len(past) + 1, *own.shape[3:])
        for place, values in zip(each.unbind(3), [*(x.values[some] for x in past), own], strict=True):
            place.copy_(values)
        rows = each.flatten(4).flatten(0, 2)
        found.append(torch.bmm(rows, rows.mT).double().unflatten(0, own.shape[:3]).mean(1) / rows.shape[-1])
    units = torch.stack([*(x.unit for x in past), torch.ones_like(past[0].unit)], -1).double()
    return torch.cat(found) * units[..., None, :] * units[..., None]


def _mixed(system: System, moves: Tensor, past: Sequence[_Difference], gamma: Tensor) -> Tensor:
    """Return `moves - (dX + dR) gamma`."""
    mixed = moves.clone()
    into = system.lanes(mixed)
    for difference, weights in zip(past, gamma.unbind(-1), strict=True):
        weight = (difference.unit * weights).to(moves)[:, None, :, None, None]
        for some in system.parts(moves, 2):
            into[some].addcmul_(difference.values[some].to(moves), weight[some], value=-1)
    return mixed


def _room(like: Tensor) -> _Difference:
    """Room for a difference."""
    dtype = torch.float16 if like.dtype == torch.float32 else like.dtype
    return _Difference(torch.empty(like.shape, dtype=dtype, device=like.device), like.new_empty(like.shape[0:3:2]))


def _put(values: Tensor, into: _Difference, some: slice) -> None:
    unit = root_mean_square(values, 1, 3, 4)
    into.unit[some] = unit
    into.values[some] = values.div_(torch.where(unit > 0, unit, 1.0)[:, None, :, None, None])


def _shrinking(sizes: Sequence[Tensor], shrink: float, *, backwards: bool) -> Tensor:
    """Return differences of rounds in and since which the moves up to a node shrank, `(nodes, batch, many)`."""
    each = torch.stack(list(sizes))
    greatest = each.flip(1).cummax(1).values.flip(1) if backwards else each.cummax(1).values
    shrank = greatest[1:] < shrink * greatest[:-1]
    return shrank.flip(0).cumprod(0).flip(0).movedim(0, -1)


def _over(which: Literal["triangular", "joint", "step"], per_node: Tensor, *, backwards: bool) -> Tensor:
    """Return sums over the nodes that a node's least squares take in."""
    match which:
        case "step":
            return per_node
        case "joint":
            return per_node.sum(0, keepdim=True).expand_as(per_node)
        case "triangular":
            return per_node.flip(0).cumsum(0).flip(0) if backwards else per_node.cumsum(0)
