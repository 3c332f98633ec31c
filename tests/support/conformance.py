"""What holds of a pipeline as a model, measured: against the pipeline itself, and against the model's other ways."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

import pushforward as pf
from pushforward.execute import INVERSE, invert, run
from support.families.tiny import Tiny

STEPS = 4
PROMPTS = ["a fox", "boats in a harbour at dawn"]


@dataclass(frozen=True)
class Findings:
    """Errors, relative to the largest value, of one pipeline.

    Args:
        together: how many states are asked about in a call.
        encoder: whether images have states.
        own: of our last state, against the pipeline's with the same first state and method; `None` if its scheduler
            has no method of ours.
        parallel: of states with all steps at once, against one by one.
        batch: of two states in one call, each of a prompt of its own if they are read, against one by one.
        inverse: of the code of a state, or of the state that it leads back to, if it is of several codes.
        gradient: of the derivative along a direction, against a central difference.
        left: whether the pipeline was left as it was found.
    """

    together: str
    encoder: bool
    own: float | None
    parallel: float
    batch: float
    inverse: float
    gradient: float
    left: bool


def first_order(pipe: Any) -> bool:
    """Give a pipeline a scheduler that takes the steps of DDIM, if it takes one; say whether it has one."""
    scheduler = pipe.scheduler
    name = type(scheduler).__name__
    if name == "DDIMScheduler" and scheduler.config.clip_sample:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    if name in ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler"):
        return True
    if name in ("PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler") or (
        name == "DPMSolverMultistepScheduler" and not scheduler.config.use_flow_sigmas
    ):
        settings = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        if "variance_type" in settings:  # pipelines leave a learned one out for schedulers of fixed ones
            settings["variance_type"] = "fixed_small"
        pipe.scheduler = diffusers.DDIMScheduler.from_config({**settings, "clip_sample": False})
        return True
    if name == "EDMDPMSolverMultistepScheduler":
        pipe.scheduler = diffusers.EDMEulerScheduler.from_config(scheduler.config)
        return True
    if name == "UniPCMultistepScheduler" and scheduler.config.use_flow_sigmas:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
        return True
    return False


def examine(tiny: Tiny) -> Findings:
    """Measure a pipeline as a model."""
    pipe, call = tiny.pipe, dict(tiny.call)
    pipe.set_progress_bar_config(disable=True)
    same_method = first_order(pipe)
    draw_modes(pipe)
    before = held(pipe)
    model = pf.from_pipeline(pipe, **call)
    left = held(pipe) == before
    own = of_the_pipeline(pipe, call, model) if same_method else None
    made = model.diffusion("ddim", STEPS, labels=None)
    with torch.no_grad():
        start = made.start(made.draw(2, seed=1).start)
        states = run(made.plan, model.denoiser, start)
        prompts = PROMPTS if model.text else None
        both = run(made.plan, model.given(prompts).denoiser, start)
        alone = [run(made.plan, model.given(prompts and [prompts[k]]).denoiser, start[k : k + 1]) for k in range(2)]
        solved = next(iter(made.run_by(parallel=pf.Parallel(tolerance=1e-5)).solved(2, seed=1)))[1]
    parallel, batch = relative(solved.last, states), relative(both, torch.cat(alone))
    return Findings(
        model.module.rows.together,  # type: ignore[union-attr]
        model.encoder is not None or model.decoder is None,
        own,
        parallel,
        batch,
        inverse_error(model),
        gradient_error(model),
        left,
    )


def of_the_pipeline(pipe: Any, call: dict[str, Any], model: pf.Model) -> float:
    """Compare our last state with the pipeline's own, from the first state that it draws."""
    seen: list[Tensor] = []
    last: list[Tensor] = []
    step, form = pipe.scheduler.step, inspect.signature(pipe.scheduler.step)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(form.bind(*args, **kwargs).arguments["sample"].clone())
        result = step(*args, **kwargs)
        last[:] = [result[0].clone()]
        return result

    watched.__signature__ = form  # type: ignore[attr-defined]
    pipe.scheduler.step = watched
    known = inspect.signature(type(pipe).__call__).parameters
    more = {"strength": 1.0} if "strength" in known else {}
    generator = {"generator": torch.Generator().manual_seed(0)} if "generator" in known else {}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # some draw their conditions without the generator
            pipe(**{**call, **more, **generator, "num_inference_steps": STEPS})
    finally:
        del pipe.scheduler.step
    plan = model.plan("ddim", STEPS)
    with torch.no_grad():
        ours = run(plan, model.denoiser, seen[0][:1].float())
    return relative(ours, last[0][:1].float())


def inverse_error(model: pf.Model, steps: int = 2 * STEPS) -> float:
    """Find the code of a drawn state, and return its error, or that of what it leads back to, if it is another code.

    Some of these networks of noise are no injection at few steps: they have twice as many.
    """
    with torch.no_grad():
        made = model.diffusion("ddim:end=" + repr(model.process.t_min), steps)
        start = made.start(made.draw(1, seed=2).start)
        state = run(made.plan, model.denoiser, start)
        found = invert(made.plan, model.denoiser, state, method=INVERSE)
        error = relative(found.first, start)
        if error > 1e-3:
            error = relative(run(made.plan, model.denoiser, found.first), state)
    return inverse_error(model, 2 * steps) if error > 1e-3 and steps < 4 * STEPS else error


def gradient_error(model: pf.Model) -> float:
    """Compare the network's derivative along a direction with a central difference."""
    generator = torch.Generator().manual_seed(3)
    state, way, cotangent = torch.randn((3, *model.state_shape(1)), generator=generator)
    ask = model.denoiser.at(model.process, torch.tensor([0.6 * model.process.t_max], dtype=torch.float64), state)
    state.requires_grad_()
    value = (ask(0, state) * cotangent).sum()
    slope = float((torch.autograd.grad(value, state)[0] * way).sum())
    h = 2e-3
    with torch.no_grad():
        ahead, behind = ((ask(0, state + s * h * way) * cotangent).sum() for s in (1, -1))
    scale = float(way.norm() * cotangent.norm()) / way.numel() ** 0.5
    return abs(slope - float(ahead - behind) / (2 * h)) / max(abs(slope), scale)


def draw_modes(pipe: Any) -> None:
    """Have a pipeline's encoder draw its mode: pipelines draw first states and conditions in any order."""
    for part in pipe.components.values():
        if (
            callable(getattr(part, "encode", None))
            and callable(getattr(part, "decode", None))
            and hasattr(part, "dtype")
        ):
            part.encode = _of_modes(part.encode)


def _of_modes(encode: Any) -> Any:
    def encoded(*args: Any, **kwargs: Any) -> Any:
        result = encode(*args, **kwargs)
        drawn = getattr(result, "latent_dist", None)
        if drawn is not None and hasattr(drawn, "std"):
            drawn.std = torch.zeros_like(drawn.std)
        return result

    return encoded


def held(pipe: Any) -> list[tuple[str, int]]:
    """What a pipeline and its parts hold, by identity."""
    owners = [pipe, *(part for part in pipe.components.values() if isinstance(part, torch.nn.Module))]
    return [(name, id(value)) for owner in owners for name, value in vars(owner).items() if name[0] != "_"]


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
