"""Trainings that take a moment."""

import torch

from pushforward.data.datasets import ImageData

SIDE = 8
# Settings of a training of few steps.
TINY = {
    "network": "tiny", "batch": 8, "precision": "no", "warmup": 2, "ema": 0.9, "learning_rate": 3e-3, "sample_every": 0
}  # fmt: skip


def some_data(count: int = 24, channels: int = 1, classes: int = 2) -> ImageData:
    """Images of one grey level each, darker in the first class."""
    labels = torch.arange(count) % classes
    grey = 60 + 120 * labels + torch.arange(count)
    images = grey.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, SIDE, SIDE).contiguous()
    return ImageData(images, labels, tuple("abcdef"[:classes]))
