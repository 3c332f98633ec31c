r"""All states of a plan at once: the plan as one linear system around the network's answers.

Stack the states of all nodes. A plan says `S = A S + B D + c` (c: noises and the reference's mean), with the answers
`D_k = f_k(S_k)`. Around the present states and answers, let each answer move as a *response* `L_k` predicts,

    f_k(S_k + delta_k) ~ D_k + L_k delta_k,

and solve for all the moves together:

    (I - A - B L) delta = A S + B D + c - S.

With the response of a Gaussian (`Gaussian.response`) the matrix is diagonal in the basis, block by block, and known
before any network call: it is inverted once, in float64. Repeating this is the preconditioned fixed point; with
`L = 0` it is Picard's iteration in the denoised state, with `L = Psi^-1` in the noise prediction. For an explicit plan
the matrix is lower triangular, for collocation it is not, and nothing here depends on which.

The same solve serves all executors: *forwards*, with the first state fixed; *backwards*, with the last state fixed and
the first one free; and transposed, for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.errors import PushforwardError
from pushforward.linear import IDENTITY, POINT, Gaussian, Operator
from pushforward.plan import Plan, Register

_NUMBERS = 2**25  # coefficients of a matrix held at a time
_SPECTRUM = 32  # frequencies that stand for all in a mean over them


@dataclass(frozen=True)
class _Rows:
    """Rows `first … last - 1` of the system, which refer to columns `low … last - 1`."""

    first: int
    last: int
    low: int
    on_state: Tensor  # (frequencies, rows k, columns k)
    on_answer: Tensor
    before: Tensor  # A + B L for the columns before `first`
    inverse: Tensor  # of I - A - B L within the rows


class System:
    """A plan's rows as matrices, for states stacked as `(frequencies, nodes, k, columns)`.

    `frequencies` is 1 in the identity basis; `columns` are the batch's images times what is left of them, so that
    every product here is one batched matrix product.

    Args:
        plan: any.
        response: `L` of the docstring at the nodes that ask, `(nfe,)`; `None` is 0.
        like: a state `(batch, k * channels, *field)`, for shape, dtype and device.
    """

    def __init__(self, plan: Plan, response: Operator | None, like: Tensor):
        self.plan, self._k = plan, plan.process.blocks
        self.basis = plan.basis if response is None or plan.basis != IDENTITY else response.basis
        self.size = len(plan.nodes)
        self.asked = [k for k, node in enumerate(plan.nodes) if node.asks]
        self._frequencies = math.prod(self.basis.shape)
        self._shape = like.shape
        states = 6 * self.size * like.numel() * like.element_size()
        check_memory(states, f"All {self.size:,} states of {len(like):,} images at once", like.device)
        if plan.implicit:
            matrices = 32 * self._frequencies * (self.size * self._k) ** 2
            check_memory(matrices, f"The equations of {self.size:,} states that depend on one another")
        self._rest = like[0].numel() // (self._k * self._frequencies)
        self._scale = _packed(_deviations(plan).lift(self.basis)).diagonal(dim1=-2, dim2=-1).to(like)[..., None]
        self._ahead = plan.implicit
        self.response = None
        self.finite = response is None or response.is_finite()
        if response is not None:
            full = torch.zeros(self._frequencies, self.size, self._k, self._k, dtype=torch.float64)
            full[:, self.asked] = _packed(response.lift(self.basis))
            self.response = full
        self._blocks = [self._rows(first, last, like) for first, last in self._ranges()]
        self._noise = self._stacked("noise", like)
        self._mean = self._stacked("mean", like)
        self._from_start = self._propagated()
        self._last = self._from_start[:, -1]  # singular where the plan ends with a denoised state
        self._from_start = self._from_start.to(like)
        if self.response is not None:
            self.response = self.response.to(like)

    # -- layout ---------------------------------------------------------------------------------------------------

    def pack(self, u: Tensor) -> Tensor:
        """Pixels `(rows, batch, k * channels, *field)` to `(frequencies, rows, k, batch * rest)`."""
        rows, batch = u.shape[:2]
        v = self.basis.forward(u).reshape(rows, batch, self._k, self._rest, self._frequencies)
        if self._frequencies > 1:
            return v.permute(4, 0, 2, 1, 3).reshape(self._frequencies, rows, self._k, batch * self._rest)
        return v.transpose(1, 2).reshape(1, rows, self._k, batch * self._rest)

    def unpack(self, v: Tensor) -> Tensor:
        """The other way: `(rows, batch, k * channels, *field)`."""
        rows, batch = v.shape[1], v.shape[3] // self._rest
        v = v.reshape(self._frequencies, rows, self._k, batch, self._rest)
        v = v.permute(1, 3, 2, 4, 0).reshape(rows, batch, *self._shape[1:])
        return self.basis.inverse(v)

    def pack_rows(self, u: Tensor) -> Tensor:
        """Single states in pixels `(rows, k * channels, *field)` to `(rows, frequencies, k, rest)`."""
        return self.basis.forward(u).reshape(len(u), self._k, self._rest, self._frequencies).permute(0, 3, 1, 2)

    def unpack_rows(self, v: Tensor) -> Tensor:
        """The other way."""
        return self.basis.inverse(v.permute(0, 2, 3, 1).reshape(len(v), *self._shape[1:]))

    def by_image(self, v: Tensor) -> Tensor:
        """A view of a stack as `(frequencies, nodes, k, batch, rest)`."""
        return v.view(*v.shape[:3], -1, self._rest)

    # -- the system -----------------------------------------------------------------------------------------------

    def constant(self, noise: Callable[[int], Tensor] | None, batch: int, like: Tensor) -> Tensor:
        """`c`: the noises, asked in order, and the reference's mean."""
        plan = self.plan
        total = like.new_zeros(self._frequencies, self.size, self._k, batch * self._rest)
        if plan.noises and noise is not None:
            drawn = self.pack(torch.stack([noise(k).to(like) for k in plan.noises]))
            nodes = list(plan.noises)
            total[:, nodes] = self._noise[:, nodes] @ drawn
        mean = plan.mean_state(like.new_zeros(batch, *self._shape[1:]))
        if mean is not None:
            total += self._mean @ self.pack(mean[None])
        return total

    def residual(self, states: Tensor, answers: Tensor, constant: Tensor, first: int = 1) -> Tensor:
        """`A S + B D + c - S`, zero in the rows before `first`."""
        total = constant - states
        total[:, :first] = 0
        for rows in self._blocks:
            skip = max(0, first - rows.first)
            if rows.first + skip >= rows.last:
                continue
            mine, seen = slice(rows.first + skip, rows.last), slice(rows.low, rows.last)
            own = slice(skip * self._k, None)
            moved = rows.on_state[:, own] @ self._flat(states[:, seen])
            moved += rows.on_answer[:, own] @ self._flat(answers[:, seen])
            total[:, mine] += moved.view_as(total[:, mine])
        return total

    def correct(self, residual: Tensor, first: int = 1) -> Tensor:
        """The moves that the linear system asks for; the rows before `first` stay."""
        moves = torch.zeros_like(residual)
        for rows in self._blocks:
            skip = 0 if self._ahead else max(0, first - rows.first)
            if rows.first + skip >= rows.last:
                continue
            mine, own = slice(rows.first + skip, rows.last), slice(skip * self._k, None)
            wanted = self._flat(residual[:, mine])
            if rows.low < rows.first:
                wanted = wanted + rows.before[:, own] @ self._flat(moves[:, rows.low : rows.first])
            moves[:, mine] = (rows.inverse[:, own, own] @ wanted).view_as(moves[:, mine])
        held = (first - 1) * self._k
        if self._ahead and held > 0:  # forces on the rows before `first` that keep them where they are
            inverse = self._blocks[0].inverse
            force = torch.linalg.solve(inverse[:, :held, :held], self._flat(moves[:, 1:first]))
            moves[:, 1:] -= (inverse[:, :, :held] @ force).view_as(moves[:, 1:])
            moves[:, :first] = 0
        return moves

    def hold_end(self, moves: Tensor) -> Tensor:
        """Moves with the last state held and the first one free: from those with the first state held."""
        return self.from_end(-moves[:, -1]) + moves

    def from_end(self, last: Tensor) -> Tensor:
        """How all states move with the last one, `(frequencies, k, columns)`."""
        moves: Tensor = self._from_start @ (torch.linalg.inv(self._last).to(last) @ last)[:, None]
        return moves

    def transposed(self, gradient: Tensor) -> Tensor:
        """The transpose of `correct`'s matrix applied: `y` with `(I - A - B L)^T y = gradient`, the start's row too."""
        solved = gradient.clone()
        for rows in reversed(self._blocks):
            mine = slice(rows.first, rows.last)
            values = rows.inverse.mT @ self._flat(solved[:, mine])
            solved[:, mine] = values.view_as(solved[:, mine])
            if rows.low < rows.first:
                seen = slice(rows.low, rows.first)
                solved[:, seen] += (rows.before.mT @ values).view_as(solved[:, seen])
        return solved

    def pulled(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """`A^T y` and `B^T y`: what rows' cotangents say of states and of answers."""
        states, answers = torch.zeros_like(cotangent), torch.zeros_like(cotangent)
        for rows in self._blocks:
            seen = slice(rows.low, rows.last)
            mine = self._flat(cotangent[:, rows.first : rows.last])
            states[:, seen] += (rows.on_state.mT @ mine).view_as(states[:, seen])
            answers[:, seen] += (rows.on_answer.mT @ mine).view_as(answers[:, seen])
        return states, answers

    def noise_cotangent(self, cotangent: Tensor) -> Tensor:
        """What rows' cotangents say of the noises, stacked as `plan.noises`."""
        nodes = list(self.plan.noises)
        return self._noise[:, nodes].mT @ cotangent[:, nodes]

    def respond(self, moves: Tensor) -> Tensor:
        """`L delta`: how the answers are expected to move."""
        return torch.zeros_like(moves) if self.response is None else self.response @ moves

    def linear_start(self, start: Tensor, constant: Tensor, reference: Gaussian | None = None) -> tuple[Tensor, Tensor]:
        """States and answers of the reference itself: where all would be if the network were its posterior mean.

        Args:
            start: first state, `(frequencies, 1, k, columns)`.
            constant: as in `residual`.
            reference: by default of mean zero; its mean may be one for each image.
        """
        states, answers = torch.zeros_like(constant), torch.zeros_like(constant)
        process, batch = self.plan.process, constant.shape[3] // self._rest
        clean = (POINT if reference is None else reference).mean_state(
            process, constant.new_zeros(batch, *self._shape[1:])
        )
        if clean is not None:
            psi = process.signal(self.plan.node_times)
            answers = self.pack(clean.expand(self.size, *clean.shape))
            states = self.pack(torch.stack([psi[k](clean) for k in range(self.size)]))
        moves = self.moves_to(start, states, answers, constant)
        return states + moves, answers + self.respond(moves)

    def moves_to(self, start: Tensor, states: Tensor, answers: Tensor, constant: Tensor) -> Tensor:
        """How all states move, answers following as expected, for the first one to be `start` and the rest to fit."""
        first = torch.zeros_like(states)
        first[:, :1] = start - states[:, :1]
        gap = self.residual(states + first, answers + self.respond(first), constant)
        return first + self.correct(gap)

    def sizes(self, moves: Tensor) -> Tensor:
        """Root mean square of each node's moves in units of its marginal's deviation, `(nodes, batch)`.

        Of the last node only the image counts: a velocity in the end is no one's.
        """
        squares = self.by_image(moves / self._scale).square()
        last = squares[:, -1:, :1].mean((0, 2, 4)) / self._k
        return torch.cat([squares[:, :-1].mean((0, 2, 4)), last]).sqrt()

    def whitened(self, moves: Tensor) -> Tensor:
        """Moves in units of the marginals' deviations."""
        return moves / self._scale

    def relative(self, states: Tensor) -> Tensor:
        """The relative error of each image that an error of size 1 in its last state can be, `(batch,)`.

        Images larger than the marginal's deviation count as that large.
        """
        image = self.plan.process.image(self.unpack(states[:, -1:])[0]).flatten(1)
        deviation = float(self.deviations[-1])
        size = image.square().mean(1).sqrt().nan_to_num(deviation)
        relative: Tensor = self._k**0.5 * deviation / size.clamp(torch.finfo(size.dtype).tiny ** 0.5, deviation)
        return relative

    @property
    def deviations(self) -> Tensor:
        """Of the images in each node's marginal, where data have 1, `(nodes,)`, float64, on the CPU."""
        return self._scale[..., 0, 0].square().mean(0).sqrt().cpu().double()

    @cached_property
    def influence(self) -> Tensor:
        """Sizes of all states' moves for an answer that is off by the size 1, `(nodes, nfe)`, float64, on the CPU.

        In root mean square over the frequencies, of which some stand for all.
        """
        k, n = self._k, self.size
        some = (
            torch.linspace(
                0, self._frequencies - 1, min(self._frequencies, _SPECTRUM, max(1, _NUMBERS // (k * n) ** 2))
            )
            .round()
            .long()
        )
        total = torch.zeros(len(some), n * k, n * k, dtype=torch.float64)
        for rows in self._blocks:
            mine, seen = slice(rows.first * k, rows.last * k), slice(rows.low * k, rows.last * k)
            before, inverse, direct = (x.cpu()[some].double() for x in (rows.before, rows.inverse, rows.on_answer))
            wanted = torch.zeros(len(some), (rows.last - rows.first) * k, n * k, dtype=torch.float64)
            wanted[:, :, seen] = direct
            wanted += before @ total[:, rows.low * k : rows.first * k]
            total[:, mine] = inverse @ wanted
        scale = self._scale.cpu().double()[some if len(self._scale) > 1 else slice(None)].flatten(1)
        total = (total / scale[:, :, None] * scale[:, None, :]).view(-1, n, k, n, k)[:, :, :, self.asked]
        total = total[..., 0].square()  # answers are images, without velocity; so is what is wanted of the last state
        total[:, -1, 1:] = 0
        return total.sum(2).mean(0).sqrt()

    # -- construction -----------------------------------------------------------------------------------------------

    def _flat(self, v: Tensor) -> Tensor:
        return v.reshape(v.shape[0], v.shape[1] * v.shape[2], v.shape[3])

    def _ranges(self) -> list[tuple[int, int]]:
        if self._ahead:
            return [(1, self.size)]
        size = max(8, _NUMBERS // (self._frequencies * self._k**2 * self.size))
        return [(a, min(a + size, self.size)) for a in range(1, self.size, size)]

    def _rows(self, first: int, last: int, like: Tensor) -> _Rows:
        nodes = self.plan.nodes
        terms = [(n, r, o) for n in range(first, last) for r, o in nodes[n].terms.items()
                 if r.kind in ("state", "answer")]  # fmt: skip
        low = min([first, *(r.node for _, r, _ in terms)])
        k, f = self._k, self._frequencies
        arrays = {kind: torch.zeros(f, last - first, last - low, k, k, dtype=torch.float64)
                  for kind in ("state", "answer")}  # fmt: skip
        for kind, array in arrays.items():
            chosen = [(n, r, o) for n, r, o in terms if r.kind == kind]
            if chosen:
                at = [n - first for n, _, _ in chosen], [r.node - low for _, r, _ in chosen]
                array[:, at[0], at[1]] = torch.stack([self._full(o) for _, _, o in chosen], 1)
        on_state, on_answer = arrays["state"], arrays["answer"]
        linear = on_state if self.response is None else on_state + on_answer @ self.response[:, None, low:last]
        flat = [a.transpose(2, 3).reshape(f, (last - first) * k, -1) for a in (on_state, on_answer, linear)]
        within = (first - low) * k
        matrix = torch.eye((last - first) * k, dtype=torch.float64) - flat[2][:, :, within:]
        if not self._ahead:  # ones on the diagonal, as no state is made of itself
            one = torch.eye(matrix.shape[-1], dtype=torch.float64)
            inverse = torch.linalg.solve_triangular(matrix, one, upper=False, unitriangular=True)
        else:
            try:
                inverse = torch.linalg.inv(matrix)
            except RuntimeError:
                raise PushforwardError(
                    f"The plan of {self.plan.solver!r} cannot be solved for all states at once with this response."
                ) from None
        parts = (flat[0], flat[1], flat[2][:, :, :within], inverse)
        return _Rows(first, last, low, *(part.to(like) for part in parts))

    def _full(self, operator: Operator) -> Tensor:
        """One coefficient at every frequency, `(frequencies, k, k)`."""
        return _packed(operator.lift(self.basis)).expand(self._frequencies, -1, -1)

    def _stacked(self, kind: str, like: Tensor) -> Tensor:
        total = torch.zeros(self._frequencies, self.size, self._k, self._k, dtype=torch.float64)
        for n, node in enumerate(self.plan.nodes):
            operator = node.terms.get(Register(kind, n if kind == "noise" else 0))  # type: ignore[arg-type]
            if operator is not None:
                total[:, n] = _packed(operator.lift(self.basis))
        return total.to(like)

    def _propagated(self) -> Tensor:
        """How the linear system moves every state with the first, `(frequencies, nodes, k, k)`, float64."""
        k, f = self._k, self._frequencies
        total = torch.zeros(f, self.size, k, k, dtype=torch.float64)
        total[:, 0] = torch.eye(k, dtype=torch.float64)
        for rows in self._blocks:
            if rows.low < rows.first:
                wanted = rows.before.to(total) @ total[:, rows.low : rows.first].reshape(f, -1, k)
                total[:, rows.first : rows.last] = (rows.inverse.to(total) @ wanted).view(f, -1, k, k)
        return total


def _packed(operator: Operator) -> Tensor:
    """Coefficients `(*batch, *frequencies, k, k)` as `(frequencies, *batch, k, k)`."""
    c = operator.coefficients
    batch = operator.batch_shape
    flat = c.reshape(*batch, -1, *c.shape[-2:])
    return flat.movedim(len(batch), 0)


def _deviations(plan: Plan) -> Operator:
    """`diag` of each node's marginal deviation for data of unit variance, averaged over nothing: one a field."""
    times = plan.node_times
    psi = plan.process.signal(times).lift(plan.basis)
    total = (plan.process.covariance(times).lift(plan.basis) + psi @ psi.T).coefficients
    diagonal = total.diagonal(dim1=-2, dim2=-1).sqrt()
    return Operator(torch.diag_embed(diagonal), plan.basis)
