"""Grids: decreasing times `t_0 = start > … > t_N = end`, as float64 tensors `(steps + 1,)`.

Every grid goes from `start` (the process's noisiest time) to `end`. With `end = 0` the last step goes all the way to
clean data; where the grid's own variable is infinite there (log-SNR), the steps before it end at `t_min` instead, as
the field's samplers do.

    >>> from pushforward.linear import VP
    >>> power(VP(), 4).tolist()
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.errors import PushforwardError
from pushforward.linear import Discrete, Gaussian, Process, whitening_angle

STEP = 4096  # bytes that each step of a plan takes; more over frequencies


def uniform(process: Process, steps: int, *, start: float | None = None, end: float = 0.0) -> Tensor:
    """Make equal steps in time."""
    return power(process, steps, exponent=1.0, start=start, end=end)


def power(
    process: Process, steps: int, *, exponent: float = 2.0, start: float | None = None, end: float = 0.0
) -> Tensor:
    """Make equal steps in `t^(1 / exponent)`: `exponent = 2` is the quadratic grid of DDIM and gDDIM."""
    _check_positive("exponent", exponent)
    first = _checked_start(process, start, end)
    low, high = end ** (1 / exponent), first ** (1 / exponent)
    grid: Tensor = (low + _unit(steps) * (high - low)).pow(exponent)
    grid[0], grid[-1] = first, end
    return _asked_within(process, grid, lambda n: power(process, n, exponent=exponent, start=start, end=process.t_min))


def log_snr(process: Process, steps: int, *, start: float | None = None, end: float = 0.0) -> Tensor:
    """Make equal steps in `log(alpha / sigma)` (Lu et al., DPM-Solver, arXiv 2206.00927)."""
    return _in_variable(process, steps, lambda t: -process.log_snr(t), start, end)


def karras(process: Process, steps: int, *, rho: float = 7.0, start: float | None = None, end: float = 0.0) -> Tensor:
    """Make equal steps in `(sigma / alpha)^(1 / rho)` to `t_min`, then go to `end`.

    References:
        Elucidating the Design Space, Karras et al., arXiv 2206.00364, eq. 5.
    """
    _check_positive("rho", rho)

    def variable(t: Tensor) -> Tensor:
        return torch.where(t > 0, torch.exp(-process.log_snr(t) / rho), -math.inf)

    return _in_variable(process, steps, variable, start, end)


def angle(
    process: Process,
    steps: int,
    *,
    scale: float = 0.5,
    exponent: float = 1.0,
    start: float | None = None,
    end: float = 0.0,
) -> Tensor:
    """Make equal steps in `atan((sigma / (scale alpha))^exponent)`.

    With exponent 1 that is the whitening angle of data of standard deviation `scale`: steps in log-SNR are shortest
    where noise and data are alike. Smaller exponents spread them wider, to equal steps in log-SNR in the limit.
    """
    _check_positive("scale", scale)
    _check_positive("exponent", exponent)
    reference = Gaussian(scale**2)

    def variable(t: Tensor) -> Tensor:
        whitening = whitening_angle(process, t, reference)
        return torch.atan2(whitening.sin().pow(exponent), whitening.cos().clamp_min(0).pow(exponent))

    return _in_variable(process, steps, variable, start, end)


def explicit(process: Process, times: Sequence[float]) -> Tensor:
    """Check given times, and return them as a grid."""
    return check_grid(process, torch.tensor(list(times), dtype=torch.float64, device="cpu"))


def shifted(
    process: Process,
    steps: int,
    *,
    shift: float = 1.0,
    last: float | None = None,
    beyond: float = 0.0,
    terminal: float | None = None,
    spread: str | None = None,
    stay: bool = False,
    end: float = 0.0,
) -> Tensor:
    """Make equal steps in s, then bend them: more of them near the noise (time must run 0 … 1).

    Args:
        process: a process whose time goes to 1.
        steps: number of steps.
        shift: shift of the times towards the noise, see `bent`.
        last: s at which the last step begins, after equal steps; by default the steps are equal down to `beyond`.
        beyond: s at which the last step would end, if it were equal to the others.
        terminal: time of the last step's beginning, see `bent`.
        spread: rule for the times between, see `bent`.
        stay: end at the time at which the last step would begin, and leave that step out.
        end: time of the last state.
    """
    check_memory(steps * STEP, f"A plan of {steps:,} steps")
    places = torch.linspace(1, beyond, steps + 1, dtype=torch.float64, device="cpu")[:-1]
    if last is not None:
        places = torch.linspace(1, last, steps, dtype=torch.float64, device="cpu")
    times = process.t_max * bent(places, shift=shift, terminal=terminal, spread=spread)
    return times if stay else torch.cat([times, torch.tensor([end], dtype=torch.float64, device="cpu")])


def bent(places: Tensor, *, shift: float = 1.0, terminal: float | None = None, spread: str | None = None) -> Tensor:
    """Bend the times of flow models at which steps begin, as schedulers do: by `shift`, `terminal`, then `spread`.

    Args:
        places: times s before bending, decreasing from 1 or less, `(steps,)`.
        shift: replace s by `shift s / (1 + (shift - 1) s)`; 1 does nothing.
        terminal: scale the distances from 1 so that the last time is this; a single step at 1 stays there.
        spread: keep the first and last time, and place those between by this rule of `spaced`.

    References:
        shift: Scaling Rectified Flow Transformers, Esser et al., arXiv 2403.03206, eq. 23;
        terminal: LTX-Video, HaCohen et al., arXiv 2501.00103.
    """
    times = shift * places / (1 + (shift - 1) * places)
    if terminal and times[-1] < 1:
        times = 1 - (1 - times) * (1 - terminal) / (1 - times[-1])
    return times if spread is None else spaced(float(times[0]), float(times[-1]), len(times), spread)


def levels(
    process: Process,
    steps: int,
    *,
    spread: str,
    rho: float = 7.0,
    high: float | None = None,
    low: float | None = None,
    spacing: str | None = None,
    offset: int = 0,
    stay: bool = False,
    end: float = 0.0,
) -> Tensor:
    """Make steps that begin at noise levels `sigma / alpha` from `high` to `low`, then go to the time `end`.

    If the last level is at `end` already, the step between them would do nothing and is left out.

    Args:
        process: the diffusion.
        steps: number of levels.
        spread: how to place the levels, a rule of `spaced`.
        rho: exponent of the rule `karras`.
        high: the first level; by default that of `t_max`, or, without signal there, `sqrt(2^24 - 1)` as in `diffusers`.
        low: the last level; by default that of `t_min`.
        spacing: if given, `high` and `low` are by default the levels of the first and last of these timesteps.
        offset: offset of these timesteps; see `timesteps`.
        stay: end at the last level.
        end: time of the last state.
    """
    check_memory(steps * STEP, f"A plan of {steps:,} steps")

    def level(t: Tensor) -> Tensor:
        return torch.exp(-process.log_snr(t))

    bounds = torch.tensor([process.t_max, process.t_min], dtype=torch.float64, device="cpu")
    ends = bounds
    if spacing is not None:
        ends = (asked_timesteps(process, steps, spacing, offset)[[0, -1]] + 1) * process.t_min
    first, last = level(ends).nan_to_num(posinf=math.sqrt(2**24 - 1)).tolist()
    wanted = spaced(first if high is None else high, last if low is None else low, steps, spread, rho)
    times = solve_for_time(level, wanted, *bounds)
    if stay:
        return times
    return torch.cat([times[times > end * (1 + 1e-9)], torch.tensor([end], dtype=torch.float64, device="cpu")])


def spaced(first: float, last: float, count: int, rule: str, rho: float = 7.0) -> Tensor:
    """Space decreasing numbers from the first to the last, `(count,)`; a single one is the first.

    `karras` makes equal steps in the power `1 / rho` (arXiv 2206.00364, eq. 5), `exponential` in the logarithm, and
    `beta` takes quantiles of Beta(0.6, 0.6) (Beta Sampling is All You Need, Lee et al., arXiv 2407.12173).
    """
    ramp = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")
    match rule:
        case "karras":
            root: Tensor = first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))
            return root.pow(rho)
        case "exponential":
            return (math.log(first) + ramp * (math.log(last) - math.log(first))).exp()
        case "beta":
            from scipy.stats import beta

            return last + torch.from_numpy(beta.ppf(1 - ramp.numpy(), 0.6, 0.6)) * (first - last)
        case _:
            raise PushforwardError(
                f"Unknown rule {rule!r} for placing noise levels; known are karras, exponential and beta."
            )


def timesteps(
    process: Process,
    steps: int,
    *,
    spacing: str = "leading",
    offset: int = 0,
    final: float = 0.0,
    drop_last: bool = False,
    whole: bool = True,
    top: int | None = None,
) -> Tensor:
    """Place the timesteps of `diffusers`' schedulers, then the time `final`.

    If the last timestep is at `final` already, the step between them would do nothing and is left out.

    Args:
        process: a `Discrete` process.
        steps: number of timesteps.
        spacing: `leading`, `linspace` or `trailing` (Lin et al., arXiv 2305.08891, table 2).
        offset: number added to the timesteps of `leading` spacing (`steps_offset`).
        final: time of the last state: 0 for clean data, `t_min` if `set_alpha_to_one` is off.
        drop_last: place one timestep more and leave out the last (the multistep schedulers do; not for `trailing`).
        whole: round timesteps of `linspace` spacing to integers (Euler's and similar schedulers do not).
        top: place the timesteps among the first `top` of the process's; by default among all.

    Raises:
        PushforwardError: the process has no timesteps, or too few of them.
    """
    more = drop_last and spacing != "trailing"
    asked = asked_timesteps(process, steps + more, spacing, offset, whole=whole, top=top)[:steps]
    times = (asked + 1) * process.t_min
    return torch.cat([times[times > final + 1e-12], torch.tensor([final], dtype=torch.float64, device="cpu")])


def asked_timesteps(
    process: Process, steps: int, spacing: str, offset: int = 0, *, whole: bool = True, top: int | None = None
) -> Tensor:
    """Return the timesteps themselves, decreasing, `(steps,)`; see `timesteps`."""
    if not isinstance(process, Discrete):
        raise PushforwardError(f"Timestep grids need a process given by a table; {process.name!r} has continuous time.")
    every = process.timesteps
    count = every if top is None else top
    if not 1 <= steps <= count:
        raise PushforwardError(f"This process has {count} timesteps; take from 1 to {count} steps, not {steps}.")
    match spacing:
        case "leading":
            chosen = torch.arange(steps - 1, -1, -1, dtype=torch.float64, device="cpu") * (count // steps)
            return chosen + min(offset, every - 1 - int(chosen[0]))
        case "linspace":
            apart = (count - 1) / max(steps - 1, 1)  # a single one is 0, as NumPy has it
            placed = torch.arange(steps - 1, -1, -1, dtype=torch.float64, device="cpu") * apart
            return placed.round() if whole else placed
        case "trailing":
            placed = count - torch.arange(steps, dtype=torch.float64, device="cpu") * (every / steps)
            return placed[placed > 1e-9].round() - 1
        case _:
            raise PushforwardError(f"Unknown timestep spacing {spacing!r}; use leading, linspace or trailing.")


def own(process: Process, steps: int, *, times: Callable[[int], Tensor], end: float = 0.0) -> Tensor:  # noqa: ARG001
    """Take the times that a model's pipeline takes for so many steps, and end at `end`."""
    placed = times(steps)
    return torch.cat([placed[placed > end + 1e-12], torch.tensor([end], dtype=torch.float64, device="cpu")])


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform, "power": power, "log-snr": log_snr, "karras": karras, "angle": angle, "shifted": shifted,
    "levels": levels, "timesteps": timesteps, "own": own,
}  # fmt: skip


