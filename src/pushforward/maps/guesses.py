"""Codes that images may have which were compressed, noised, cropped or shifted, to read watermarks from.

A pass from an image to noise begins as if the image had more noise than it has, at several levels: so what was done to
it leaves more of its code, and the numbers of the code are small where the image says nothing of them. Compression
keeps little of colours, so codes of colour images are guessed without their colour, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from pushforward.execute import Progress
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.passes import last_states, passing
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.plan.grid import solve_for_time

__all__ = ["guesses"]

LEVELS = (0.02, 0.1, 0.3, 0.8)  # noise in parts of the signal, where the pass from an image begins
MOVED = (0.2,)  # the same, where crops or shifts are sought


def guesses(
    there: Diffusion, images: Tensor, *, crops: int = 0, shifts: int = 0,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:  # fmt: skip
    """Codes that images may have, `(views, count, *shape)`: by level, crop, shift and colour.

    Args:
        there: with a plan of as many steps of DDIM as are to be taken; where it ends does not matter.
        images: in [-1, 1], `(count, channels, height, width)`.
        crops: pixels of a side that a crop took at most.
        shifts: pixels by which images were shifted at most.
        callback: told after every network call.
    """
    codes = []
    for level in MOVED if crops or shifts else LEVELS:
        spec = SamplerSpec("ddim", len(there.plan.steps) - 1, end=_time_of(there.model, level))
        there = replace(there, plan=spec.plan(there.model))
        signal = there.model.process.signal(there.plan.times[-1:])[0]
        for view, seen in _views(images, crops, shifts):
            code = passing(there, signal(last_states(there, view)), "uni-inv", callback)[0].start
            codes.append(code if seen is None else code * interpolate(seen, code.shape[2:]).to(code))
    if images.shape[1] == codes[0].shape[1] == 3:
        codes += [code.mean(1, keepdim=True).expand_as(code) for code in codes]
    return torch.stack(codes)


def _views(images: Tensor, crops: int, shifts: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images as they may have been before a crop and a shift, and where they are known, `(1, 1, height, width)`.

    As they are, they are known everywhere, which is `None`.
    """
    if not crops and not shifts:
        yield images, None
        return
    height, width = images.shape[2:]
    for lost in range(crops + 1):
        size = (height - lost, width - round(lost * width / height))
        small = images if not lost else interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        for top in range(-shifts, height - size[0] + shifts + 1):
            for left in range(-shifts, width - size[1] + shifts + 1):
                margins = (left, width - size[1] - left, top, height - size[0] - top)
                yield pad(small, margins, "replicate"), pad(torch.ones(1, 1, *size, device="cpu"), margins)


def _time_of(model: Model, level: float) -> float:
    """The time at which noise is so much of the signal, at the lowest frequency, no earlier than `t_min`."""
    process = model.process
    low, high = (torch.tensor([t], dtype=torch.float64, device="cpu") for t in (process.t_min, process.t_max))
    least = float(process.log_snr(low).neg().exp())
    if level <= least:
        return process.t_min
    wanted = torch.tensor([math.log(level)], dtype=torch.float64, device="cpu")
    return float(solve_for_time(lambda t: -process.log_snr(t), wanted, high, low)[0])
