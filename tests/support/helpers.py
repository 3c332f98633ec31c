"""What the numerical tests share: one list of processes, one of solvers, and denoisers whose truth is known."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from pushforward import linear
from pushforward.denoiser import Function
from pushforward.linear import VP, Discrete, Gaussian, Operator, Process, root
from pushforward.plan import SOLVERS, Plan, grid

FIELD = (3, 2)


def example(kind: type[Process]) -> Process:
    """A process of a kind, on the field of these tests where it has one."""
    if kind is Discrete:
        return Discrete.from_betas(torch.linspace(1e-4, 0.02, 1000))
    settings = {"field": FIELD, "blur_max": 2.0}
    return kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})


def deterministic(solver: Callable[..., Plan]) -> bool:
    """Whether a solver by default draws no noise, and goes step by step."""
    plan = solver(VP(), times(1.0, 0.6, 0.2))
    return not plan.noises and not plan.implicit


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# What the library lists joins the tests of all processes and of all solvers.
PROCESSES = {name: example(kind) for name, kind in linear.PROCESSES.items()}
SMOOTH = [name for name in PROCESSES if name != "discrete"]  # whose schedule has all its derivatives
DETERMINISTIC = [name for name, solver in SOLVERS.items() if deterministic(solver)]
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
RESTLESS = ("ve", "flow", "blurring")  # whose equilibrium changes with time, if there is one: not for sscs


def inner(process: Process, steps: int, start: float = 0.9, end: float = 0.05) -> Tensor:
    """A grid that keeps away from both ends, where every process is smooth."""
    exponent = 4.0 if process.name == "ve" else 2.0
    return grid.power(process, steps, exponent=exponent, start=start * process.t_max, end=end * process.t_max)


def gaussian_denoiser(process: Process, data: Gaussian) -> Function:
    """`E[u_0 | u_t]` where the data are the given Gaussian."""

    @cache
    def at(t: float) -> tuple[Operator, Operator]:
        time = torch.tensor(t, dtype=torch.float64)
        return process.transition(time, torch.zeros_like(time)), data.response(process, time)

    def denoise(u: Tensor, t: float) -> Tensor:
        psi, response = at(t)
        mean = process.lift(process.image(torch.zeros_like(u)) + torch.as_tensor(data.mean, dtype=u.dtype))
        return mean + response(u - psi(mean))

    return Function(denoise)


def point_denoiser(process: Process, image: Tensor) -> Function:
    """`E[u_0 | u_t]` where the data are one image `(1, channels, *field)`."""
    return Function(lambda u, _: process.lift(image.to(u)).expand_as(u))


def mixture_denoiser(process: Process, images: Tensor, variance: float) -> Function:
    """`E[u_0 | u_t]` where the data are Gaussians of the given variance around `images (n, channels, *field)`."""
    data = Gaussian(variance)

    @cache
    def at(t: float) -> tuple[Operator, Operator, Operator]:
        time = torch.tensor(t, dtype=torch.float64)
        white = data.covariance(process, time).cholesky().inverse()
        return process.transition(time, torch.zeros_like(time)), white, data.response(process, time)

    def denoise(u: Tensor, t: float) -> Tensor:
        psi, white, response = at(t)
        centres = process.lift(images.to(u))
        distance = white(u).flatten(1)[:, None] - white(psi(centres)).flatten(1)
        weights = torch.softmax(-0.5 * distance.square().sum(-1), 1)
        mean = torch.tensordot(weights, centres, dims=1)
        return mean + response(u - psi(mean))

    return Function(denoise)


def exact_flow(process: Process, data: Gaussian, start: float, end: float, u: Tensor) -> Tensor:
    """Where the probability flow of Gaussian data takes `u`: `m' + R' R^-1 (u - m)`."""
    first, last = root(process, times(start, end), data)[0], root(process, times(start, end), data)[1]
    psi = process.transition(times(start, end), times(0, 0))
    mean = process.lift(process.image(torch.zeros_like(u)) + torch.as_tensor(data.mean, dtype=u.dtype))
    return psi[1](mean) + (last @ first.inverse())(u - psi[0](mean))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """That no number differs by more than a part of the greatest, or of 1."""
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * max(size, 1), f"{error:.2e} of {size:.2e}"
