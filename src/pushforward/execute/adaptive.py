r"""The probability flow by a general adaptive ODE solver: the baseline that needs no plan.

    du/dt = on_state(t) u + on_answer(t) D(u, t)

is handed to `scipy.integrate.solve_ivp`, which chooses the steps so that the estimated error of each stays within
`atol + rtol |u|`. One step size serves the whole batch, and every evaluation is one network call for all of it. For
accurate references and comparisons; the plans' solvers, which know the linear part, need far fewer calls.

References:
    Score-Based Generative Modeling through SDEs, Song et al., arXiv 2011.13456, appendix D.4 (RK45 on the flow).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute.sequential import Progress
from pushforward.linear import Process
from pushforward.model.network import Denoiser

Method = Literal["RK23", "RK45", "DOP853"]


def adaptive(
    process: Process,
    denoiser: Denoiser,
    start: Tensor,
    *,
    start_time: float | None = None,
    end: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Method = "RK45",
    callback: Callable[[Progress], None] | None = None,
) -> tuple[Tensor, int]:
    """The flow's state at `end` from the one at `start_time`, and the number of network calls.

    Args:
        process: the diffusion.
        denoiser: the network.
        start: state `(batch, k * channels, *field)`.
        start_time: where `start` lives; `t_max` by default.
        end: where to stop, before or after `start_time` but not at 0; `t_min` by default.
        rtol: relative error allowed in a step.
        atol: absolute error allowed in a step.
        method: of `solve_ivp`, explicit.
        callback: told after every network call; how many there will be is not known, so `total` is 0.

    Returns:
        The state, shaped like `start`, and the calls.

    Raises:
        PushforwardError: times or tolerances out of range, an answer that is not finite, or the solver gave up.
    """
    begin = process.t_max if start_time is None else start_time
    stop = process.t_min if end is None else end
    if not (0 < begin <= process.t_max and 0 < stop <= process.t_max):
        msg = (
            f"The flow of process {process.name!r} is followed between times above 0 and up to {process.t_max:g}; "
            f"got {begin:g} to {stop:g}. For clean images, stop at t_min = {process.t_min:g} and denoise."
        )
        raise PushforwardError(msg)
    if rtol <= 0 or atol < 0:
        msg = f"The tolerances must be positive; got rtol={rtol:g} and atol={atol:g}."
        raise PushforwardError(msg)
    calls = 0

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        time = torch.tensor([t], dtype=torch.float64)
        u = torch.from_numpy(flat).view(start.shape)
        answer = denoiser.at(process, time, start)(0, u.to(start)).to(u)
        if not bool(answer.isfinite().all()):  # the solver itself would try for ever
            msg = f"The network's answer at t = {t:.4g} is not finite (call {calls}); check the network and the start."
            raise PushforwardError(msg)
        if callback is not None:
            callback(Progress(calls, 0, t, u, answer))
        on_state, on_answer = process.flow(time)
        return (on_state[0](u) + on_answer[0](answer)).flatten().numpy()

    with torch.no_grad():
        flat = start.detach().to("cpu", torch.float64).flatten().numpy()
        solution = solve_ivp(slope, (begin, stop), flat, method=method, rtol=rtol, atol=atol, t_eval=[stop])
    if not solution.success:
        msg = f"{method} gave up on the flow after {calls} network calls ({solution.message}); loosen rtol."
        raise PushforwardError(msg)
    return torch.from_numpy(solution.y[:, -1]).view(start.shape).to(start), calls


@dataclass(frozen=True)
class Adaptive:
    """In the place of a plan: the flow followed to `t_min` with adaptive steps, and the denoised state there.

    Args:
        process: the diffusion.
        tolerance: error allowed in a step, absolute and relative.
    """

    process: Process
    tolerance: float = 1e-5

    @property
    def times(self) -> Tensor:
        """First and last time, `(2,)`."""
        return torch.tensor([self.process.t_max, self.process.t_min], dtype=torch.float64)

    def run(self, denoiser: Denoiser, start: Tensor, callback: Callable[[Progress], None] | None = None) -> Tensor:
        """The clean state that `start` flows to; see `adaptive`."""
        last = self.times[1:]
        state, calls = adaptive(
            self.process, denoiser, start, rtol=self.tolerance, atol=self.tolerance, callback=callback
        )
        answer = denoiser.at(self.process, last, state)(0, state)
        if callback is not None:
            callback(Progress(calls + 1, 0, float(last), state, answer))
        return answer
