"""White codes: bands of a spectrum, the projection onto their norms, and descent among such codes."""

import math
from typing import Any

import pytest
import torch

import pushforward as pf
from pushforward.guidance.optimisers import WHITE
from pushforward.guidance.posterior import best
from pushforward.guidance.spectrum import bands, evened, norms, tangent, white
from pushforward.linear import VP, Gaussian, Langevin
from pushforward.maps.code import Code
from pushforward.maps.spec import SamplerSpec
from pushforward.model.model import Model
from support.helpers import gaussian_denoiser

SHAPES = [(1, 28, 28), (4, 8, 10), (2, 100), (2, 8, 8, 4), (64,), (64, 1, 1)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_band_has_enough_numbers_and_those_of_one_wavelength(shape: tuple[int, ...]):
    field = bands(shape)
    sizes = field.flatten().bincount()
    assert int(sizes.sum()) * (math.prod(shape) // field.numel()) == math.prod(shape)
    assert int(sizes.min()) >= 16
    axes = list(range(field.ndim))
    mirrored = field.flip(axes).roll([1] * len(axes), axes)
    assert len(sizes) == 1 or torch.equal(mirrored, field)  # so that white codes are real


@pytest.mark.parametrize("shape", SHAPES)
def test_the_projection_gives_the_norms_of_noise_and_leaves_noise_nearly_alone(shape: tuple[int, ...]):
    z, field = noise(5, 2 * math.prod(shape)), bands(shape)
    there = white(z, field)
    assert (norms(there, field) - 1).abs().max() < 1e-12
    assert (white(there, field) - there).abs().max() < 1e-12
    assert (there - z).norm() < 0.25 * z.norm()
    assert torch.allclose(there.square().sum(1), torch.full((5,), 2.0 * math.prod(shape), dtype=torch.float64))
    assert (white(3 * z, field) - there).abs().max() < 1e-12


def test_norms_are_those_of_waves():
    """A wave of wavelength 4 lies in one band, of which it has all the norm; so do its neighbours' phases."""
    across = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 4
    wave = torch.stack([across.cos(), across.sin()])[:, None, :].expand(2, 16, 16).reshape(2, 256)
    field = bands((1, 16, 16))
    found = norms(wave, field).square() * field.flatten().bincount()
    band = int(field[0, 4])
    assert torch.allclose(found[:, 0, band], torch.full((2,), 128.0, dtype=torch.float64))
    assert float(found.sum()) == pytest.approx(256)


@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_keep_the_norms_to_first_order(shape: tuple[int, ...]):
    field = bands(shape)
    z, along = white(noise(3, math.prod(shape)), field), noise(3, math.prod(shape), seed=1)
    there = tangent(z, along, field)
    assert (tangent(z, there, field) - there).abs().max() < 1e-12
    assert tangent(z, z, field).abs().max() < 1e-12
    for step in (1e-3, 1e-4):
        assert (norms(z + step * there, field) - 1).abs().max() < 3 * step**2
    assert torch.allclose((there * there).sum(1), (there * along).sum(1))  # an orthogonal projection


def test_directions_are_evened_but_for_rounding():
    """Two waves of unlike strength become as strong; a third, a million times fainter, stays faint."""
    field = bands((1, 16, 16))
    x = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16
    waves = [(k * x).cos()[None, :].expand(16, 16).flatten() for k in (1, 5, 8)]
    one, other, faint = (int(field[0, k]) for k in (1, 5, 8))
    assert len({one, other, faint}) == 3
    powers = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    there = evened((waves[0] + 0.01 * waves[1] + 1e-6 * waves[2]).expand(3, -1), field, powers)
    assert torch.allclose(there.square().mean(1), torch.ones_like(powers))
    found = norms(there, field)[:, 0]
    strengths = norms(torch.stack(waves[:2]), field)[[0, 1], 0, [one, other]]
    ratio = 0.01 * strengths[1] / strengths[0]
    assert torch.allclose(found[:, other] / found[:, one], ratio ** (1 - powers))
    assert float(found[0, faint]) < 1e-2 * float(found[0, one])
    assert not evened(torch.zeros(1, 256), field, torch.ones(1)).any()


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.5])
def test_no_direction_of_its_length_falls_more(power: float):
    """The length is the sum of `r^q` over all numbers; 100 directions near and far have less of the gradient."""
    field = bands((2, 12, 12))
    sizes, q = field.flatten().bincount(), (2 - power) / (1 - power)
    coarse = noise(2, 3, 3, seed=1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    gradient = coarse.flatten()[None] + 0.01 * noise(1, 288)

    def steepness(direction: torch.Tensor) -> torch.Tensor:
        length = (sizes * norms(direction, field).pow(q)).sum((1, 2)).pow(1 / q)
        return (direction * gradient).sum(1) / length

    found = evened(gradient, field, torch.tensor([power], dtype=torch.float64))
    others = found + torch.logspace(-3, 1, 100, dtype=torch.float64)[:, None] * noise(100, 288, seed=2)
    assert (steepness(others) < steepness(found)).all()
    assert float(steepness(gradient)) < float(steepness(found)) or power == 0


def test_the_first_step_turns_what_the_gradient_says_most_of():
    """Of two bands, one has a gradient ten times as steep: it turns farther still at first, and as far in the end."""
    field = bands((1, 16, 16))
    x = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16
    gradient = ((x.cos() + 0.1 * (5 * x).cos())[None, :].expand(16, 16)).flatten()[None]
    z = white(noise(1, 256), field)
    one, other = (int(field[0, k]) for k in (1, 5))
    state, turns = WHITE.begin(z), []
    for _ in range(25):
        before = state["point"]
        state = WHITE.advance(state, (before @ gradient[0]), gradient, 1e-3, (1, 16, 16))
        moved = norms(state["point"] - before, field)[0, 0]
        turns.append(float(moved[one] / moved[other]))
    assert turns[0] > 20
    assert turns[-1] < 2


def descend(gradient: Any, x: torch.Tensor, shape: tuple[int, ...], steps: int) -> torch.Tensor:
    state = WHITE.begin(x)
    for _ in range(steps):
        state = WHITE.advance(state, *gradient(state["point"]), WHITE.rate, shape)
    return state["point"]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 8), (40,)])
