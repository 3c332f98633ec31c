r"""All states of a plan at once: the plan as one linear system around the network's answers.

Stack the states of all nodes. A plan says `S = A S + B D + c` (c: noises and the reference's mean), with the answers
`D_k = f_k(S_k)`. Around the present states and answers, let each answer move as a *response* `L_k` predicts,

    f_k(S_k + delta_k) ~ D_k + L_k delta_k,

and solve for all the moves together:

    (I - A - B L) delta = A S + B D + c - S.

With the response of a Gaussian (`Gaussian.response`) the matrix is diagonal in the basis, block by block, and known
before any network call. Repeating this is the preconditioned fixed point; with `L = 0` it is Picard's iteration in the
denoised state, with `L = Psi^-1` in the noise prediction.

Rows refer to few nodes, most to the last few, so `A` and `B` are kept by their diagonals (`execute.bands`), and time
and memory grow as states times the solver's order.

The same solve serves all executors: *forwards*, with the first state fixed; *backwards*, with the last state fixed and
the first one free; and transposed, for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.execute.bands import bands_of, stacked
from pushforward.linear import IDENTITY, POINT, Gaussian, Operator, products
from pushforward.plan import Plan, Register

_SPECTRUM = 32  # frequencies that stand for all in a mean over them
_NUMBERS = 2**22  # coefficients, or numbers on a GPU, worked on at a time
_CACHED = 2**18  # numbers worked on at a time, which stay near the processor


class System:
    """A plan's rows as matrices, for states stacked as `(frequencies, nodes, k, columns)`.

    `frequencies` is 1 in the identity basis; `columns` are the batch's images times what is left of them. In memory
    nodes come first and frequencies last (`zeros` makes such a stack).

    Args:
        plan: any.
        response: `L` of the docstring at the nodes that ask, `(nfe,)`; `None` is 0.
        like: a state `(batch, k * channels, *field)`, for shape, dtype and device.
    """

    def __init__(self, plan: Plan, response: Operator | None, like: Tensor):
        self.plan, self._k = plan, plan.process.blocks
        self.basis = plan.basis if response is None or plan.basis != IDENTITY else response.basis
        self.size = len(plan.nodes)
        self.asked = list(plan.asked)
        self._frequencies = math.prod(self.basis.shape)
        self._shape = like.shape
        states = 9 * self.size * like.numel() * like.element_size()
        check_memory(states, f"All {self.size:,} states of {len(like):,} images at once", like.device)
        if plan.implicit:
            matrices = 32 * self._frequencies * (self.size * self._k) ** 2
            check_memory(matrices, f"The equations of {self.size:,} states that depend on one another")
        self._rest = like[0].numel() // (self._k * self._frequencies)
        self._scale = _deviations(plan).to(like)[..., None]
        self.finite = response is None or response.is_finite()
        self._bands = bands_of(plan, self.basis, response, self.asked, like)
        self._noise, self._mean = self._table("noise", like), self._table("mean", like)

    # -- layout ---------------------------------------------------------------------------------------------------

    def pack(self, u: Tensor) -> Tensor:
        """Pixels `(rows, batch, k * channels, *field)` to `(frequencies, rows, k, batch * rest)`."""
        rows, batch = u.shape[:2]
        v = self.basis.forward(u).reshape(rows, batch, self._k, self._rest, self._frequencies).transpose(1, 2)
        return v.reshape(rows, self._k, batch * self._rest, self._frequencies).permute(3, 0, 1, 2)

    def unpack(self, v: Tensor) -> Tensor:
        """The other way: `(rows, batch, k * channels, *field)`."""
        rows, batch = v.shape[1], v.shape[3] // self._rest
        u = v.permute(1, 2, 3, 0).reshape(rows, self._k, batch, self._rest, self._frequencies).transpose(1, 2)
        u = u.reshape(rows, batch, *self._shape[1:])
        if self.basis == IDENTITY:
            return u
        pixels = torch.empty_like(u)
        for some in self.parts(v):
            pixels[some] = self.basis.inverse(u[some])
        return pixels

    def zeros(self, columns: int, like: Tensor) -> Tensor:
        """Return a stack of zeros."""
        return like.new_zeros(self.size, self._k, columns, self._frequencies).permute(3, 0, 1, 2)

    def parts(self, v: Tensor, stacks: int = 1) -> list[slice]:
        """Return nodes worked on together in some stacks like this one, so that what is made in between stays small."""
        return _pieces(v.shape[1], stacks * v.numel(), v.device)

    def taken(self, v: Tensor, nodes: Tensor, images: Tensor) -> Tensor:
        """Return single states of a stack in pixels, `(rows, k * channels, *field)`; nodes and images are `(rows,)`."""
        lanes, found = self.lanes(v), v.new_empty(len(nodes), *self._shape[1:])
        for some in _pieces(len(found), found.numel(), v.device):
            found[some] = self.basis.inverse(lanes[nodes[some], :, images[some]].view_as(found[some]))
        return found

    def put(self, u: Tensor, into: Tensor, nodes: Tensor, images: Tensor) -> Tensor:
        """The other way; returns the sizes of what this changes, `(rows,)`, as those of `sizes`."""
        lanes, changed = self.lanes(into), u.new_zeros(len(u))
        for some in _pieces(len(u), u.numel(), u.device):
            at, of = nodes[some], images[some]
            new = self.basis.forward(u[some]).view(-1, self._k, self._rest, self._frequencies)
            changed[some] = root_mean_square((new - lanes[at, :, of]).mul_(self.weight[at, :, 0]), 1, 2, 3)
            lanes[at, :, of] = new
        return changed

    def by_image(self, v: Tensor) -> Tensor:
        """Return a view of a stack as `(frequencies, nodes, k, batch, rest)`."""
        return v.view(*v.shape[:3], -1, self._rest)

    def lanes(self, v: Tensor) -> Tensor:
        """Return a view of a stack in the order of memory, `(nodes, k, batch, rest, frequencies)`."""
        lanes: Tensor = v.permute(1, 2, 3, 0).unflatten(2, (-1, self._rest))
        return lanes

    @cached_property
    def weight(self) -> Tensor:
        """One over the marginals' deviations, as `lanes`: `(nodes, k, 1, 1, frequencies or 1)`."""
        return self._scale.reciprocal().permute(1, 2, 3, 0).unsqueeze(2)

    # -- the system -----------------------------------------------------------------------------------------------

    @property
    def response(self) -> Tensor | None:
        """`L`, `(frequencies or 1, nodes, k, k)`; `None` is 0."""
        return self._bands.response

    def constant(self, noise: Callable[[int], Tensor] | None, batch: int, like: Tensor) -> Tensor:
        """Return `c`: the noises, asked in order, and the reference's mean; read alone, for zeros are in one place."""
        plan = self.plan
        mean = plan.mean_state(like.new_zeros(batch, *self._shape[1:]))
        if mean is None and (self._noise is None or noise is None):
            return like.new_zeros(()).expand(self._frequencies, self.size, self._k, batch * self._rest)
        total = self.zeros(batch * self._rest, like)
        if self._noise is not None and noise is not None:
            for k in plan.noises:
                total[:, k] = products(self._noise[:, k], self.pack(noise(k).to(like)[None])[:, 0])
        if mean is not None and self._mean is not None:
            total += products(self._mean, self.pack(mean[None]))
        return total

    def residual(self, states: Tensor, answers: Tensor, constant: Tensor, first: int = 1) -> Tensor:
        """Compute `A S + B D + c - S`, zero in the rows before `first`, summed and rounded as in a sequential run."""
        total = torch.empty_like(states)
        total[:, :first], total[:, first:] = 0.0, constant[:, first:]
        self._bands.push(states, answers, total, first)
        total[:, first:] -= states[:, first:]
        return total

    def correct(self, residual: Tensor, first: int = 1, *, in_place: bool = False) -> Tensor:
        """Return the moves that the linear system asks for, maybe in the residual's place; rows before `first` stay."""
        return self._bands.solve(residual if in_place else residual.clone(), first)

    def hold_end(self, moves: Tensor) -> Tensor:
        """Return moves with the last state held and the first one free: from those with the first state held."""
        return self.from_end(-moves[:, -1]) + moves

    def from_end(self, last: Tensor) -> Tensor:
        """Return how all states move with the last one, `(frequencies, k, columns)`."""
        all_states, end = self._from_start
        return products(all_states, products(end, last)[:, None])

    @cached_property
    def _from_start(self) -> tuple[Tensor, Tensor]:
        """How the linear system moves every state with the first, and the first with the last."""
        whole = self._bands.at(None)
        one = torch.eye(self._k, dtype=torch.float64, device="cpu")
        first = one.new_zeros(self.size, self._k, self._k, self._frequencies).permute(3, 0, 1, 2)
        first[:, 0] = one
        wanted = torch.zeros_like(first)
        whole.push(first, whole.respond(first, torch.zeros_like(first)), wanted, 1)
        moves = first + whole.solve(wanted)
        return moves.to(self._scale), torch.linalg.inv(moves[:, -1]).to(self._scale)

    def transposed(self, gradient: Tensor) -> Tensor:
        """Apply the transpose of `correct`'s matrix: `y` with `(I - A - B L)^T y = gradient`, the start's row too."""
        return self._bands.solve_transposed(gradient)

    def pulled(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return `A^T y` and `B^T y`: what rows' cotangents say of states and of answers."""
        return self._bands.pull(cotangent)

    def noise_cotangent(self, cotangent: Tensor) -> Tensor:
        """Return what rows' cotangents say of the noises, stacked as `plan.noises`."""
        nodes = list(self.plan.noises)
        some = cotangent[:, nodes]
        return some if self._noise is None else products(self._noise[:, nodes].mT, some)

    def respond(self, moves: Tensor, answers: Tensor) -> Tensor:
        """Add `L delta` to the answers, in their place, as they are expected to move."""
        return self._bands.respond(moves, answers)

    def linear_start(self, start: Tensor, constant: Tensor, reference: Gaussian | None = None) -> tuple[Tensor, Tensor]:
        """Return states and answers of the reference itself: where all would be if the network were its posterior mean.

        Args:
            start: first state, `(frequencies, 1, k, columns)`.
            constant: as in `residual`.
            reference: by default of mean zero; its mean may be one for each image.
        """
        states, answers = (self.zeros(constant.shape[3], constant) for _ in range(2))
        process, batch = self.plan.process, constant.shape[3] // self._rest
        clean = (POINT if reference is None else reference).mean_state(
            process, constant.new_zeros(batch, *self._shape[1:])
        )
        if clean is not None:
            psi = process.signal(self.plan.node_times)
            answers = self.pack(clean.expand(self.size, *clean.shape))
            states = self.pack(torch.stack([psi[k](clean) for k in range(self.size)]))
        moves = self.moves_to(start, states, answers, constant)
        return states + moves, self.respond(moves, answers.clone())

    def moves_to(self, start: Tensor, states: Tensor, answers: Tensor, constant: Tensor) -> Tensor:
        """Return all states' moves, answers following as expected, that make the first `start` and the rest fit."""
        first = torch.zeros_like(states)
        first[:, :1] = start - states[:, :1]
        gap = self.residual(states + first, self.respond(first, answers.clone()), constant)
        return first + self.correct(gap, in_place=True)

    def sizes(self, moves: Tensor) -> Tensor:
        """Return the root mean square of each node's moves in units of its marginal's deviation, `(nodes, batch)`.

        Of the last node only the image counts: a velocity in the end is no one's.
        """
        lanes = self.lanes(moves)
        if self.weight.shape[-1] == 1:
            each = root_mean_square(lanes, 3, 4) * self.weight[..., 0, 0]
        else:
            each = torch.cat([root_mean_square(lanes[x] * self.weight[x], 3, 4) for x in self.parts(moves)])
        squares = each.square().mean(1)
        squares[-1:] = each[-1:, 0].square() / self._k
        return squares.sqrt()

    def whitened(self, moves: Tensor) -> Tensor:
        """Return moves in units of the marginals' deviations."""
        return moves / self._scale

    def relative(self, states: Tensor) -> Tensor:
        """Return the relative error of each image that an error of size 1 in its last state can be, `(batch,)`.

        Images larger than the marginal's deviation count as that large.
        """
        image = self.lanes(states)[-1, 0]  # as large in the basis as in pixels
        deviation = self._deviation
        size = root_mean_square(image, 1, 2).nan_to_num(deviation)
        relative: Tensor = self._k**0.5 * deviation / size.clamp(torch.finfo(size.dtype).tiny ** 0.5, deviation)
        return relative

    @cached_property
    def deviations(self) -> Tensor:
        """Of the images in each node's marginal, where data have 1, `(nodes,)`, float64, on the CPU."""
        return self._scale[..., 0, 0].square().mean(0).sqrt().cpu().double()

    @cached_property
    def _deviation(self) -> float:
        return float(self.deviations[-1])

    @cached_property
    def influence(self) -> Tensor:
        """Sizes of all states' moves for an answer that is off by the size 1, `(nodes, nfe)`, float64, on the CPU.

        In root mean square over the frequencies, of which some stand for all.
        """
        last = self._frequencies - 1
        some = torch.linspace(0, last, min(last + 1, _SPECTRUM), dtype=torch.float64, device="cpu").round().long()
        count = len(self.asked)
        total = torch.zeros(self.size, count, dtype=torch.float64, device="cpu")
        whole = self._bands.at(some)
        scale = self._scale if len(self._scale) == 1 else self._scale[some.to(self._scale.device)]
        scale = scale.cpu().double()
        every = torch.arange(count, device="cpu").split(max(1, _NUMBERS // (self.size * self._k * len(some))))
        room = total.new_empty(self.size, self._k, len(every[0]), len(some)).permute(3, 0, 1, 2)
        for columns in every:
            asked = [self.asked[n] for n in columns.tolist()]
            first = 1 if whole.implicit else asked[0] + 1  # nodes before it know nothing of these answers
            moves = room[..., : len(asked)].zero_()
            # answers are images, without velocity; so is what is wanted of the last state
            whole.scatter(scale[:, asked, 0, 0], asked, moves)
            squares = whole.solve(moves, first)[:, first:].div_(scale[:, first:]).square_()
            squares[:, -1:, 1:] = 0
            total[first:, columns] = squares.sum((0, 2))
        return (total / len(some)).sqrt()

    # -- construction -----------------------------------------------------------------------------------------------

    def _table(self, kind: Literal["noise", "mean"], like: Tensor) -> Tensor | None:
        """Return coefficients of the noises or of the mean, `(frequencies or 1, nodes, k, k)`, if there are any."""
        found = {n: node.terms.get(Register(kind, n if kind == "noise" else 0))
                 for n, node in enumerate(self.plan.nodes)}  # fmt: skip
        operators = {n: operator for n, operator in found.items() if operator is not None}
        return stacked(operators, 0, self.size, self.basis).to(like) if operators else None


def root_mean_square(values: Tensor, *over: int) -> Tensor:
    """Return root mean squares over some axes."""
    norm, count = torch.linalg.vector_norm(values, dim=over), math.prod(values.shape[axis] for axis in over)
    mean: Tensor = norm / math.sqrt(count)
    return mean


def relative_errors(images: Tensor, exact: Tensor) -> Tensor:
    """Return how far each image is from what it should be, in parts of its size, `(batch,)`."""
    size = exact.flatten(1).norm(dim=1).clamp_min(torch.finfo(exact.dtype).tiny)
    relative: Tensor = (images - exact).flatten(1).norm(dim=1) / size
    return relative


def _pieces(count: int, numbers: int, device: torch.device) -> list[slice]:
    """Return slices of `count` things, `numbers` in all, that are worked on one after another."""
    step = max(1, (_CACHED if device.type == "cpu" else _NUMBERS) * count // max(1, numbers))
    return [slice(a, min(a + step, count)) for a in range(0, count, step)]


def _deviations(plan: Plan) -> Tensor:
    """Return each node's marginal deviation for data of unit variance, one a field, `(frequencies or 1, nodes, k)`."""
    times = plan.node_times
    psi, noise = plan.process.signal(times).coefficients, plan.process.covariance(times).coefficients
    deviations = (noise.diagonal(dim1=-2, dim2=-1) + psi.square().sum(-1)).sqrt().movedim(-1, 1)
    return deviations.reshape(*deviations.shape[:2], -1).permute(2, 0, 1)
