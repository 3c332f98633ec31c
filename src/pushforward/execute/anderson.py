r"""Anderson's mixing of fixed-point iterates, for chains.

With the states `x_i` and moves `r_i` of the last rounds, `dX_i = x_{i+1} - x_i` and `dR_i = r_{i+1} - r_i`, the next
states are `x + r - (dX + dR) gamma`, where gamma makes `r - dR gamma` small in least squares over some of the steps:
over the step itself (`step`), over all (`joint`), or over it and all before it (`triangular`), which respects that no
step depends on later ones. The least squares are regularised by `ridge`, relative to their own size or absolute.

References:
    Iterative Procedures for Nonlinear Integral Equations, Anderson, J. ACM 12 (1965);
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (`step`);
    Accelerating Parallel Sampling of Diffusion Models, Tang et al., arXiv 2402.09970, section 3 (`triangular`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute.system import System


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
        if self.history < 1 or not self.ridge > 0:
            raise PushforwardError(
                f"Mixing needs a history of at least 1 and a positive ridge; got {self.history} and {self.ridge}."
            )


def anderson_step(
    system: System,
    states: Tensor,
    moves: Tensor,
    sizes: Tensor,
    history: list[tuple[Tensor, Tensor, Tensor]],
    mixing: Mixing,
    free: Tensor,
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Better moves from these and past ones, and the part of these that past ones do not explain; `history` is kept up.

    Args:
        system: whose stacks these are.
        states: of this round, before the moves.
        moves: of this round.
        sizes: sizes of the moves, `(nodes, batch)`.
        history: states, moves and their sizes of past rounds.
        mixing: how.
        free: nodes that are not settled yet, `(nodes, batch)`; the others keep their moves, and count for nothing.
        backwards: steps depend on the later ones, not on those before.
    """
    history.append((states, moves, sizes))
    del history[: -mixing.history - 1]
    if len(history) < 2:
        return moves, moves
    older, newer = history[:-1], history[1:]
    d_moves = torch.stack([system.by_image(b[1] - a[1]) for a, b in zip(older, newer, strict=True)])
    d_total = torch.stack([system.by_image(b[0] - a[0]) for a, b in zip(older, newer, strict=True)]) + d_moves
    flat = torch.stack([system.by_image(system.whitened(b[1] - a[1])) for a, b in zip(older, newer, strict=True)])
    own = system.by_image(system.whitened(moves))
    gram = torch.einsum("afnkbr,cfnkbr->nbac", flat, flat).double()
    right = torch.einsum("afnkbr,fnkbr->nba", flat, own).double()
    gram, right = gram * free[..., None, None], right * free[..., None]
    gram, right = (_over(mixing.over, x, backwards=backwards) for x in (gram, right))
    many = len(flat)
    if mixing.shrink is not None:
        kept = _shrinking([x[2] * free for x in history], mixing.shrink, backwards=backwards).to(gram)
        gram, right = gram * kept[..., None, :] * kept[..., None], right * kept
    if mixing.relative:
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        gram = gram + (mixing.ridge * size + 1e-30) * torch.eye(many).to(gram)
    else:  # weights alpha = e_last - T gamma
        to_weights = torch.zeros(many + 1, many).to(gram)
        index = torch.arange(many)
        to_weights[index, index], to_weights[index + 1, index] = -1.0, 1.0
        gram = gram + mixing.ridge * to_weights.mT @ to_weights
        right = right + mixing.ridge * to_weights[-1]
    gamma = torch.linalg.solve(gram, right[..., None])[..., 0]
    usable = gamma.isfinite().all(-1, keepdim=True) & free[..., None]
    gamma = torch.where(usable, gamma, 0.0).to(moves)
    total, unexplained = (
        moves - torch.einsum("afnkbr,nba->fnkbr", d, gamma).reshape(moves.shape) for d in (d_total, d_moves)
    )
    return total, unexplained


def _shrinking(sizes: Sequence[Tensor], shrink: float, *, backwards: bool) -> Tensor:
    """Differences of rounds in and since which the moves up to a node shrank, `(nodes, batch, many)`."""
    each = torch.stack(list(sizes))
    greatest = each.flip(1).cummax(1).values.flip(1) if backwards else each.cummax(1).values
    shrank = greatest[1:] < shrink * greatest[:-1]
    return shrank.flip(0).cumprod(0).flip(0).movedim(0, -1)


def _over(which: Literal["triangular", "joint", "step"], per_node: Tensor, *, backwards: bool) -> Tensor:
    """Sums over the nodes that a node's least squares take in."""
    match which:
        case "step":
            return per_node
        case "joint":
            return per_node.sum(0, keepdim=True).expand_as(per_node)
        case "triangular":
            return per_node.flip(0).cumsum(0).flip(0) if backwards else per_node.cumsum(0)
