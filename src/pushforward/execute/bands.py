r"""The matrices of a plan's linear system, `A`, `B` and `I - A - B L`, by their diagonals.

A stack of states has the shape `(frequencies, nodes, k, columns)`. In memory the nodes come first and the frequencies
last, so that a node's state is one piece and every product with a coefficient for each frequency runs along it.

How `(I - A - B L) x = r` is solved depends on the matrix:

- An explicit plan's is lower triangular: node after node, as the plan itself is run, with the answers' response in the
  place of the network, `A + B L` in one.
- Where all frequencies share one matrix, rows are taken in blocks whose inverses are known: few large products are
  faster than many small ones.
- An implicit plan's is one block, inverted for each frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Basis, Operator, add_products
from pushforward.plan import Plan

_BLOCK = 32  # rows inverted together
_COLUMNS = 2**13  # solved for together in blocks


@dataclass(frozen=True, eq=False)
class Band:
    """One column of the blocks on one diagonal: how rows `first … last - 1` take in the nodes `back` before them.

    Args:
        kind: whether it multiplies states or answers.
        back: how many nodes before each row; not above 0 where the plan refers ahead.
        first: the first row.
        column: column of the blocks.
        values: `(frequencies or 1, rows, k, 1)`.
    """

    kind: Literal["state", "answer"]
    back: int
    first: int
    column: int
    values: Tensor

    @property
    def last(self) -> int:
        """The row after the last."""
        return self.first + self.values.shape[1]

    def rows(self, first: int, last: int) -> Band:
        """Cut it to the rows `first … last - 1`; it has none left if `last` is not above `first`."""
        first, last = max(first, self.first), min(last, self.last)
        return replace(self, first=first, values=self.values[:, first - self.first : max(first, last) - self.first])

    def seen(self, stack: Tensor) -> Tensor:
        """Return what its rows take in of a stack, a view `(frequencies, rows, 1, columns)`."""
        column = slice(self.column, self.column + 1)
        return stack[:, self.first - self.back : self.last - self.back, column]

    def push(self, stack: Tensor, into: Tensor) -> None:
        """Add its product with a stack to its rows of another."""
        into[:, self.first : self.last].addcmul_(self.values, self.seen(stack))

    def pull(self, stack: Tensor, into: Tensor) -> None:
        """Add its transpose's product with its rows of a stack to another."""
        mine, seen = stack[:, self.first : self.last], self.seen(into)
        for row in range(mine.shape[2]):
            seen.addcmul_(self.values[:, :, row : row + 1], mine[:, :, row : row + 1])


@dataclass(frozen=True)
class _Block:
    """Rows `first … last - 1` of the matrix, which refer to columns `low … last - 1`, with their inverse.

    Args:
        first: the first row.
        last: the row after the last.
        low: the first column that is not 0.
        before: `A + B L` for the columns before `first`.
        inverse: of `I - A - B L` within the rows.
    """

    first: int
    last: int
    low: int
    before: Tensor
    inverse: Tensor


