"""Codes of images by one pass of a one-step plan from the images to noise, and how near they lead.

See `execute.backward` for the three kinds of pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import run
from pushforward.execute.backward import naive_inversion, predicted_inversion, residual_inversion
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Inversion
from pushforward.plan.gddim import with_residuals

__all__ = ["gaps", "last_states", "passed"]


@torch.no_grad()
def passed(diffusion: Diffusion, images: Tensor, method: Literal["naive", "uni-inv", "direct"]) -> Inversion:
    """The codes that one pass from the images to noise leads to, by one network evaluation per step, or one more."""
    plan, noises = diffusion.plan, None
    clean, denoiser = last_states(diffusion, images), diffusion.told(len(images)).denoiser
    steps = calls = len(plan.steps) - 1
    if method == "naive":
        first = naive_inversion(plan, denoiser, clean)
    elif method == "uni-inv":
        if not float(plan.times[-1]) > 0:
            raise PushforwardError(
                f"The plan ends at time 0, and its last step has no inverse; end it at t_min = {plan.process.t_min:g}."
            )
        first, calls = predicted_inversion(plan, denoiser, clean), steps + 1
    else:
        (first, noises), calls = residual_inversion(plan, denoiser, clean), steps + 1
        diffusion = replace(diffusion, plan=with_residuals(plan))
    code = Code(diffusion.code(first), noises)
    residual = gaps(diffusion, code, clean).flatten(1).abs().amax(1)
    return Inversion(code, diffusion, calls, steps, torch.full((len(images),), calls + steps), residual.cpu())


def last_states(diffusion: Diffusion, images: Tensor) -> Tensor:
    """Images as last states of a plan that takes no noises."""
    plan, model = diffusion.plan, diffusion.model
    if plan.noises:
        raise PushforwardError(
            f"A forward pass needs a deterministic plan, but that of {plan.solver!r} takes noises; begin at random."
        )
    return plan.process.lift(model.latents(images.to(diffusion.start(torch.zeros(model.state_shape(1))))))


def gaps(diffusion: Diffusion, code: Code, clean: Tensor) -> Tensor:
    """How far the images, or latents, that codes decode to are from those of `clean` states."""
    noises = iter(() if code.noises is None else code.noises)
    last = run(diffusion.plan, diffusion.told(len(clean)).denoiser, diffusion.start(code.start),
               noise=lambda _: next(noises))  # fmt: skip
    return diffusion.model.process.image(last - clean)
