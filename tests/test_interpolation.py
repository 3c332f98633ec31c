"""Codes as vectors."""

import pytest
import torch

from pushforward import Code, PushforwardError
from pushforward.maps.interpolation import average, interpolate, similarity


def codes(count: int, seed: int, noises: int = 3) -> Code:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 16, 16)
    return Code(
        torch.randn(count, *shape, generator=generator),
        torch.randn(noises, count, *shape, generator=generator),
        torch.randn(count, *shape, generator=generator),
    )


def test_the_ends_are_the_codes_themselves():
    a, b = codes(3, 0), codes(3, 1)
    for weight, end in ((0.0, a), (1.0, b)):
        found = interpolate(a, b, weight)
        assert torch.allclose(found.start, end.start, atol=1e-6)
        assert found.noises is not None
        assert end.noises is not None
        assert torch.allclose(found.noises, end.noises, atol=1e-6)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_the_great_circle_keeps_the_norm(weight: float):
    """Codes are nearly orthogonal and of nearly one norm, so between them it stays within their difference: 5%.

    On the straight line it would fall to 0.71 of it in the middle.
    """
    a, b = codes(4, 0), codes(4, 1)
    found = interpolate(a, b, weight)
    norms = [x.start.flatten(1).norm(dim=1) for x in (a, found, b)]
    assert ((norms[1] / (0.5 * (norms[0] + norms[2]))) - 1).abs().max() < 0.05


def test_weights_of_their_own_for_each_image():
    a, b = codes(3, 0), codes(3, 1)
    weights = torch.tensor([0.0, 0.3, 1.0])
    found = interpolate(a, b, weights)
    for i, weight in enumerate(weights.tolist()):
        alone = interpolate(a[[i]], b[[i]], weight)
        assert torch.allclose(found[[i]].start, alone.start, atol=1e-6)


def test_equal_codes_have_only_themselves_between():
    a = codes(2, 0)
    assert torch.allclose(interpolate(a, a, 0.4).start, a.start, atol=1e-6)


def test_residuals_are_mixed_on_the_straight_line():
    one, other = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = interpolate(Code(z, residual=one), Code(z, residual=other), 0.25)
    assert found.residual is not None
    assert torch.allclose(found.residual, torch.full_like(one, 0.25))


def test_the_middle_has_the_norm_of_a_code():
    """The mean of 8 independent codes alone would have 1/sqrt(8) of it."""
    many = codes(8, 0)
    middle = average(many)
    assert len(middle) == 1
    assert abs(float(middle.start.norm() / many.start.flatten(1).norm(dim=1).mean()) - 1) < 1e-5


def test_similarity_is_one_for_equal_codes_and_nothing_for_independent_ones():
    """Of 512 x 5 numbers, within 4 standard deviations of 1/sqrt(2560)."""
    a, b = codes(5, 0), codes(5, 1)
    assert torch.allclose(similarity(a, a)["code"], torch.ones(5))
    assert similarity(a, b)["code"].abs().max() < 4 / 2560**0.5
    assert set(similarity(a, b)) == {"start", "noises", "end", "code"}


def test_codes_of_other_plans_are_refused():
    with pytest.raises(PushforwardError, match="plans of one shape"):
        interpolate(codes(2, 0), codes(2, 1, noises=4), 0.5)
