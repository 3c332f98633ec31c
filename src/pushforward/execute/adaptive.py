r"""The probability flow by a general adaptive ODE solver: the baseline that needs no plan.

    du/dt = on_state(t) u + on_answer(t) D(u, t)

is solved by Dormand and Prince's pair of orders 5 and 4, each step of each image as long as keeps its estimated error
within `atol + rtol |u|`: the steps that `scipy.integrate.solve_ivp` would take for that image alone. An image's steps
are its own, and all images that have not arrived are asked about in one network call. For accurate references and
comparisons; the plans' solvers, which know the linear part, need far fewer calls.

References:
    Score-Based Generative Modeling through SDEs, Song et al., arXiv 2011.13456, appendix D.4 (RK45 on the flow);
    Solving Ordinary Differential Equations I, Hairer, Nørsett & Wanner, section II.4 (the choice of steps).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.integrate import RK45
from torch import Tensor

from pushforward.data.words import many
from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.sequential import Progress
from pushforward.execute.system import root_mean_square
from pushforward.linear import Process

_STAGES, _WEIGHTS, _NODES, _ERROR = (torch.from_numpy(x).double() for x in (RK45.A, RK45.B, RK45.C, RK45.E))
_POWER = -1 / (RK45.error_estimator_order + 1)
_SAFETY, _SHORTER, _LONGER = 0.9, 0.2, 10.0  # of a step's length after another, as SciPy has them


def adaptive(
    process: Process,
    denoiser: Denoiser,
    start: Tensor,
    *,
    start_time: float | None = None,
    end: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    callback: Callable[[Progress], None] | None = None,
) -> tuple[Tensor, int]:
    """Return the flow's state at `end` from the one at `start_time`, and the number of network calls.

    What becomes of an image does not depend on the others.

    Args:
        process: the diffusion.
        denoiser: the network.
        start: state `(batch, k * channels, *field)`.
        start_time: where `start` lives; `t_max` by default.
        end: where to stop, before or after `start_time` but not at 0; `t_min` by default.
        rtol: relative error allowed in a step.
        atol: absolute error allowed in a step.
        callback: told after every network call; how many there will be is not known, so `total` is 0.

    Returns:
        The state, shaped like `start`, and the calls, as many as the image needs that needs most.

    Raises:
        PushforwardError: times or tolerances out of range, an answer that is not finite, or steps that vanish.
    """
    begin = process.t_max if start_time is None else start_time
    stop = process.t_min if end is None else end
    if not (0 < begin <= process.t_max and 0 < stop <= process.t_max):
        raise PushforwardError(
            f"The flow of process {process.name!r} is followed between times above 0 and up to {process.t_max:g}; "
            f"got {begin:g} to {stop:g}. For clean images, stop at t_min = {process.t_min:g} and denoise."
        )
    if rtol <= 0 or atol < 0:
        raise PushforwardError(f"The tolerances must be positive; got rtol={rtol:g} and atol={atol:g}.")
    with torch.no_grad():
        flow = _Flow(process, denoiser, start, callback)
        u, on = start.detach().to("cpu", torch.float64, copy=True).flatten(1), 1.0 if stop > begin else -1.0
        some = torch.arange(len(u), device="cpu")
        time = torch.full((len(u),), begin, dtype=torch.float64, device="cpu")
        slope = flow(time, u, some)
        length = _first_length(flow, time, u, slope, on, abs(stop - begin), rtol, atol)
        again = torch.zeros_like(some, dtype=torch.bool)  # whether the step was too long the last time
        while len(some := some[time[some] != stop]):
            t, y, k = time[some], u[some], [slope[some]]
            least = 10 * (torch.nextafter(t, torch.full_like(t, on * torch.inf)) - t).abs()
            if bool((again[some] & (length[some] < least)).any()):
                raise PushforwardError(
                    f"RK45 gave up on the flow after {many(flow.calls, 'network call')}: its steps vanish; loosen rtol."
                )
            ahead = t + on * torch.maximum(length[some], least)
            ahead = torch.where(on * (ahead - stop) > 0, stop, ahead)
            h = (ahead - t)[:, None]
            for weights, node in zip(_STAGES[1:], _NODES[1:], strict=True):
                k.append(flow(t + node * h[:, 0], y + h * _sum(weights, k), some))
            new = y + h * _sum(_WEIGHTS, k)
            k.append(flow(ahead, new, some))
            scale = atol + rtol * torch.maximum(y.abs(), new.abs())
            error = root_mean_square(h * _sum(_ERROR, k) / scale, 1)
            passed = error < 1
            longest = torch.where(passed, torch.where(again[some], torch.ones_like(error), _LONGER), _SAFETY)
            factor = (_SAFETY * error.pow(_POWER)).clamp(_SHORTER, _LONGER)
            length[some], again[some] = h[:, 0].abs() * torch.minimum(factor, longest), ~passed
            done = some[passed]
            time[done], u[done], slope[done] = ahead[passed], new[passed], k[-1][passed]
    return u.view(start.shape).to(start), flow.calls


class _Flow:
    """The slopes of some of the images, each at a time of its own; counts the calls."""

    def __init__(
        self, process: Process, denoiser: Denoiser, start: Tensor, callback: Callable[[Progress], None] | None
    ):
        self._process, self._denoiser, self._start, self._callback = process, denoiser, start, callback
        self._state, self._answer = start.detach().clone(), torch.zeros_like(start)
        self.calls = 0

    def __call__(self, times: Tensor, flat: Tensor, some: Tensor) -> Tensor:
        u, where = flat.view(-1, *self._start.shape[1:]), some.to(self._start.device)
        state = u.to(self._start)
        every = torch.arange(len(u), device="cpu").to(where)
        answer = self._denoiser.at(self._process, times, self._start)(every, state, where)
        self.calls += 1
        bad = (~answer.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:  # no step would be short enough
            raise PushforwardError(
                f"The network's answer at t = {float(times[bad[0]]):.4g} is not finite (call {self.calls}); check the "
                "network and the start."
            )
        if self._callback is not None:
            self._state[where], self._answer[where] = state, answer
            now = float(times.mean())
            self._callback(Progress(self.calls, 0, now, self._state.clone(), self._answer.clone(), len(u)))
        on_state, on_answer = self._process.flow(times)
        return (on_state(u) + on_answer(answer.to(u))).flatten(1)


def _first_length(
    flow: _Flow, time: Tensor, u: Tensor, slope: Tensor, on: float, whole: float, rtol: float, atol: float
) -> Tensor:
    """Return the length of each image's first step."""
    scale = atol + rtol * u.abs()
    d0, d1 = root_mean_square(u / scale, 1), root_mean_square(slope / scale, 1)
    guess = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp_max(whole)
    near = flow(time + on * guess, u + on * guess[:, None] * slope, torch.arange(len(u), device="cpu"))
    greatest = torch.maximum(d1, root_mean_square((near - slope) / scale, 1) / guess)
    length = torch.where(greatest <= 1e-15, (1e-3 * guess).clamp_min(1e-6), (0.01 / greatest).pow(-_POWER))
    return torch.minimum(100 * guess, length).clamp_max(whole)


def _sum(weights: Tensor, parts: list[Tensor]) -> Tensor:
    return torch.stack([float(w) * part for w, part in zip(weights, parts, strict=False)]).sum(0)