def default(process: Process, steps: int, *, name: str = "uniform", **settings: object) -> Tensor:
    """Make the grid that a model came with: `default(model.process, steps, **model.grid)`.

    Args:
        process: the diffusion.
        steps: number of steps.
        name: a name in `GRIDS`.
        settings: settings of that grid.

    Raises:
        PushforwardError: there is no grid of that name, or it does not take these settings.
    """
    if name not in GRIDS:
        raise PushforwardError(f"Unknown grid {name!r}; known are {', '.join(GRIDS)}.")
    try:
        return GRIDS[name](process, steps, **settings)
    except TypeError as error:
        raise PushforwardError(f"Grid {name!r} does not take these settings: {error}.") from error


def check_grid(process: Process, grid: Tensor) -> Tensor:
    """Check a grid, and return it as float64 on the CPU.

    Raises:
        PushforwardError: it is not decreasing, is too short, or leaves `[0, t_max]`.
    """
    grid = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) < 2:
        raise PushforwardError(f"A grid needs at least two times in one dimension; got shape {tuple(grid.shape)}.")
    if not bool((grid.diff() < 0).all()):
        raise PushforwardError("The times of a grid must strictly decrease, from noise to data.")
    if float(grid[0]) > process.t_max * (1 + 1e-12) or float(grid[-1]) < 0:
        raise PushforwardError(
            f"Grid times must lie in [0, {process.t_max:g}] for process {process.name!r}; "
            f"got {float(grid[-1]):g} to {float(grid[0]):g}."
        )
    return grid


