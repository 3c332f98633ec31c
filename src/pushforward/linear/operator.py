"""One class of structured linear maps for every coefficient of every diffusion.

A linear diffusion acts on a state `u` of shape `(batch, k * channels, *field)`: `k = 1` for an image, `k = 2` for an
image and its velocity, stacked along the channels. All its coefficients are maps

    u  ->  basis^-1 [ coefficients[frequency] (k x k)  .  basis u ]

so they are stored as the array `(*batch, *basis.shape, k, k)`: a scalar (`k = 1`, identity basis: VP, VE, flow), one
number per DCT frequency (blurring), a 2 x 2 block (Langevin), or a 2 x 2 block per frequency (both). Sums, products,
inverses and transposes stay in the class, because one basis diagonalises them all. In memory an entry of all blocks is
one piece, along which they are worked out.

For instance, a block that moves the image by half its velocity, and takes it back:

    >>> import torch
    >>> one, half = torch.tensor(1.0), torch.tensor(0.5)
    >>> ahead = Operator.block([[one, half], [0 * one, one]])
    >>> u = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)  # a pixel and its velocity
    >>> ahead(u).flatten().tolist(), (ahead.inverse() @ ahead)(u).flatten().tolist()
    ([2.0, 2.0], [1.0, 2.0])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear.basis import IDENTITY, Basis


@dataclass(frozen=True, eq=False)
class Operator:
    """A batch of structured linear maps.

    Args:
        coefficients: `(*batch, *basis.shape, k, k)`, float64 on the CPU; batch axes usually run over time. A `part` has
            fewer rows or columns.
        basis: the basis in which the maps are (block-)diagonal.
    """

    coefficients: Tensor
    basis: Basis = IDENTITY

    # -- construction ---------------------------------------------------------------------------------------------

    @staticmethod
    def scalar(values: Tensor | float, blocks: int = 1, basis: Basis = IDENTITY) -> Operator:
        """Make `values * I`, with `values` of shape `(*batch, *basis.shape)`."""
        values = _numbers(values)
        one = torch.eye(blocks, dtype=torch.float64, device="cpu").view(blocks, blocks, *(1,) * values.ndim)
        return Operator((one * values).movedim((0, 1), (-2, -1)), basis)

    @staticmethod
    def block(rows: list[list[Tensor]], basis: Basis = IDENTITY) -> Operator:
        """Make blocks entry by entry, each entry of shape `(*batch, *basis.shape)`."""
        flat = torch.broadcast_tensors(*(_numbers(x) for row in rows for x in row))
        return Operator(torch.stack(flat).unflatten(0, (len(rows), len(rows[0]))).movedim((0, 1), (-2, -1)), basis)

    # -- structure ------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """The number `k` of fields (1: image, 2: image and velocity) the map mixes."""
        return self.coefficients.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of maps."""
        return self.coefficients.shape[: self.coefficients.ndim - 2 - len(self.basis.shape)]

    def __getitem__(self, index: int | slice) -> Operator:
        """Select along the first batch axis."""
        return Operator(self.coefficients[index], self.basis)

    def at(self, index: Tensor) -> Operator:
        """Take members of the first batch axis, in the shape of their numbers."""
        taken = self.coefficients.movedim((-2, -1), (0, 1))[:, :, index]
        return Operator(taken.movedim((0, 1), (-2, -1)), self.basis)

    def part(self, rows: slice = slice(None), columns: slice = slice(None)) -> Operator:
        """Return some rows and columns of every block."""
        return Operator(self.coefficients[..., rows, columns], self.basis)

    def entry(self, row: int, column: int) -> Tensor:
        """Return one entry of every block, `(*batch, *basis.shape)`."""
        return self.coefficients[..., row, column]

    def lift(self, basis: Basis) -> Operator:
        """Write the same map in another basis (only the identity's maps are diagonal in all)."""
        if basis == self.basis:
            return self
        if self.basis != IDENTITY:
            raise PushforwardError(
                f"An operator over frequencies {self.basis.shape} cannot be combined with one over "
                f"{basis.shape or 'pixels'}; make both for the same image size."
            )
        where = len(self.batch_shape)
        return Operator(self.coefficients[(slice(None),) * where + (None,) * len(basis.shape)], basis)

    # -- algebra --------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Operator) -> Operator:
        """Compose two maps: `(a @ b)(u) = a(b(u))`."""
        if not isinstance(other, Operator):
            return NotImplemented
        a, b = _same_basis(self, other)
        left, right = a.coefficients, b.coefficients
        if left.ndim == right.ndim == 2:
            return Operator(torch.mm(left, right), a.basis)
        shape = torch.broadcast_tensors(left[..., 0, 0], right[..., 0, 0])[0].shape
        total = left.new_empty(left.shape[-2], right.shape[-1], *shape)  # an entry is one piece of memory
        total = total.movedim((0, 1), (-2, -1))
        return Operator(add_products(left, right, torch.mul(left[..., :1], right[..., :1, :], out=total), 1), a.basis)

    def __add__(self, other: Operator) -> Operator:
        a, b = _same_basis(self, other)
        return Operator(a.coefficients + b.coefficients, a.basis)

    def __sub__(self, other: Operator) -> Operator:
        return self + (-other)

    def __neg__(self) -> Operator:
        return Operator(-self.coefficients, self.basis)

    def __mul__(self, factor: float | Tensor) -> Operator:
        """Multiply by a number, or by one number per member of the batch, or per member and frequency."""
        if isinstance(factor, Tensor) and factor.ndim:
            factor = factor[(...,) + (None,) * (self.coefficients.ndim - factor.ndim)]
        return Operator(self.coefficients * factor, self.basis)

    __rmul__ = __mul__

    @property
    def T(self) -> Operator:
        """The transpose."""
        return Operator(self.coefficients.mT, self.basis)

    def inverse(self) -> Operator:
        """Return the inverse; it is not finite where a block is singular."""
        c = self.coefficients
        if self.blocks == 1:
            return Operator(1 / c, self.basis)
        (a, b), (d, e) = c[..., 0, :].unbind(-1), c[..., 1, :].unbind(-1)
        determinant = a * e - b * d
        return Operator.block([[e / determinant, -b / determinant], [-d / determinant, a / determinant]], self.basis)

    def cholesky(self) -> Operator:
        """Return the lower-triangular `L` with `L L^T` equal to this (symmetric, positive semi-definite) operator."""
        c = self.coefficients
        if self.blocks == 1:
            return Operator(c.clamp_min(0).sqrt(), self.basis)
        first = c[..., 0, 0].clamp_min(0).sqrt()
        below = torch.where(first > 0, c[..., 1, 0] / first.clamp_min(1e-300), 0.0)
        last = (c[..., 1, 1] - below.square()).clamp_min(0).sqrt()
        return Operator.block([[first, torch.zeros_like(first)], [below, last]], self.basis)

    def square_root(self) -> Operator:
        """Return the symmetric `S` with `S S` equal to this (symmetric, positive semi-definite) operator."""
        if self.blocks == 1:
            return self.cholesky()
        values, vectors = torch.linalg.eigh(self.coefficients)
        return Operator((vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT, self.basis)

    def is_finite(self) -> bool:
        """Say whether every coefficient is finite."""
        return math.isfinite(self.coefficients.sum()) or bool(self.coefficients.isfinite().all())

    def largest(self) -> float:
        """Return the coefficient that is largest in size, with its sign."""
        flat = self.coefficients.flatten()
        return float(flat[flat.abs().argmax()])

    # -- action ---------------------------------------------------------------------------------------------------

    def apply(self, v: Tensor) -> Tensor:
        """Act on *coordinates* `v (batch, k * channels, *field)`; map i of a batch acts on state i."""
        return apply_coefficients(self.coefficients, v, frequencies=len(self.basis.shape))

    def __call__(self, u: Tensor) -> Tensor:
        """Act on a state `u` of shape `(batch, k * channels, *field)`, given in pixels."""
        return self.basis.inverse(self.apply(self.basis.forward(u)))


def apply_coefficients(coefficients: Tensor, v: Tensor, frequencies: int) -> Tensor:
    """Apply `coefficients (batch or none, *frequencies, k, k)` to coordinates `v (batch, k * channels, *field)`."""
    k, batch = coefficients.shape[-1], coefficients.ndim - 2 - frequencies
    c = coefficients.to(v).movedim((-2, -1), (batch, batch + 1))  # (*batch, k, k, *frequencies)
    field = c.shape[batch + 2 :] or (1,) * (v.ndim - 2)
    if k == 1:
        return c.reshape(*c.shape[:batch], 1, *field) * v
    if not frequencies:
        fields: Tensor = c @ v.unflatten(1, (k, -1)).flatten(2)
        return fields.view_as(v)
    c = c.reshape(*c.shape[: batch + 2], 1, *field)
    moved: Tensor = (c * v.unflatten(1, (k, -1)).unsqueeze(1)).sum(2)
    return moved.flatten(1, 2)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Return products of blocks `a (..., k, k)` with `b (..., k, columns)`, each entry along all the rest at once."""
    return add_products(a, b, a[..., :1] * b[..., :1, :], 1)


def add_products(a: Tensor, b: Tensor, total: Tensor, first: int = 0) -> Tensor:
    """Add products of blocks to a total, in its place, from their columns and rows `first` on."""
    for column in range(first, b.shape[-2]):
        total.addcmul_(a[..., column : column + 1], b[..., column : column + 1, :])
    return total


def _numbers(values: Tensor | float) -> Tensor:
    """Return them as a tensor in float64 where they are, else on the CPU."""
    return torch.as_tensor(values, dtype=torch.float64, device=getattr(values, "device", "cpu"))


def _same_basis(a: Operator, b: Operator) -> tuple[Operator, Operator]:
    if a.blocks != b.coefficients.shape[-2]:
        raise PushforwardError(
            f"An operator on {a.blocks} field(s) cannot be combined with one on {b.blocks}; make both for one process."
        )
    if a.basis is b.basis:
        return a, b
    basis = a.basis if a.basis != IDENTITY else b.basis
    return a.lift(basis), b.lift(basis)
