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
from pushforward.plan.grid import invert
from pushforward.plan.plan import Builder, Handle, Plan, Terms, total


@dataclass(frozen=True)
class Tableau:
    """Butcher's: stages at `nodes`, from `matrix` (rows of the lower triangle), result by `weights`."""

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
    """A Runge–Kutta method on the probability flow; as many evaluations a step as it has stages.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        tableau: euler, heun, midpoint, ralston, kutta3 or rk4.
        coordinates: `signal` (variable sigma / alpha) or `noise` (variable log-SNR). By default `signal` for scalars,
            and `noise` for the rest, whose signal fades at many rates.
    """
    if tableau not in TABLEAUX:
        msg = f"Unknown Runge–Kutta method {tableau!r}; known are {', '.join(TABLEAUX)}."
        raise PushforwardError(msg)
    rule = TABLEAUX[tableau]
    if coordinates is None:
        coordinates = "signal" if process.blocks == 1 and not process.basis.shape else "noise"
    builder = Builder(process, tableau, grid)

    def variable(t: Tensor) -> Tensor:
        log_snr = process.log_snr(t)
        return -log_snr if coordinates == "noise" else torch.exp(-log_snr)

    def frame(t: Tensor) -> Operator:
        return root(process, t) if coordinates == "noise" else process.transition(t, torch.zeros_like(t))

    def slope(t: Tensor, handle: Handle) -> Terms:
        """`dy / dx` at a node."""
        on_state, on_answer = process.flow(t)
        rate = -process.log_snr_rate(t) * (1 if coordinates == "noise" else variable(t))
        inverse = frame(t).inverse() * (1 / rate)
        if coordinates == "noise":
            return inverse[0] @ on_answer[0] @ handle.answer
        return inverse[0] @ ((on_state - process.drift(t))[0] @ handle.state + on_answer[0] @ handle.answer)

    current = builder.start()
    for t, s in zip(builder.grid[:-1], builder.grid[1:], strict=True):
        ends = variable(torch.stack([t, s]))
        if not bool(ends.isfinite().all()) or float(s) == 0:
            both = torch.stack([t, s])
            psi, factor = process.transition(both, torch.zeros_like(both)), root(process, both)
            ratio = factor[1] @ factor[0].inverse()
            current = builder.node(
                float(s), psi[1] @ current.answer + ratio @ (current.state - psi[0] @ current.answer)
            )
            continue
        h = ends[1] - ends[0]
        at = invert(variable, ends[0] + h * torch.tensor(rule.nodes, dtype=torch.float64), t, s)
        at = torch.where(torch.tensor(rule.nodes) == 0, t, torch.where(torch.tensor(rule.nodes) == 1, s, at))
        start = frame(t[None])[0].inverse() @ current.state
        slopes: list[Terms] = []
        for c, row in zip(at, rule.matrix, strict=True):
            stage = current
            if row:
                moved = total((float(a * h) * k for a, k in zip(row, slopes, strict=True) if a), start)
                stage = builder.node(float(c), frame(c[None])[0] @ moved, stage=True)
            slopes.append(slope(c[None], stage))
        moved = total((float(b * h) * k for b, k in zip(rule.weights, slopes, strict=True) if b), start)
        current = builder.node(float(s), frame(s[None])[0] @ moved)
    return builder.build(coordinates=coordinates)