def _check_steps(steps: int) -> None:
    if not hasattr(steps, "__index__") or steps < 1:
        raise PushforwardError(f"A grid needs at least one step, and a whole number of them; got steps={steps!r}.")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise PushforwardError(f"The {name} of a grid is a positive number; got {value}.")


def _unit(steps: int) -> Tensor:
    """Return `1, 1 - 1/N … 0`."""
    _check_steps(steps)
    check_memory(steps * STEP, f"A plan of {steps:,} steps")
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")


def _in_variable(
    process: Process, steps: int, variable: Callable[[Tensor], Tensor], start: float | None, end: float
) -> Tensor:
    """Make equal steps in an increasing function of time."""
    _check_steps(steps)
    if end < process.t_min and not math.isfinite(variable(torch.tensor(end, dtype=torch.float64, device="cpu"))):
        if steps == 1:
            return uniform(process, 1, start=start, end=end)
        inner = _in_variable(process, steps - 1, variable, start, process.t_min)
        return torch.cat([inner, torch.tensor([end], dtype=torch.float64, device="cpu")])
    first = _checked_start(process, start, end)
    within = torch.tensor([end, first], dtype=torch.float64, device="cpu")
    if not math.isfinite(variable(within)[1]):  # no signal at all there: space the grid from just below
        half = torch.tensor(0.5, device="cpu")
        lost = solve_for_time(lambda t: 1.0 - variable(t).isfinite().double(), half, within[1], within[0])
        within[1] = end + 0.999 * (lost - end)
    low, high = variable(within)
    grid = solve_for_time(variable, low + _unit(steps) * (high - low), within[1], within[0])
    grid[0], grid[-1] = first, end
    return _asked_within(process, grid, lambda n: _in_variable(process, n, variable, start, process.t_min))


