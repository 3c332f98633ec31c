r"""Explicit Runge–Kutta methods for the probability flow, in coordinates where its stiff linear part is gone.

With `u = Z_t y` the flow `du/dt = A u + B D` becomes `dy/dt = Z^-1 [(A - Z' Z^-1) u + B D]`. Two choices of Z:

- `signal`: Z = Psi(t, 0), so `dy/dt = Psi^-1 [(A - F) u + B D]`. For scalars y = u / alpha, and with sigma / alpha as
  the variable, `dy / d(sigma / alpha)` is the noise prediction: Heun's method here is EDM's sampler.
- `noise`: Z = R_t of point data, so `dy/dt = R^-1 B D`; with log-SNR as the variable, singlestep DPM-Solver++ like.

A step that ends where the network cannot be asked (no noise) is the exact one for point data, as in EDM.

References:
    Elucidating the Design Space, Karras et al., arXiv 2206.00364, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Operator, Process, root
from pushforward.plan.grid import solve_for_time
from pushforward.plan.plan import Builder, Plan, Terms, total


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: stages at `nodes`, from `matrix` (rows of the lower triangle), result by `weights`."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUX = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "ralston": Tableau((0.0, 2 / 3), ((), (2 / 3,)), (0.25, 0.75)),
    "kutta3": Tableau((0.0, 0.5, 1.0), ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "rk4": Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def runge_kutta(
    process: Process,
    grid: Tensor,
    *,
    tableau: str = "heun",
    coordinates: Literal["signal", "noise"] | None = None,
) -> Plan:
    """Make a Runge–Kutta method on the probability flow, with one network evaluation per stage of each step.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        tableau: `euler`, `heun`, `midpoint`, `ralston`, `kutta3` or `rk4`.
        coordinates: `signal` (variable sigma / alpha) or `noise` (variable log-SNR). By default `signal` for scalars,
            and `noise` for the rest, whose signal fades at many rates.

    Raises:
        PushforwardError: an unknown tableau.
    """
    if tableau not in TABLEAUX:
        raise PushforwardError(f"Unknown Runge–Kutta method {tableau!r}; known are {', '.join(TABLEAUX)}.")
    rule = TABLEAUX[tableau]
    if coordinates is None:
        coordinates = "signal" if process.blocks == 1 and not process.basis.shape else "noise"
    builder = Builder(process, tableau, grid)

    def variable(t: Tensor) -> Tensor:
        log_snr = process.log_snr(t)
        return -log_snr if coordinates == "noise" else torch.exp(-log_snr)

    def frame(t: Tensor) -> Operator:
        return root(process, t) if coordinates == "noise" else process.signal(t)

    current = builder.start()
    times, rule_nodes = builder.grid, torch.tensor(rule.nodes, dtype=torch.float64, device="cpu")
    ends = variable(times)
    regular = ends[:-1].isfinite() & ends[1:].isfinite() & (times[1:] > 0)
    h = torch.where(regular, ends.diff(), 0.0)
    at = solve_for_time(variable, (ends[:-1, None] + h[:, None] * rule_nodes).nan_to_num(), times[0], times[-1])
    at = torch.where(rule_nodes == 0, times[:-1, None], torch.where(rule_nodes == 1, times[1:, None], at))
    at = torch.where(regular[:, None], at, times[:-1, None])  # (steps, stages)
    frames, first, last = frame(at), frame(times[:-1]).inverse(), frame(times[1:])
    on_state, on_answer = process.flow(at)
    inverse = frames.inverse() * (-1 / (process.log_snr_rate(at) * (1 if coordinates == "noise" else variable(at))))
    on_state = inverse @ (on_state - process.drift(at))
    on_answer = inverse @ on_answer
    psi, factor = process.signal(times), root(process, times)
    for k in range(len(times) - 1):
        if not regular[k]:
            ratio = factor[k + 1] @ factor[k].inverse()
            terms = psi[k + 1] @ current.answer + ratio @ (current.state - psi[k] @ current.answer)
            current = builder.node(float(times[k + 1]), terms)
            continue
        start = first[k] @ current.state
        slopes: list[Terms] = []
        for s, row in enumerate(rule.matrix):
            stage = current
            if row:
                moved = total((float(a * h[k]) * slope for a, slope in zip(row, slopes, strict=True) if a), start)
                stage = builder.node(float(at[k, s]), frames[k][s] @ moved, stage=True)
            slope = on_answer[k][s] @ stage.answer
            slopes.append(slope if coordinates == "noise" else slope + on_state[k][s] @ stage.state)
        moved = total((float(b * h[k]) * slope for b, slope in zip(rule.weights, slopes, strict=True) if b), start)
        current = builder.node(float(times[k + 1]), last[k] @ moved)
    return builder.build(coordinates=coordinates)
