"""The steps of a pipeline's own scheduler: where they are, and whether they are what its settings say."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Discrete, Flow, Process
from pushforward.model.diffusers.calls import Call
from pushforward.model.diffusers.schedules import Schedule, settings_in_force
from pushforward.model.prediction import denoising

__all__ = ["Steps", "check_noise", "check_step", "clocked", "flow_times", "grid_of", "settings_of"]

FIRST_ORDER = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler")
SAID = ("sigmas", "timesteps")  # arguments by which a call says where its steps are
CLOCKED = 9  # steps whose times are compared
LOUD = 1.5  # deviation of noise that no draw of unit variance has
CLOSE = 2e-3  # tables are float32 in diffusers, times are rounded to integers


@dataclass(frozen=True, eq=False)
class Steps:
    """`steps -> times`: where the pipeline's own scheduler takes its steps, told what the pipeline tells it."""

    call: Call
    process: Process

    def __call__(self, steps: int) -> Tensor:
        return self.times(self.scheduler(steps))

    def scheduler(self, steps: int) -> Any:
        """Return a copy of the scheduler that has been told what the pipeline tells it for so many steps."""
        told = self.call.asks_for(steps)
        for name in SAID:
            if self.call.arguments.get(name) is not None and len(told.get(name, ())) != steps:
                count = len(told.get(name, ()))
                raise PushforwardError(f"The pipeline's call has {count} {name}; take as many steps, not {steps}.")
        scheduler = copy.deepcopy(self.call.scheduler)
        taken = signature(scheduler.set_timesteps).parameters
        for name in told:
            if name not in taken and not any(p.kind is Parameter.VAR_KEYWORD for p in taken.values()):
                raise PushforwardError(
                    f"{self.call.name} tells its scheduler its {name}, which a {type(scheduler).__name__} does not "
                    "take; give it a scheduler of the kind that it comes with."
                )
        scheduler.set_timesteps(**told)
        return scheduler

    @property
    def usual(self) -> int:
        """How many steps the pipeline's call says to take, else 4."""
        given = [self.call.arguments.get(name) for name in SAID]
        return next((len(times) for times in given if times is not None), 4)

    def times(self, scheduler: Any) -> Tensor:
        """Return the times of the steps that a scheduler has been told, and where the last one ends."""
        if isinstance(self.process, Discrete):
            times = (scheduler.timesteps.double().cpu() + 1) * self.process.t_min
            return torch.cat([times, torch.zeros(1, dtype=torch.float64, device="cpu")])
        return torch.unique_consecutive(flow_times(scheduler))

    def contents(self) -> Any:
        """Return what it is made of, see `model.contents`."""
        return settings_of(self.call.scheduler)


def flow_times(scheduler: Any) -> Tensor:
    """Return a flow's times at the steps that its scheduler has been told, from 1 down, float64."""
    sigmas = torch.as_tensor(scheduler.sigmas, device="cpu").double()
    return 1 - sigmas if settings_in_force(scheduler).get("invert_sigmas") else sigmas


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's settings, without those that its library keeps for itself."""
    return {name: value for name, value in settings_in_force(scheduler).items() if not name.startswith("_")}


def grid_of(call: Call, schedule: Schedule) -> Mapping[str, Any]:
    """Return the model's grid: its scheduler's settings say it, unless it is a flow's or the pipeline has its own."""
    told = set(call.asks_for(4)) - {"num_inference_steps"}
    if schedule.grid and not told and not isinstance(schedule.process, Flow):
        return schedule.grid
    return {"name": "own", "times": Steps(call, schedule.process)}


