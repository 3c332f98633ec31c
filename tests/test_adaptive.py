"""The adaptive solver against flows known exactly: a Gaussian's, `u_t = Psi m + R_t z` with z constant."""

import pytest
import torch
from scipy.integrate import solve_ivp

from pushforward.denoiser import Function
from pushforward.errors import PushforwardError
from pushforward.execute import adaptive
from pushforward.linear import VE, VP, Blurring, Flow, Gaussian, Langevin, Process, root
from support.helpers import FIELD, mixture_denoiser, normal

DATA = Gaussian(0.3, 0.2)
PROCESSES = [VP(), VE(t_max=20.0), Flow(), Blurring((6, 5)), Langevin()]


def state(process: Process, time: float, z: torch.Tensor) -> torch.Tensor:
    t = torch.tensor([time], dtype=torch.float64)
    mean = process.lift(torch.full_like(process.image(z), 0.2))
    return process.transition(t, torch.zeros_like(t))[0](mean) + root(process, t, DATA)[0](z)


def exact(process: Process) -> Function:
    def denoise(u: torch.Tensor, time: float) -> torch.Tensor:
        t = torch.tensor([time], dtype=torch.float64)
        mean = process.lift(torch.full_like(process.image(u), 0.2))
        shift = process.transition(t, torch.zeros_like(t))[0](mean)
        return mean + DATA.response(process, t)[0](u - shift)

    return Function(denoise)


def noise(process: Process, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, process.blocks, 6, 5, generator=generator, dtype=torch.float64, device=generator.device).cpu()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_gaussian_flow_both_ways(process: Process, generator: torch.Generator) -> None:
    z = noise(process, generator)
    late, early = 0.95 * process.t_max, 0.02 * process.t_max
    first, last = state(process, late, z), state(process, early, z)
    forwards, calls = adaptive(process, exact(process), first, start_time=late, end=early, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(forwards, last, rtol=1e-5, atol=1e-5)
    backwards, _ = adaptive(process, exact(process), last, start_time=early, end=late, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(backwards, first, rtol=1e-5, atol=1e-5)
    assert calls > 10


def test_a_looser_tolerance_costs_less(generator: torch.Generator) -> None:
    process = VP()
    z = noise(process, generator)
    first, last = state(process, process.t_max, z), state(process, process.t_min, z)
    results = [adaptive(process, exact(process), first, rtol=tol, atol=tol) for tol in (1e-3, 1e-6)]
    errors = [float((u - last).abs().max()) for u, _ in results]
    assert errors[1] < 1e-2 * errors[0]
    assert results[0][1] < results[1][1]


def test_keeps_the_dtype_and_needs_no_gradient(generator: torch.Generator) -> None:
    process = VP()
    first = state(process, 0.5, noise(process, generator)).float().requires_grad_()
    result, _ = adaptive(process, exact(process), first, start_time=0.5, end=0.4)
    assert result.dtype == torch.float32
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"end": 0.0}, "stop at t_min"),
        ({"start_time": 1.5}, "up to 1"),
        ({"rtol": 0.0}, "tolerances must be positive"),
    ],
)
def test_what_it_refuses(settings: dict[str, float], message: str) -> None:
    with pytest.raises(PushforwardError, match=message):
        adaptive(VP(), exact(VP()), torch.zeros(1, 1, 6, 5), **settings)


def test_says_when_the_network_gives_no_numbers() -> None:
    broken = Function(lambda u, _: torch.full_like(u, torch.nan))
    with pytest.raises(PushforwardError, match="not finite"):
        adaptive(VP(), broken, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("process", [VP(), Langevin(), Blurring(FIELD, blur_max=2.0)], ids=lambda p: p.name)
def test_every_image_takes_the_steps_that_scipy_takes_for_it_alone(process: Process) -> None:
    """float64, four images of very different sizes; the evaluations are equal, the states to rounding."""
    denoiser = mixture_denoiser(process, 0.5 * normal(3, 1, *FIELD), 0.3)
    sizes = torch.tensor([1.0, 0.2, 3.0, 1.0], dtype=torch.float64)
    start = normal(4, process.blocks, *FIELD, seed=1) * sizes[:, None, None, None]
    given, asked = start.clone(), []
    found, calls = adaptive(process, denoiser, start, rtol=1e-3, atol=1e-3, callback=lambda p: asked.append(p.nfe))
    assert torch.equal(start, given)

    def slope(t: float, flat: object) -> object:
        time = torch.tensor([t], dtype=torch.float64)
        u = torch.as_tensor(flat).view(1, *start.shape[1:])
        on_state, on_answer = process.flow(time)
        return (on_state[0](u) + on_answer[0](denoiser.at(process, time, u)(0, u))).flatten().numpy()

    ends = (process.t_max, process.t_min)
    alone = [solve_ivp(slope, ends, u.flatten().numpy(), rtol=1e-3, atol=1e-3) for u in start]
    torch.testing.assert_close(found.flatten(1), torch.stack([torch.from_numpy(a.y[:, -1]) for a in alone]))
    assert calls == max(a.nfev for a in alone) == len(asked)
    assert sum(asked) == sum(a.nfev for a in alone)
    assert len({a.nfev for a in alone}) > 1