@dataclass(frozen=True, eq=False)
class Bands:
    """`A` and `B` by their diagonals, and `L`.

    Args:
        size: number of nodes.
        bands: of `A` and `B`.
        linear: of `A + B L`, as of states.
        response: `L`, `(frequencies or 1, nodes, k, k)`; `None` is 0.
        implicit: whether rows refer to themselves or to later ones.
        blocks: all rows from the first on, where they are solved for in blocks; of an implicit plan one.
    """

    size: int
    bands: tuple[Band, ...]
    linear: tuple[Band, ...]
    response: Tensor | None
    implicit: bool
    blocks: tuple[_Block, ...] = ()

    def at(self, frequencies: Tensor | None) -> Bands:
        """Return the matrices of some frequencies (by default of all), in float64 on the CPU."""

        def some(values: Tensor) -> Tensor:
            chosen = values if frequencies is None or len(values) == 1 else values[frequencies.to(values.device)]
            return chosen.to("cpu", torch.float64)

        return self._mapped(some)

    def to(self, like: Tensor) -> Bands:
        """All in the dtype and on the device of a tensor."""
        return self._mapped(lambda values: values.to(like))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Bands:
        return replace(
            self,
            bands=tuple(replace(band, values=function(band.values)) for band in self.bands),
            linear=tuple(replace(band, values=function(band.values)) for band in self.linear),
            response=None if self.response is None else function(self.response),
            blocks=tuple(replace(b, before=function(b.before), inverse=function(b.inverse)) for b in self.blocks),
        )

    def respond(self, moves: Tensor, answers: Tensor) -> Tensor:
        """Add `L delta` to the answers, in their place, as they are expected to move."""
        return answers if self.response is None else add_products(self.response, moves, answers)

    def push(self, states: Tensor, answers: Tensor, into: Tensor, first: int) -> None:
        """Add `A S + B D` in the rows from `first` on."""
        for band in self.bands:
            cut = band.rows(first, self.size)
            if cut.last > cut.first:
                cut.push(states if cut.kind == "state" else answers, into)

    def scatter(self, images: Tensor, nodes: list[int], into: Tensor) -> None:
        """Add `B D`, a column for each answer: that of one of the nodes is `images (frequencies, nodes)`, others 0."""
        place = torch.full((self.size,), -1, device="cpu")
        place[nodes] = torch.arange(len(nodes), device="cpu")
        for band in self.bands:
            if band.kind == "answer" and band.column == 0:
                columns = place[band.first - band.back : band.last - band.back]
                known = (columns >= 0).nonzero()[:, 0]
                columns = columns[known]
                parts = band.values[:, known, :, 0] * images[:, columns, None]
                into.permute(1, 3, 0, 2)[band.first + known, columns] += parts.movedim(1, 0)

    def pull(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Return `A^T y` and `B^T y`."""
        states, answers = torch.zeros_like(cotangents), torch.zeros_like(cotangents)
        for band in self.bands:
            band.pull(cotangents, states if band.kind == "state" else answers)
        return states, answers

    def solve(self, wanted: Tensor, first: int = 1) -> Tensor:
        """Put `x` in the place of `wanted`, `(I - A - B L) x = wanted` in the rows from `first` on, and 0 before."""
        moves = wanted
        moves[:, :first] = 0
        if self.blocks:
            for column in range(0, moves.shape[3], _COLUMNS):
                self._solve_by_blocks(moves[..., column : column + _COLUMNS], first)
            return moves
        rows, columns = _views(moves[:, first:])
        for n, row in enumerate(rows, first):
            for node, column, values in self._rows[n]:
                if node >= first:
                    row.addcmul_(values, columns[column][node - first])
        return moves

    def solve_transposed(self, gradient: Tensor) -> Tensor:
        """Return `y` with `(I - A - B L)^T y = gradient`, the first node's row too."""
        solved = gradient.clone()
        if self.blocks:
            for block in reversed(self.blocks):
                mine = slice(block.first, block.last)
                values = block.inverse.mT @ _flat(solved[:, mine])
                solved[:, mine] = values.view_as(solved[:, mine])
                if block.low < block.first:
                    seen = slice(block.low, block.first)
                    solved[:, seen] += (block.before.mT @ values).view_as(solved[:, seen])
            return solved
        _, columns = _views(solved)
        for n in reversed(range(self.size)):
            for node, column, values in self._rows[n]:
                for row, own in enumerate(columns):
                    columns[column][node].addcmul_(values[:, row : row + 1], own[n])
        return solved

    # -- node after node --------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[list[tuple[int, int, Tensor]]]:
        """What each row takes in: node, column of the block and values `(frequencies or 1, k, 1)`."""
        rows: list[list[tuple[int, int, Tensor]]] = [[] for _ in range(self.size)]
        for band in self.linear:
            some = (band.values != 0).any(3).any(2).any(0).tolist()
            for n, used in enumerate(some, band.first):
                if used:
                    rows[n].append((n - band.back, band.column, band.values[:, n - band.first]))
        return rows

    # -- block after block ------------------------------------------------------------------------------------------

    def _solve_by_blocks(self, moves: Tensor, first: int) -> None:
        k = moves.shape[2]
        for block in self.blocks:
            skip = 0 if self.implicit else max(0, first - block.first)
            if block.first + skip >= block.last:
                continue
            mine, own = slice(block.first + skip, block.last), slice(skip * k, None)
            asked = _flat(moves[:, mine])
            if block.low < block.first:
                asked = asked + block.before[:, own] @ _flat(moves[:, block.low : block.first])
            moves[:, mine] = (block.inverse[:, own, own] @ asked).view_as(moves[:, mine])
        held = (first - 1) * k
        if self.implicit and held > 0:  # forces on the rows before `first` that keep them where they are
            inverse = self.blocks[0].inverse
            force = torch.linalg.solve(inverse[:, :held, :held], _flat(moves[:, 1:first]))
            moves[:, 1:] -= (inverse[:, :, :held] @ force).view_as(moves[:, 1:])
            moves[:, :first] = 0


def _blocks(bands: Bands) -> tuple[_Block, ...]:
    """Return blocks of rows with their inverses, where that is the way; `RuntimeError` if the matrix is singular."""
    if not bands.linear or not (bands.implicit or all(len(band.values) == 1 for band in bands.linear)):
        return ()
    size = bands.size if bands.implicit else _BLOCK
    return tuple(_block(bands, first, min(first + size, bands.size)) for first in range(1, bands.size, size))


def _block(whole: Bands, first: int, last: int) -> _Block:
    bands = [cut for cut in (band.rows(first, last) for band in whole.linear) if cut.last > cut.first]
    low = min([first, *(band.first - band.back for band in bands)])
    f, k = max(len(band.values) for band in whole.linear), whole.linear[0].values.shape[2]
    linear = torch.zeros(f, last - first, last - low, k, k, dtype=torch.float64, device="cpu")
    for band in bands:
        rows = torch.arange(band.first, band.last, device="cpu")
        linear[:, rows - first, rows - band.back - low, :, band.column] = band.values[..., 0]
    flat = linear.transpose(2, 3).reshape(f, (last - first) * k, -1)
    within = (first - low) * k
    one = torch.eye((last - first) * k, dtype=torch.float64, device="cpu")
    matrix = one - flat[:, :, within:]
    if whole.implicit:
        inverse = torch.linalg.inv(matrix)
    else:  # ones on the diagonal, as no state is made of itself
        inverse = torch.linalg.solve_triangular(matrix, one, upper=False, unitriangular=True)
    return _Block(first, last, low, flat[:, :, :within], inverse)


def bands_of(plan: Plan, basis: Basis, response: Operator | None, asked: list[int], like: Tensor) -> Bands:
    """Read `A` and `B` off a plan, with the response of the nodes that ask, in float64; return them as a tensor is.

    Raises:
        PushforwardError: an implicit plan's equations have no solution with this response.
    """
    diagonals: dict[int, dict[Literal["state", "answer"], dict[int, Operator]]] = {}
    for n, node in enumerate(plan.nodes):
        for register, operator in node.terms.items():
            if register.kind == "state" or register.kind == "answer":
                diagonals.setdefault(n - register.node, {}).setdefault(register.kind, {})[n] = operator
    expected = None
    if response is not None:
        expected = stacked({n: response[i] for i, n in enumerate(asked)}, 0, len(plan.nodes), basis)
    bands: list[Band] = []
    linear: list[Band] = []
    k = plan.process.blocks
    for back, kinds in diagonals.items():
        first, last = min(map(min, kinds.values())), max(map(max, kinds.values())) + 1
        parts = {kind: (min(some), stacked(some, min(some), max(some) + 1, basis)) for kind, some in kinds.items()}
        bands += [one for kind, (low, values) in parts.items()
                  for one in _columns(Band(kind, back, low, 0, values.to(like)))]  # fmt: skip
        answering = expected if "answer" in kinds else None
        if answering is None:
            parts.pop("answer", None)
        if list(parts) == ["state"]:
            low, values = parts["state"]
            linear += _columns(Band("state", back, low, 0, values))
        elif parts:
            frequencies = max(1 if answering is None else len(answering), *(len(x) for _, x in parts.values()))
            whole = _room(frequencies, last - first, k)
            for kind, (low, values) in parts.items():
                rows = whole[:, low - first : low - first + values.shape[1]]
                if kind == "state":
                    rows += values
                elif answering is not None:
                    add_products(values, answering[:, low - back : low - back + values.shape[1]], rows)
            linear += _columns(Band("state", back, first, 0, whole))
    found = Bands(len(plan.nodes), tuple(bands), tuple(linear), expected, plan.implicit)
    try:
        return replace(found, blocks=_blocks(found)).to(like)
    except RuntimeError:
        raise PushforwardError(
            f"The plan of {plan.solver!r} cannot be solved for all states at once with this response."
        ) from None


def _columns(band: Band) -> list[Band]:
    """Return the columns of a diagonal's blocks that are not all 0, each a band."""
    each = (replace(band, column=n, values=band.values[..., n : n + 1]) for n in range(band.values.shape[3]))
    return [column for column in each if bool(column.values[:, :1].any()) or bool(column.values.any())]


def _views(stack: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return views of a stack's nodes, whole and by the columns of a block; gradients pass changes in their place."""
    rows, width = [stack[:, n] for n in range(stack.shape[1])], stack.shape[2]
    return rows, [rows] if width == 1 else [[own[:, row : row + 1] for own in rows] for row in range(width)]


def stacked(operators: Mapping[int, Operator], first: int, last: int, basis: Basis) -> Tensor:
    """Return operators at some of the places `first … last - 1`, `(frequencies or 1, places, k, k)`, 0 elsewhere."""
    packed = {n: _packed(operator.lift(basis)) for n, operator in operators.items()}
    nothing = torch.zeros_like(next(iter(packed.values()))[..., :1])
    rows = torch.broadcast_tensors(*(packed.get(n, nothing) for n in range(first, last)))
    return torch.stack(rows).permute(3, 0, 1, 2)


def _room(frequencies: int, size: int, k: int) -> Tensor:
    """Return zeros, `(frequencies, size, k, k)` in float64."""
    return torch.zeros(size, k, k, frequencies, dtype=torch.float64, device="cpu").permute(3, 0, 1, 2)


def _packed(operator: Operator) -> Tensor:
    """Return coefficients of one operator as `(k, k, frequencies or 1)`."""
    return operator.coefficients.reshape(-1, *operator.coefficients.shape[-2:]).permute(1, 2, 0)


def _flat(v: Tensor) -> Tensor:
    return v.reshape(v.shape[0], v.shape[1] * v.shape[2], v.shape[3])
