"""What a network that reads captions knows before it is trained: a small picture foretold from each caption.

A caption that few images have is seen a few hundred times in a training, too seldom for a U-Net to learn from noisy
states what its words look like. Foretelling the image itself, small, by least squares is a far easier task: a minute
of it, and the U-Net begins with the mean of the images that have the words, and learns how they differ from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from pushforward.linear import Process
from pushforward.model.backbone import SKETCH, Backbone
from pushforward.training.batches import Batches
from pushforward.training.stopping import Stop

__all__ = ["fit_sketcher"]

BATCH, PASSES, STEPS = 256, 48, 4000  # images a step; how often each is seen, but for no more steps than these
HIDDEN = 0.2  # share of tokens that are hidden, so that none is relied on


def fit_sketcher(
    network: Backbone, batches: Batches, process: Process, stop: Stop, aside: Callable[[str, float], None]
) -> None:
    """Train the sketcher of a network: the mean square of its sketches less the clean states, small.

    Args:
        network: a network with a sketcher.
        batches: the batches of its training.
        process: the process of its states.
        stop: request that ends the work before its time.
        aside: told what is under way, and the fraction of it that is done.
    """
    draws = replace(batches.draws, batch=BATCH)
    steps = min(STEPS, PASSES * math.ceil(draws.count / BATCH))
    sketcher = network.sketcher.requires_grad_(True)
    optimizer = torch.optim.AdamW(sketcher.parameters(), lr=3e-3, betas=(0.9, 0.99), fused=True)
    rate = LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        if stop.number:
            break
        chosen, generator = draws.indices(step), draws.generator(2, step)
        words = batches.condition(chosen, generator)
        assert words is not None
        kept = torch.rand(words.shape, generator=generator, device="cpu", dtype=torch.float32) >= HIDDEN
        truth = nn.functional.adaptive_avg_pool2d(process.lift(batches.images(chosen)), SKETCH)
        loss = (sketcher(words * kept.to(words.device)) - truth.flatten(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        aside("sketches", (step + 1) / steps)
    sketcher.requires_grad_(False)
