"""What the network is shown in a step: images, what is said of them, times and noise.

Nothing is drawn from a global generator: the images, times, noise and hidden labels of a step are functions of (seed,
step, process). So a run that is killed and resumed gives the weights of a run that was not.

References:
    Ho & Salimans, arXiv 2207.12598, algorithm 1 (hiding labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pushforward.data.datasets import ImageData
from pushforward.data.pictures import from_bytes
from pushforward.errors import PushforwardError
from pushforward.model.tokens import tokens

__all__ = ["WORDS", "Batch", "BatchDraws", "Batches", "check_labels", "examples", "hide_parts"]

WORDS = 4096  # rows of the table of hashed words, of a network that reads captions


@dataclass(frozen=True)
class BatchDraws:
    """What is random in a step, as a function of the seed, the step and the process.

    Args:
        seed: seed of all.
        count: of images in the data.
        batch: images for each step.
    """

    seed: int
    count: int
    batch: int

    def generator(self, *purpose: int) -> torch.Generator:
        """A generator of its own for each purpose."""
        state = np.random.SeedSequence([self.seed, *purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def indices(self, step: int) -> Tensor:
        """The images of a step: every epoch goes through a new permutation of all."""
        positions = torch.arange(step * self.batch, (step + 1) * self.batch, device="cpu")
        epochs = positions // self.count
        return torch.cat([_order(self, int(e))[positions[epochs == e] % self.count] for e in epochs.unique()])


@lru_cache(maxsize=2)
def _order(draws: BatchDraws, epoch: int) -> Tensor:
    return torch.randperm(draws.count, generator=draws.generator(0, epoch), device="cpu")


@dataclass(frozen=True, eq=False)
class Batch:
    """One process's share of a step.

    Args:
        images: clean, in [-1, 1], `(count, channels, height, width)`.
        condition: their labels or words, some hidden, or `None`.
        k: indices of their times, `(count,)`.
        noise: white, of the states' shape.
    """

    images: Tensor
    condition: Tensor | None
    k: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a training, by step.

    Args:
        data: the images.
        draws: what is random.
        blocks: blocks of the process: states have so many times the images' channels.
        times: number of times to choose from.
        label_dropout: share of labels or captions hidden.
        rank: of this process.
        ranks: number of processes.
        device: where batches go.
    """

    data: ImageData
    draws: BatchDraws
    blocks: int
    times: int
    label_dropout: float
    rank: int
    ranks: int
    device: torch.device

    def at(self, step: int) -> Batch:
        """This process's share of a step."""
        chosen = self.draws.indices(step)[self.rank :: self.ranks]
        images = self.images(chosen)
        generator = self.draws.generator(1, step, self.rank)
        k = torch.randint(self.times, (len(chosen),), generator=generator, device="cpu")
        shape = (len(chosen), self.blocks * images.shape[1], *images.shape[2:])
        noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(self.device)
        return Batch(images, self.condition(chosen, generator), k.to(self.device), noise)

    def images(self, chosen: Tensor) -> Tensor:
        """The chosen images, clean, in [-1, 1]."""
        return from_bytes(self.data.images[chosen].to(self.device))

    def condition(self, chosen: Tensor, generator: torch.Generator) -> Tensor | None:
        """What the network is told of the chosen images: their words or labels, some hidden."""
        captions, labels = self.data.captions, self.data.labels
        if captions is None and labels is None:
            return None
        hidden = torch.rand(len(chosen), generator=generator, device="cpu", dtype=torch.float32) < self.label_dropout
        if captions is not None:
            shown = [
                "" if hide else hide_parts(captions[i], generator)
                for i, hide in zip(chosen.tolist(), hidden.tolist(), strict=True)
            ]
            return tokens(shown, WORDS).to(self.device)
        assert labels is not None
        return torch.where(hidden, len(self.data.classes), labels[chosen]).to(self.device)


def hide_parts(caption: str, generator: torch.Generator) -> str:
    """The caption, or in half of the cases what is left of it when a coin is tossed for each of its parts."""
    parts = caption.split(",")
    coins = torch.rand(1 + len(parts), generator=generator, device="cpu", dtype=torch.float32).tolist()
    kept = [part for part, coin in zip(parts, coins[1:], strict=True) if coin < 0.5]
    return caption if coins[0] < 0.5 else ",".join(kept)


def examples(captions: Sequence[str], count: int = 10) -> list[str]:
    """A few captions, evenly from all."""
    return [captions[k * len(captions) // count] for k in range(count)]


def check_labels(data: ImageData) -> None:
    """Raise unless each image has a label, and each label is a class's.

    Raises:
        PushforwardError: it has not.
    """
    labels, classes = data.labels, len(data.classes)
    if labels is None or data.captions is not None:
        return
    fitting = labels.shape == (len(data),) and not labels.is_floating_point()
    if not fitting or int(labels.min()) < 0 or int(labels.max()) >= classes:
        got = f"from {labels.min().item()} to {labels.max().item()}" if labels.numel() else "none"
        raise PushforwardError(
            f"{len(data)} images of {classes} classes need as many labels, whole numbers from 0 to {classes - 1}; got "
            f"{tuple(labels.shape)} of them, {got}."
        )
