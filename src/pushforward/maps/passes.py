"""Codes of images by one pass of a one-step plan from the images to noise, and how near they lead.

See `execute.backward` for the three kinds of pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pushforward.denoiser import Watched
from pushforward.errors import PushforwardError
from pushforward.execute import Progress, run
from pushforward.execute.backward import naive_inversion, predicted_inversion, residual_inversion
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Inversion
from pushforward.plan.gddim import with_residuals

__all__ = ["gaps", "last_states", "passed", "passing"]

Pass = Literal["naive", "uni-inv", "direct"]


@torch.no_grad()
def passed(
    diffusion: Diffusion, images: Tensor, method: Pass, callback: Callable[[Progress], None] | None = None
) -> Inversion:
    """The codes that one pass from the images to noise leads to, and how near they lead when they are decoded.

    Args:
        diffusion: with a deterministic plan, of one answer per step.
        images: in [-1, 1], `(count, channels, height, width)`.
        method: see `execute.backward`.
        callback: told after every network call.

    Raises:
        PushforwardError: another plan.
    """
    clean = last_states(diffusion, images)
    code, there, calls = passing(diffusion, clean, method, callback)
    residual = gaps(there, code, clean, callback).flatten(1).abs().amax(1)
    steps = len(diffusion.plan.steps) - 1
    return Inversion(code, there, calls, steps, torch.full((len(images),), calls + steps, device="cpu"), residual.cpu())


@torch.no_grad()
def passing(
    diffusion: Diffusion, clean: Tensor, method: Pass, callback: Callable[[Progress], None] | None = None
) -> tuple[Code, Diffusion, int]:
    """The codes of `passed`, not decoded: the map that would decode them, and the number of network calls made.

    Args:
        diffusion: as of `passed`.
        clean: the images as `last_states`.
        method: as of `passed`.
        callback: as of `passed`.
    """
    plan, noises, denoiser = diffusion.plan, None, diffusion.model_for(len(clean)).denoiser
    calls = len(plan.steps) - (1 if method == "naive" else 0)
    if callback is not None:
        done, tell = itertools.count(1), callback
        denoiser = Watched(denoiser, lambda u, answer, times, k, **_: tell(
            Progress(next(done), calls, float(times[k].mean()), u, answer, len(u))
        ))  # fmt: skip
    if method == "naive":
        first = naive_inversion(plan, denoiser, clean)
    elif method == "uni-inv":
        if not float(plan.times[-1]) > 0:
            raise PushforwardError(
                f"The plan ends at time 0, and its last step has no inverse; end it at t_min = {plan.process.t_min:g}."
            )
        first = predicted_inversion(plan, denoiser, clean)
    else:
        first, noises = residual_inversion(plan, denoiser, clean)
        diffusion = replace(diffusion, plan=with_residuals(plan))
    return Code(diffusion.code(first), noises), diffusion, calls


def last_states(diffusion: Diffusion, images: Tensor) -> Tensor:
    """Images as last states of a plan that takes no noises."""
    if diffusion.noises:
        raise PushforwardError(
            f"A forward pass needs a deterministic plan, but that of {diffusion.plan.solver!r} takes noises; begin at "
            "random."
        )
    return diffusion.clean_states(images)


def gaps(diffusion: Diffusion, code: Code, clean: Tensor, callback: Callable[[Progress], None] | None = None) -> Tensor:
    """How far the images, or latents, that codes decode to are from those of `clean` states."""
    start, denoiser = diffusion.start(code.start), diffusion.model_for(len(clean)).denoiser
    last = run(diffusion.plan, denoiser, start, noise=code.replay(start), callback=callback)
    return diffusion.model.process.image(last - clean)
