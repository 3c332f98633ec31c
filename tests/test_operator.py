"""Operators agree with the dense matrices they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushforward.errors import PushforwardError
from pushforward.linear import IDENTITY, Basis, Operator

FIELD = (2, 3)
KINDS = [(1, IDENTITY), (1, Basis(FIELD)), (2, IDENTITY), (2, Basis(FIELD))]
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # float64; the blocks drawn have condition numbers below 1e4


def draw(kind: tuple[int, Basis], seed: int) -> Operator:
    blocks, basis = kind
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn((*basis.shape, blocks, blocks), dtype=torch.float64, generator=generator)
    return Operator(c + 3 * torch.eye(blocks, dtype=torch.float64), basis)


def dense(operator: Operator) -> torch.Tensor:
    """The matrix on states of one channel, by acting on the unit vectors."""
    size = operator.blocks * FIELD[0] * FIELD[1]
    units = torch.eye(size, dtype=torch.float64).view(size, operator.blocks, *FIELD)
    return operator(units).flatten(1).mT


kinds, seeds = st.sampled_from(KINDS), st.integers(0, 10_000)


@given(kinds, kinds, seeds)
@settings(max_examples=40, deadline=None)
def test_algebra_is_that_of_matrices(one, other, seed):
    other = (one[0], other[1])
    a, b = draw(one, seed), draw(other, seed + 1)
    torch.testing.assert_close(dense(a @ b), dense(a) @ dense(b), **ROUNDING)
    torch.testing.assert_close(dense(a + b), dense(a) + dense(b), **ROUNDING)
    torch.testing.assert_close(dense(a - 2.0 * b), dense(a) - 2 * dense(b), **ROUNDING)
    torch.testing.assert_close(dense(a.T), dense(a).mT, **ROUNDING)
    torch.testing.assert_close(dense(a.inverse()) @ dense(a), torch.eye(len(dense(a)), dtype=torch.float64), **ROUNDING)
    torch.testing.assert_close(dense((a @ b) @ a), dense(a @ (b @ a)), **ROUNDING)


@given(kinds, seeds)
@settings(max_examples=20, deadline=None)
def test_roots(kind, seed):
    a = draw(kind, seed)
    square = a @ a.T
    lower, symmetric = square.cholesky(), square.square_root()
    torch.testing.assert_close((lower @ lower.T).coefficients, square.coefficients, **ROUNDING)
    torch.testing.assert_close((symmetric @ symmetric).coefficients, square.coefficients, **ROUNDING)
    torch.testing.assert_close(symmetric.coefficients, symmetric.T.coefficients, **ROUNDING)
    assert kind[0] == 1 or bool((lower.entry(0, 1) == 0).all())


def test_cholesky_of_a_singular_block():
    """A velocity of its own and an image without noise: the state of Langevin diffusion at time 0."""
    singular = Operator(torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64)))
    assert singular.cholesky().coefficients.tolist() == [[0, 0], [0, 2]]


@pytest.mark.parametrize("shape", [(4,), (4, 6), (5, 3)])
def test_dct_is_orthonormal_and_diagonalises_the_laplacian(shape):
    basis = Basis(shape)
    u = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = basis.forward(u)
    torch.testing.assert_close(basis.inverse(v), u, **ROUNDING)
    torch.testing.assert_close(v.square().sum(), u.square().sum(), **ROUNDING)
    assert basis.eigenvalues().flatten()[0] == 0
    constant = basis.forward(torch.ones(1, 1, *shape, dtype=torch.float64)).flatten()
    assert constant[1:].abs().max() < 1e-12


def test_one_map_a_sample_is_a_loop():
    coefficients = torch.randn(3, *FIELD, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.randn(3, 4, *FIELD, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = Operator(coefficients, Basis(FIELD))
    loop = torch.cat([batch[i](u[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batch(u), loop, **ROUNDING)


def test_different_image_sizes_do_not_mix():
    with pytest.raises(PushforwardError, match="same image size"):
        Operator.scalar(torch.ones(2, 3), basis=Basis((2, 3))) @ Operator.scalar(torch.ones(3, 2), basis=Basis((3, 2)))


def test_an_entry_of_a_product_is_one_piece_of_memory():
    """Along which all is worked out, where either factor varies over times or frequencies alone."""
    over_times = Operator(torch.randn(5, 1, 1, 2, 2, dtype=torch.float64), Basis(FIELD))
    over_frequencies = Operator(torch.randn(*FIELD, 2, 2, dtype=torch.float64), Basis(FIELD))
    for product in (over_times @ over_frequencies, over_frequencies @ over_times, over_times @ over_frequencies.T):
        assert product.entry(0, 1).is_contiguous()
