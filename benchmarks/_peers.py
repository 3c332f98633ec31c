"""The schedulers of `diffusers` on one of our models, whose denoised state is handed over as their prediction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.denoiser import Denoiser
from pushforward.linear import Discrete, Process

TIMESTEPS = 1000


@dataclass(frozen=True)
class Peer:
    """One scheduler with one choice of its options.

    Args:
        scheduler: what the table calls it.
        make: the class.
        options: of the class.
        denoise: whether it ends at the least noise of its table and a last network call denoises that.
        calls: network calls of `n` of its steps.
    """

    scheduler: str
    make: Callable[..., Any]
    options: dict[str, Any]
    denoise: bool = False
    calls: Callable[[int], int] = lambda n: n

    @property
    def label(self) -> str:
        """Its options in words."""
        words = [k.removeprefix("use_") if v is True else str(v) for k, v in self.options.items()]
        return " ".join([*words, *(["then denoise"] if self.denoise else [])])

    def steps(self, nfe: int) -> int:
        """The most steps for `nfe` network calls in all."""
        return max((n for n in range(1, nfe + 1) if self.calls(n) + self.denoise <= nfe), default=0)


def table(process: Process) -> Discrete:
    """The process as the 1000 timesteps that the schedulers need; continuous time is tabulated, up to `t_max`."""
    if isinstance(process, Discrete):
        return process
    times = torch.linspace(0, process.t_max, TIMESTEPS + 1, dtype=torch.float64)[1:]
    times[-1] = min(process.t_max, float(times[-1]))
    return Discrete(tuple((process.snr(times) / (1 + process.snr(times))).tolist()))


def peers() -> Iterator[Peer]:
    """Every scheduler with every sensible choice of options."""
    import diffusers as d

    predictions = ("epsilon", "v_prediction", "sample")
    spacings = ("leading", "linspace", "trailing")
    for prediction, spacing in itertools.product(predictions, spacings):
        options = {"prediction_type": prediction, "timestep_spacing": spacing}
        yield Peer("DDIM", d.DDIMScheduler, {**options, "clip_sample": False})
    grids: list[dict[str, Any]] = [{"timestep_spacing": s} for s in spacings]
    grids += [{f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas")]
    for prediction, grid in itertools.product(predictions, grids):
        options = {"prediction_type": prediction, **grid}
        if prediction != "sample":
            yield Peer("Heun", d.HeunDiscreteScheduler, options, calls=lambda n: 2 * n - 1)
        for order in (2, 3):
            chosen = {"solver_order": order, **options}
            for denoise in (False, True):
                yield Peer(f"DEIS {order}", d.DEISMultistepScheduler, chosen, denoise)
            for final in ("zero", "sigma_min"):
                ends = {**chosen, "final_sigmas_type": final}
                denoise = final == "sigma_min"
                yield Peer(f"DPM-Solver++ {order}M", d.DPMSolverMultistepScheduler, ends, denoise)
                for kind in ("bh1", "bh2"):
                    yield Peer(f"UniPC {order}", d.UniPCMultistepScheduler, {**ends, "solver_type": kind}, denoise)
    for prediction, order, final in itertools.product(predictions, (2, 3), ("zero", "sigma_min")):
        options = {"solver_order": order, "prediction_type": prediction, "use_lu_lambdas": True}
        options["final_sigmas_type"] = final
        yield Peer(f"DPM-Solver++ {order}M", d.DPMSolverMultistepScheduler, options, final == "sigma_min")


class Handed:
    """A denoiser at the timesteps of a table, as a prediction."""

    def __init__(self, process: Process, denoiser: Denoiser, start: Tensor):
        self.table = table(process)
        self._like, self._denoiser, self._process = start, denoiser, process
        self._ratio = process.t_max / self.table.t_max
        self._prepared: dict[float, Callable[[Tensor], Tensor]] = {}

    def denoised(self, u: Tensor, timestep: float) -> Tensor:
        """`E[u_0 | u]`."""
        if timestep not in self._prepared:
            time = torch.tensor([(timestep + 1) / self.table.timesteps * self._ratio], dtype=torch.float64)
            ask = self._denoiser.at(self._process, time, self._like)
            self._prepared[timestep] = lambda v, ask=ask: ask(0, v)
        return self._prepared[timestep](u.to(self._like))

    def prediction(self, kind: str, u: Tensor, timestep: float) -> Tensor:
        """What a network of this kind would say."""
        answer = self.denoised(u, timestep)
        if kind == "sample":
            return answer
        alpha, sigma = self.table.alpha_sigma(torch.tensor((timestep + 1) / self.table.timesteps, dtype=torch.float64))
        noise = (u - float(alpha) * answer) / float(sigma)
        return noise if kind == "epsilon" else float(alpha) * noise - float(sigma) * answer


def run_peer(peer: Peer, handed: Handed, start: Tensor, nfe: int) -> Tensor | None:
    """Its result from `start` with at most `nfe` network calls; `None` if it cannot."""
    steps = peer.steps(nfe)
    if not steps:
        return None
    cumulative = torch.tensor(handed.table.alphas_cumprod, dtype=torch.float64)
    betas = 1 - cumulative / torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    scheduler = peer.make(num_train_timesteps=handed.table.timesteps, trained_betas=betas.numpy(), **peer.options)
    try:
        scheduler.set_timesteps(steps)
        state = start * float(scheduler.init_noise_sigma)  # not 1 for those that work in the variance-exploding form
        calls = 0
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(state, t)
            answer = handed.prediction(peer.options["prediction_type"], scaled, float(t))
            state = scheduler.step(answer, t, state).prev_sample
            calls += 1
    except (ValueError, IndexError, AssertionError, RuntimeError):
        return None
    if calls + peer.denoise > nfe:
        return None
    return handed.denoised(state, 0.0) if peer.denoise else state