def _asked_within(process: Process, grid: Tensor, remade: Callable[[int], Tensor]) -> Tensor:
    """Return a grid whose last network call is no earlier than `t_min`, below which no network was trained.

    Args:
        process: the diffusion.
        grid: the grid before this correction.
        remade: a function that makes the grid of n steps that ends at `t_min`.
    """
    steps = len(grid) - 1
    if steps == 1 or float(grid[-1]) >= process.t_min or float(grid[-2]) >= process.t_min * (1 - 1e-9):
        return grid
    return torch.cat([remade(steps - 1), grid[-1:]])


def _checked_start(process: Process, start: float | None, end: float) -> float:
    first = process.t_max if start is None else start
    if not 0 <= end < first <= process.t_max * (1 + 1e-12):
        raise PushforwardError(
            f"A grid goes from start down to end, both in [0, {process.t_max:g}] for process {process.name!r}; "
            f"got {first:g} to {end:g}."
        )
    return first


def solve_for_time(variable: Callable[[Tensor], Tensor], values: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Find the times in `[low, high]` where an increasing function has `values`, to float64 rounding.

    As bisection does, but by parts of a sixteenth: the function costs as much for a few times as for many.
    """
    below, above = low.expand_as(values), high.expand_as(values)
    parts = (torch.arange(17, device="cpu") / 16).view(-1, *[1] * values.ndim)
    for _ in range(15):
        at = torch.lerp(below, above, parts.to(below))
        earlier = (variable(at[1:-1]) < values).sum(0, keepdim=True)
        below, above = (at.gather(0, earlier + end)[0] for end in (0, 1))
    return 0.5 * (below + above)


def spread_times(process: Process, reference: Gaussian, count: int) -> Tensor:
    """Return the midpoints of `count` equal parts of the whitening angle from `t_min` to `t_max`, ascending."""
    low, high = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (process.t_min, process.t_max))
    first, last = whitening_angle(process, torch.stack([low, high]), reference)
    middles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    return solve_for_time(lambda t: whitening_angle(process, t, reference), first + (last - first) * middles, high, low)
