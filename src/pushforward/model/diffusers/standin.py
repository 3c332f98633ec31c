"""A stand-in for a scheduler, which takes no steps but hands on what a step would be made of.

It has the scheduler's class and configuration, since pipelines look at both.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.schedules import settings_in_force

__all__ = ["Answer", "Stopped", "recorded", "stand_in"]


class Stopped(BaseException):
    """Ends a call of a pipeline; no handler of errors in it takes this for one."""


@dataclass(frozen=True)
class Answer:
    """What a step of the scheduler would be made of.

    Args:
        state: the state, `(rows, ...)`.
        prediction: what the pipeline predicts for it.
    """

    state: Tensor
    prediction: Tensor


def recorded(
    count: int, step: Callable[[Answer], Tensor] | None
) -> tuple[list[Answer], Callable[[Tensor, Tensor], Tensor]]:
    """Make a list of answers and what takes the steps that fill it; see `Call.run`.

    Args:
        count: how many steps there are.
        step: what takes a step, and keeps what it needs of the answer; by default states stay, and the call ends at the
            last step.
    """
    answers: list[Answer] = []

    def take(prediction: Tensor, state: Tensor) -> Tensor:
        if step is not None:
            return step(Answer(state.clone(), prediction))  # some write the next into it
        answers.append(Answer(state, prediction))
        if len(answers) == count:
            raise Stopped
        return state

    return answers, take


def stand_in(scheduler: Any) -> Any:
    """Make a scheduler of the same class and settings that takes the times and the step that it is given."""
    kind = type(scheduler)
    if not callable(getattr(kind, "step", None)):
        raise PushforwardError(
            f"A {kind.__name__} takes no steps of a single kind, so its predictions cannot be asked for."
        )
    form = inspect.signature(kind.step)

    def prepare(self: Any, times: Sequence[float | Tensor], take: Any, told: Any) -> None:
        self._times, self._take, self._told, self.begun = list(times), take, told, False

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,  # pipelines look for these names
        sigmas: Any = None,
        mu: Any = None,
        **more: Any,
    ) -> None:
        if self._told is not None:
            said = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
            self._told({name: value for name, value in {**said, **more}.items() if value is not None})
        self.timesteps = torch.stack([torch.as_tensor(t, device="cpu").to(device, torch.float32) for t in self._times])
        self.sigmas = _noise_levels(self)
        self.num_inference_steps = len(self._times)
        self._step_index = self._begin_index = None
        self.begun = True

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = form.bind(self, *args, **kwargs).arguments
        following = self._take(given["model_output"], given["sample"])
        if given.get("return_dict", True):
            from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

            return DDIMSchedulerOutput(prev_sample=following, pred_original_sample=following)
        return following, following

    own = {
        "prepare": prepare,
        "set_timesteps": set_timesteps,
        "step": step,
        "scale_model_input": lambda _, sample, *__, **___: sample,
        "add_noise": lambda _, __, noise, *___: noise,
        "scale_noise": lambda _, sample, *args, **kwargs: kwargs.get("noise", args[-1] if args else sample),
        "init_noise_sigma": property(lambda _: 1.0),
        "sigmas": None,  # set above, also where the class works them out
        "order": 1,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    made = copy.copy(scheduler)
    made.__class__ = type(kind.__name__, (kind,), own)
    return made


def _noise_levels(scheduler: Any) -> Tensor:
    """Return the noise levels of a flow, and a 0; those of others, in units that are not ours, are not a number.

    Pipelines that read them make predictions of them; `from_pipeline` refuses what is not finite.
    """
    config, times = settings_in_force(scheduler), scheduler.timesteps
    name = str(config.get("trained") or type(scheduler).__name__)
    levels = times / config.get("num_train_timesteps", 1000)
    if config.get("invert_sigmas"):
        levels = 1 - levels
    elif not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        levels = torch.full_like(levels, torch.nan)
    return torch.cat([levels, torch.zeros(1, device=levels.device)])
