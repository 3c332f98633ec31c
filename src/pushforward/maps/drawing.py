"""Images as they are drawn, with what they took: what reports say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.data.words import many
from pushforward.execute import Parallel
from pushforward.execute.host import undisturbed
from pushforward.execute.remainder import LINEAR
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion

__all__ = ["Drawn", "draw"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Images, and what they took.

    Args:
        images: in [-1, 1], `(count, channels, height, width)`, on the CPU.
        rounds: batched network calls one after another; of adaptive steps, which differ by batch, the mean.
        nfe: network evaluations of an image, the mean.
        method: how all steps were taken at once; `None`: one by one.
        residual: with all steps at once, the greatest error estimated in any image.
        diverged: and the number of images that were run step by step because they diverged.
    """

    images: Tensor
    rounds: float
    nfe: float
    method: Parallel | None = None
    residual: float = 0.0
    diverged: int = 0

    @property
    def vague(self) -> bool:
        """Whether images may be further from the sequential ones than the tolerance, as far as can be estimated."""
        return self.method is not None and self.method.rounds is None and not self.residual <= self.method.tolerance

    def __str__(self) -> str:
        """All of it in words, with what should worry a reader."""
        text = f"{many(len(self.images), 'image')}, {many(self.nfe, 'network evaluation')} each"
        if self.method is not None:
            error, few = self.residual, self.method.rounds is not None
            text += f" in {many(self.rounds, 'round')}"
            if not few or error <= LINEAR:
                text += f", error estimated at {error:.1e} at most{' against the same steps one by one' if few else ''}"
            if self.vague:
                text += f" (above the tolerance of {self.method.tolerance:g}, which their precision may not allow; the "
                text += "estimate is on the safe side, often far)"
        elif self.rounds != self.nfe:
            text += f" in {many(self.rounds, 'round')}"
        return text + f" ({self.diverged} diverged and were run step by step)" * bool(self.diverged)


@undisturbed
def draw(
    there: Diffusion | AdaptiveDiffusion,
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
    callback: Callable[[Any], None] = lambda _: None,
) -> Drawn:
    """Draw `count` images as `there.sample` does, and measure what they take.

    Args:
        there: the map.
        count: how many images.
        seed: seed of the codes.
        first: number of the first image.
        batch: images at a time.
        callback: told after every network call (`Progress`) or round (`Round`).
    """
    if isinstance(there, Diffusion) and there.parallel is not None:
        found = list(there.solved(count, seed=seed, first=first, batch=batch, callback=callback))
        solutions = [solution for _, solution in found]
        return Drawn(
            torch.cat([images for images, _ in found]),
            max(solution.rounds for solution in solutions),
            torch.cat([solution.nfe for solution in solutions]).double().mean().item(),
            there.parallel,
            torch.cat([solution.residual for solution in solutions]).max().item(),
            int(torch.cat([solution.diverged for solution in solutions]).sum()),
        )
    calls = batches = evaluations = 0

    def tell(step: Any) -> None:
        nonlocal calls, batches, evaluations
        calls, batches, evaluations = calls + 1, batches + (step.done == 1), evaluations + step.nfe
        callback(step)

    images = there.sample(count, seed=seed, first=first, batch=batch, callback=tell)
    rounds = calls / batches if there.plan is None else there.plan.rounds
    return Drawn(images, rounds, evaluations / count)
