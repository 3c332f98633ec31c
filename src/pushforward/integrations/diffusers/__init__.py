"""Our plans as a scheduler of `diffusers`, for a pipeline that you have.

    pipe = StableDiffusionPipeline.from_pretrained(...)
    pipe.scheduler = pushforward.PushforwardScheduler.from_config(pipe.scheduler.config, solver="gddim", order=2)
    pipe(prompt, num_inference_steps=20)

A pipeline calls `step` once for each call of its network. So `timesteps` has an entry for every state that the plan
asks about, several per step for Runge-Kutta methods, and `step` takes the answer there and goes on to the next of them.
What the network predicts, for which noise levels, and where the steps are comes from the configuration of the
scheduler that the pipeline came with (see `model.diffusers.schedules`).

Pipelines that begin in the middle (image to image, inpainting) count steps, so they begin where a step does. Where a
chain is split by its times (a base model and a refiner), the split may lie inside a step, whose earlier answers the
second part does not have; that is refused. Solvers with one call per step can be split anywhere.

`ddim` does what `DDIMScheduler` does where a configuration has `clip_sample` or `thresholding`: the image is bounded
and the noise is not, unless the pipeline says `use_clipped_model_output`. With all other solvers, and wherever
`pushforward.load` reads a model, the noise is what fits the bounded image.

States are `alpha x + sigma noise` of the process. `diffusers`' own schedulers have the same, but for Euler and its kin,
whose state is `x + (sigma / alpha) noise`; pipelines treat both alike.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from pushforward.integrations.diffusers.scheduler import Scheduler
from pushforward.model.diffusers.package import import_diffusers

SAVED_AS = "pushforward.scheduler"  # the module by which saved pipelines know the class

# The class exists once `diffusers` is there, so that importing this module does not import that.
if TYPE_CHECKING:

    class PushforwardScheduler(Scheduler):
        """See `Scheduler`."""
else:

    @cache
    def _made() -> type:
        diffusers = import_diffusers()
        bases = (Scheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin)
        return type("PushforwardScheduler", bases, {"__module__": SAVED_AS, "__doc__": Scheduler.__doc__})

    sys.modules.setdefault(SAVED_AS, sys.modules[__name__])

    def __getattr__(name: str) -> Any:
        if name == "PushforwardScheduler":
            return _made()
        if name == "SchedulerMixin":  # loading a pipeline, diffusers looks here for the base of a class from here
            return import_diffusers().SchedulerMixin
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