def clocked(call: Call, schedule: Schedule) -> Schedule:
    """Return the schedule with the clock by which a pipeline tells its network the times of a flow.

    Schedulers shift noise levels, so that more steps are taken where there is more noise. Networks are told the shifted
    ones, unless the pipeline gives its scheduler timesteps beside them, which stay as they are.

    Raises:
        PushforwardError: the network is told neither these times nor those before a shift.
    """
    if not isinstance(schedule.process, Flow) or "clock" in schedule.network:
        return schedule
    arguments = {name: value for name, value in call.arguments.items() if name not in SAID}
    scheduler = Steps(replace(call, arguments=arguments), schedule.process).scheduler(CLOCKED)
    t = flow_times(scheduler)[: len(scheduler.timesteps)]
    scale, offset = schedule.network["time_scale"], schedule.network.get("time_shift", 0.0)
    before = (scheduler.timesteps.double().cpu() - offset) / scale
    if float((before - t).abs().max()) < CLOSE:
        return schedule
    t, before = (x[(t > 0.01) & (t < 0.99)] for x in (t, before))
    found = t * (1 - before) / (before * (1 - t))
    shift = float(found.median())
    if float((found / shift - 1).abs().max()) > CLOSE:
        raise PushforwardError(
            f"{type(call.pipe).__name__} tells its network other times than the noise levels of its "
            f"{type(call.scheduler).__name__}; sample with pushforward.PushforwardScheduler in the pipeline instead."
        )
    return replace(schedule, network={**schedule.network, "clock": partial(_unshifted, shift, scale, offset)})


def _unshifted(shift: float, scale: float, offset: float, times: Tensor) -> Tensor:
    return scale * times / (times + shift * (1 - times)) + offset


def check_noise(call: Call, state: Tensor) -> None:
    """Check that a pipeline's first state is no larger than noise of unit variance.

    Raises:
        PushforwardError: it is, so it does not begin where its scheduler says.
    """
    deviation = float(state.detach().float().abs().median()) / 0.6745  # of a Gaussian; single images in it do not count
    if state.numel() > 32 and deviation > LOUD:
        raise PushforwardError(
            f"{type(call.pipe).__name__} begins with noise of a deviation near {deviation:.1f}, not 1 as its "
            f"{type(call.scheduler).__name__} counts it; sample with pushforward.PushforwardScheduler in the pipeline "
            "instead."
        )


def check_step(call: Call, schedule: Schedule) -> None:
    """Check the times of the pipeline's own scheduler, and a step against ours, where both are DDIM's.

    Raises:
        PushforwardError: the scheduler is not what its settings say.
    """
    process, bounded = schedule.process, {"clip", "threshold"} & set(schedule.network)
    name = type(call.scheduler).__name__
    if not isinstance(process, Discrete | Flow):
        return
    steps = Steps(call, process)
    scheduler = steps.scheduler(steps.usual)
    times = steps.times(scheduler)
    if float(times[0]) < float(times[-2]):
        raise PushforwardError(
            f"The {name} of {call.name} goes from images to noise; give the pipeline one that goes from noise to "
            "images, and find the codes of images by pushforward's own invert."
        )
    if float(times.max()) > process.t_max * (1 + 1e-6):
        raise PushforwardError(
            f"{type(call.pipe).__name__} counts time to {float(times.max()):g}, not to {process.t_max:g} as its {name} "
            "is set to, so it turns predictions around its network; it cannot be asked for single ones."
        )
    if name not in FIRST_ORDER or bounded:
        return
    generator = torch.Generator().manual_seed(0)
    state, prediction = torch.randn((2, 1, 4, 4), generator=generator, dtype=torch.float64, device="cpu")
    theirs = scheduler.step(prediction, scheduler.timesteps[0], state, return_dict=False)[0]
    on_state, on_prediction = denoising(process, schedule.network["prediction"], times[:1])
    where = times[:2]
    if isinstance(process, Discrete):  # theirs go as far as evenly spaced ones, wherever the next one begins
        where = times[:1] - process.t_min * torch.tensor([0, process.timesteps // steps.usual], device="cpu")
    alpha, sigma = process.alpha_sigma(where)
    denoised = on_state[0](state) + on_prediction[0](schedule.gain * prediction)
    ours = alpha[1] * denoised + sigma[1] / sigma[0] * (state - alpha[0] * denoised)
    if float((ours - theirs).abs().max()) > CLOSE * max(float(theirs.abs().max()), 1.0):
        raise PushforwardError(
            f"The {name} of {type(call.pipe).__name__} takes other steps than its settings say; sample with "
            "pushforward.PushforwardScheduler in the pipeline instead."
        )
    if float((where - times[:2]).abs().max()) > 1.5 * process.t_min:  # else they were rounded
        warnings.warn(
            f"The steps of this {name} do not end where its next ones begin, as with linspace spacing; those of ddim "
            "here do, and draw other images.",
            stacklevel=4,
        )
