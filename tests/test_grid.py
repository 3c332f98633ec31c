"""Grids start and end where they should, and are even in their own variable."""

import pytest
import torch

from pushforward.errors import PushforwardError
from pushforward.linear import VE, VP, Discrete, Flow, Gaussian, whitening_angle
from pushforward.plan import grid
from support.helpers import EVERY

TABLE = Discrete.from_betas(torch.linspace(1e-4, 0.02, 1000))


@EVERY
@pytest.mark.parametrize("name", ["uniform", "power", "log-snr", "karras", "angle"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("clean", [True, False])
def test_ends_and_length(process, name, steps, clean):
    end = 0.0 if clean else process.t_min
    times = grid.GRIDS[name](process, steps, end=end)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert float(times[0]) == process.t_max
    assert float(times[-1]) == end
    assert bool((times.diff() < 0).all())


@EVERY
@pytest.mark.parametrize("name", ["uniform", "power", "log-snr", "karras", "angle"])
@pytest.mark.parametrize("steps", [20, 300])
def test_no_call_below_the_least_trained_noise(process, name, steps):
    times = grid.GRIDS[name](process, steps)
    assert len(times) == steps + 1
    assert float(times[-2]) >= process.t_min * (1 - 1e-9)


def test_times_are_found_to_rounding_in_few_calls():
    """Where a cube has given values, its ends included, and where a step is: a bisection would take 60 calls."""
    high, low = torch.tensor([2.0, 0.0], dtype=torch.float64)
    values = torch.tensor([0.0, 1e-9, 0.3, 1.0, 8.0], dtype=torch.float64)
    calls = []

    def cube(t):
        calls.append(t)
        return t**3

    found = grid.solve_for_time(cube, values, high, low)
    torch.testing.assert_close(found, values ** (1 / 3), rtol=1e-12, atol=1e-17)
    step = grid.solve_for_time(lambda t: (t > 0.7).double(), torch.tensor(0.5), high, low)
    torch.testing.assert_close(step, torch.tensor(0.7, dtype=torch.float64), rtol=1e-15, atol=0)
    assert len(calls) <= 16


def even(values):
    steps = values.diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-6, atol=1e-9)


def test_even_in_their_variables():
    process, end = VP(), 1e-3
    even(grid.uniform(process, 8, end=end))
    even(grid.power(process, 8, exponent=2.0, end=end).sqrt())
    even(process.log_snr(grid.log_snr(process, 8, end=end)))
    even(torch.exp(-process.log_snr(grid.karras(process, 8, rho=7.0, end=end)) / 7))
    even(whitening_angle(process, grid.angle(process, 8, scale=0.5, end=end), Gaussian(0.25)))


def test_karras_sigmas():
    """The paper's own numbers: 18 noise levels from 80 to .002 with rho = 7, then 0."""
    times = grid.karras(VE(), 18)
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(times[:-1], expected, rtol=1e-9, atol=0)


def test_timesteps():
    assert (grid.timesteps(TABLE, 4, spacing="leading") * 1000 - 1)[:-1].tolist() == pytest.approx([750, 500, 250, 0])
    leading = grid.timesteps(TABLE, 4, spacing="leading", offset=1) * 1000 - 1
    assert leading[:-1].tolist() == pytest.approx([751, 501, 251, 1])
    trailing = grid.timesteps(TABLE, 4, spacing="trailing") * 1000 - 1
    assert trailing[:-1].tolist() == pytest.approx([999, 749, 499, 249])
    linspace = grid.timesteps(TABLE, 4, spacing="linspace") * 1000 - 1
    assert linspace[:-1].tolist() == pytest.approx([999, 666, 333, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid.uniform(VP(), 0), "at least one step"),
        (lambda: grid.timesteps(VP(), 4), "given by a table"),
        (lambda: grid.timesteps(TABLE, 1001), "1000 timesteps"),
        (lambda: grid.timesteps(TABLE, 4, spacing="odd"), "spacing"),
        (lambda: grid.explicit(VP(), [0.1, 0.5]), "decrease"),
        (lambda: grid.explicit(Flow(), [2.0, 0.5]), "must lie in"),
        (lambda: grid.uniform(VP(), 4, end=-0.1), "down to end"),
        (lambda: grid.angle(VP(), 4, start=2.0), "down to end"),
        (lambda: grid.default(VP(), 4, name="odd"), "Unknown grid"),
    ],
)
def test_bad_grids_are_refused(make, message):
    with pytest.raises(PushforwardError, match=message):
        make()
