"""Grids: decreasing times `t_0 = start > … > t_N = end`, as float64 tensors `(steps + 1,)`.

Every grid goes from `start` (the process's noisiest time) to `end`. With `end = 0` the last step goes all the way to
clean data; where the grid's own variable is infinite there (log-SNR), the steps before it end at `t_min` instead, as
the field's samplers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Discrete, Gaussian, Process, whitening_angle


def uniform(process: Process, steps: int, *, start: float | None = None, end: float = 0.0) -> Tensor:
    """Equal steps in time."""
    return power(process, steps, exponent=1.0, start=start, end=end)


def power(
    process: Process, steps: int, *, exponent: float = 2.0, start: float | None = None, end: float = 0.0
) -> Tensor:
    """Equal steps in `t^(1 / exponent)`: `exponent = 2` is the quadratic grid of DDIM and gDDIM."""
    first = process.t_max if start is None else start
    return _unit(steps).mul(first ** (1 / exponent) - end ** (1 / exponent)).add(end ** (1 / exponent)).pow(exponent)


def log_snr(process: Process, steps: int, *, start: float | None = None, end: float = 0.0) -> Tensor:
    """Equal steps in `log(alpha / sigma)` (Lu et al., DPM-Solver, arXiv 2206.00927)."""
    return _in_variable(process, steps, lambda t: -process.log_snr(t), start, end)


def karras(
    process: Process, steps: int, *, rho: float = 7.0, start: float | None = None, end: float = 0.0
) -> Tensor:
    """Equal steps in `(sigma / alpha)^(1 / rho)` down to `t_min`, then `end` (Karras et al., arXiv 2206.00364, eq. 5)."""

    def variable(t: Tensor) -> Tensor:
        return torch.where(t > 0, torch.exp(-process.log_snr(t) / rho), -math.inf)

    return _in_variable(process, steps, variable, start, end)


def angle(
    process: Process, steps: int, *, scale: float = 0.5, start: float | None = None, end: float = 0.0
) -> Tensor:
    """Equal steps in the whitening angle of data of standard deviation `scale`."""
    reference = Gaussian(scale**2)
    return _in_variable(process, steps, lambda t: whitening_angle(process, t, reference), start, end)


def explicit(process: Process, times: Sequence[float]) -> Tensor:
    """The given times."""
    return torch.tensor(list(times), dtype=torch.float64)


def timesteps(
    process: Process, steps: int, *, spacing: str = "leading", offset: int = 0, final: float = 0.0
) -> Tensor:
    """The integer timesteps of `diffusers`' schedulers, then the time `final`.

    Args:
        process: a `Discrete` process.
        steps: how many timesteps.
        spacing: `leading`, `linspace` or `trailing` (Lin et al., arXiv 2305.08891, table 2).
        offset: added to the timesteps of `leading` spacing (`steps_offset`).
        final: time of the last state: 0 for clean data, `t_min` where `set_alpha_to_one` is off.

    Raises:
        PushforwardError: the process has no timesteps, or too few of them.
    """
    asked = asked_timesteps(process, steps, spacing, offset)
    return torch.cat([(asked + 1) / len(process.alphas_cumprod), torch.tensor([final], dtype=torch.float64)])


def asked_timesteps(process: Process, steps: int, spacing: str, offset: int) -> Tensor:
    """The integer timesteps themselves, decreasing, `(steps,)`."""
    if not isinstance(process, Discrete):
        msg = f"Timestep grids need a process given by a table; {process.name!r} has continuous time."
        raise PushforwardError(msg)
    count = process.timesteps
    if not 1 <= steps <= count:
        msg = f"This process has {count} timesteps; got steps={steps}."
        raise PushforwardError(msg)
    match spacing:
        case "leading":
            chosen = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (count // steps) + offset
        case "linspace":
            chosen = torch.linspace(0, count - 1, steps, dtype=torch.float64).round().flip(0)
        case "trailing":
            chosen = torch.arange(count, 0, -count / steps, dtype=torch.float64).round() - 1
        case _:
            msg = f"Unknown timestep spacing {spacing!r}; use leading, linspace or trailing."
            raise PushforwardError(msg)
    return chosen.clamp_max(count - 1)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform, "power": power, "log-snr": log_snr, "karras": karras, "angle": angle,
    "explicit": explicit, "timesteps": timesteps,
}  # fmt: skip


def _unit(steps: int) -> Tensor:
    """`1, 1 - 1/N … 0`."""
    if steps < 1:
        msg = f"A grid needs at least one step; got steps={steps}."
        raise PushforwardError(msg)
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _in_variable(
    process: Process, steps: int, variable: Callable[[Tensor], Tensor], start: float | None, end: float
) -> Tensor:
    """Equal steps in an increasing function of time."""
    if end < process.t_min and not math.isfinite(variable(torch.tensor(end, dtype=torch.float64))):
        if steps == 1:
            return uniform(process, 1, start=start, end=end)
        inner = _in_variable(process, steps - 1, variable, start, process.t_min)
        return torch.cat([inner, torch.tensor([end], dtype=torch.float64)])
    first = process.t_max if start is None else start
    within = torch.tensor([end, first], dtype=torch.float64)
    if not math.isfinite(variable(within)[1]):  # no signal at all there: space the grid from just below
        within[1] = end + 0.999 * (first - end)
    low, high = variable(within)
    grid = invert(variable, low + _unit(steps) * (high - low), within[1], within[0])
    grid[0], grid[-1] = first, end
    return grid


def invert(variable: Callable[[Tensor], Tensor], values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Times in `[low, high]` at which an increasing function of time has `values`, by bisection to rounding."""
    below, above = low.expand_as(values).clone(), high.expand_as(values).clone()
    for _ in range(100):
        middle = 0.5 * (below + above)
        later = variable(middle) < values
        below, above = torch.where(later, middle, below), torch.where(later, above, middle)
    return 0.5 * (below + above)
