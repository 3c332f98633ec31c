"""The sequential executor: batches, devices of memory, gradients, refusals."""

import pytest
import torch

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.linear import VP, Blurring, Gaussian, Langevin
from pushforward.plan import SOLVERS, auto, ddim, exponential, gddim, grid
from support.helpers import EVERY, FIELD, gaussian_denoiser, mixture_denoiser, normal


@EVERY
@pytest.mark.parametrize("name", ["ddim", "ddpm", "gddim", "exponential", "unipc", "heun"])
def test_a_batch_is_a_loop(process, name):
    """float64, so that only the order of summation differs."""
    plan = SOLVERS[name](process, grid.uniform(process, 5))
    denoiser = mixture_denoiser(process, normal(3, 1, *FIELD), 0.1)
    u, xi = process.t_max * normal(3, process.blocks, *FIELD, seed=1), normal(3, process.blocks, *FIELD, seed=2)
    together = run(plan, denoiser, u, noise=lambda _: xi)
    loop = torch.cat([run(plan, denoiser, u[i : i + 1], noise=lambda _, i=i: xi[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, loop, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [VP(), Blurring(FIELD), Langevin()], ids=lambda p: p.name)
def test_single_precision_follows_double(process):
    """Rounding of 1e-7 a step, amplified by at most the data's contraction."""
    plan = auto(process, 10, Gaussian(0.25))
    denoiser = gaussian_denoiser(process, Gaussian(0.3))
    u = normal(2, process.blocks, *FIELD)
    torch.testing.assert_close(run(plan, denoiser, u.float()).double(), run(plan, denoiser, u), rtol=0, atol=2e-4)


@EVERY
def test_gradient_is_the_finite_difference(process):
    plan = gddim(process, grid.uniform(process, 4))
    denoiser = mixture_denoiser(process, normal(3, 1, *FIELD), 0.1)
    u, direction = process.t_max * normal(1, process.blocks, *FIELD), normal(1, process.blocks, *FIELD, seed=5)

    def value(start):
        return process.image(run(plan, denoiser, start)).square().sum()

    start = u.clone().requires_grad_()
    value(start).backward()
    h = 1e-5 * process.t_max
    difference = (value(u + h * direction) - value(u - h * direction)) / (2 * h)
    torch.testing.assert_close((start.grad * direction).sum(), difference, rtol=1e-5, atol=1e-8)


def test_memory_is_the_solvers_history():
    """States of a thousand steps are dropped as soon as nothing refers to them."""
    import weakref

    seen, alive = [], []

    def denoise(u, _):
        alive.append(sum(ref() is not None for ref in seen))
        answer = 0.5 * u
        seen.append(weakref.ref(answer))
        return answer

    run(gddim(VP(), grid.uniform(VP(), 200), order=2), Function(denoise), normal(1, 1, *FIELD))
    assert max(alive) <= 4


@pytest.mark.parametrize("mean", [0.3, torch.full((1, *FIELD), 0.3)], ids=["number", "image"])
def test_a_reference_mean_may_be_a_number_or_an_image(mean):
    data = Gaussian(0.3, mean)
    plan = exponential(VP(), torch.tensor([0.9, 0.4]), reference=data, order=0)
    u = normal(2, 1, *FIELD)
    found = run(plan, gaussian_denoiser(VP(), data), u)
    expected = run(exponential(VP(), torch.linspace(0.9, 0.4, 400), order=2), gaussian_denoiser(VP(), data), u)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_callback_sees_every_call():
    seen = []
    plan = SOLVERS["heun"](VP(), grid.uniform(VP(), 3))
    run(plan, gaussian_denoiser(VP(), Gaussian(0.3)), normal(2, 1, *FIELD), callback=seen.append)
    assert [p.done for p in seen] == [1, 2, 3, 4, 5]
    assert all(p.total == plan.nfe and p.state.shape == p.denoised.shape == (2, 1, *FIELD) for p in seen)


@pytest.mark.parametrize(
    ("process", "shape"), [(Langevin(), (1, 3, 4, 4)), (Blurring(FIELD), (1, 1, 4, 4)), (VP(), (4,))]
)
def test_a_start_of_the_wrong_shape_is_refused(process, shape):
    with pytest.raises(PushforwardError, match="has shape"):
        run(ddim(process, grid.uniform(process, 2)), Function(lambda u, _: u), torch.zeros(shape))


def test_noise_is_asked_for():
    with pytest.raises(PushforwardError, match="stochastic"):
        run(ddim(VP(), grid.uniform(VP(), 2), eta=1.0), Function(lambda u, _: u), torch.zeros(1, 1, 2, 2))


def test_divergence_is_reported():
    with pytest.raises(PushforwardError, match="not finite"):
        run(ddim(VP(), grid.uniform(VP(), 2)), Function(lambda u, _: u * torch.inf), torch.ones(1, 1, 2, 2))