def test_descent_reaches_the_white_code_nearest_to_a_target(shape: tuple[int, ...]):
    """A squared distance is least, among white codes, at the target's own projection."""
    target, x = 3 * noise(4, math.prod(shape), seed=1), noise(4, math.prod(shape))
    found = descend(lambda z: ((z - target).square().sum(1), 2 * (z - target)), x, shape, 200)
    assert (found - white(target, bands(shape))).abs().max() < 1e-3


def test_descent_finds_the_least_eigenvector_of_flat_codes():
    """A quadratic on one sphere: its least is the least eigenvalue, times the sphere's squared radius."""
    values = torch.linspace(0.5, 5, 20, dtype=torch.float64)
    basis = torch.linalg.qr(noise(20, 20, seed=3))[0]
    matrix = basis * values @ basis.T
    found = descend(lambda z: ((z @ matrix * z).sum(1), 2 * z @ matrix), noise(4, 20), (20,), 300)
    assert ((found @ matrix * found).sum(1) - 20 * 0.5).abs().max() < 1e-3
    assert torch.allclose(found.square().sum(1), torch.full((4,), 20.0, dtype=torch.float64))


def brightness(images: torch.Tensor, code: Code) -> torch.Tensor:
    return (images - 0.5).square().flatten(1).sum(1)


@pytest.mark.parametrize("process", [VP(), Langevin()])
def test_codes_found_are_white_whatever_their_parts_and_the_batch(process: Any):
    """Position and velocity, and each noise of a stochastic plan, are white of themselves; images are independent."""
    data = Gaussian(0.3)
    model = Model("gaussian", process, gaussian_denoiser(process, data), (1, 8, 8), reference=data)
    diffusion = pf.Diffusion(model, SamplerSpec("gddim", 4, end=process.t_min).plan(model), dtype=torch.float64)
    found = best(diffusion, brightness, optimiser="white", count=3, steps=12, seed=2)
    field = bands(found.code.start.shape[1:])
    assert (norms(found.code.variables(), field) - 1).abs().max() < 1e-5
    assert float(found.energy.mean()) < 0.8 * float(found.history[0].energy.mean())
    alone = best(diffusion, brightness, optimiser="white", count=1, first=1, steps=12, seed=2)
    assert torch.allclose(alone.code.variables(), found.code.variables()[1:2], atol=1e-10)
