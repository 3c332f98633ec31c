"""What is learnt: the images, and what follows from them and the settings before anything is on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.data.datasets import ImageData
from pushforward.data.memory import check_memory
from pushforward.data.pictures import from_bytes
from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Process, fit
from pushforward.model.backbone import Backbone, BackboneConfig, preset
from pushforward.model.model import Model
from pushforward.model.network import is_silent
from pushforward.model.prediction import is_image
from pushforward.model.trained import trained
from pushforward.training.batches import WORDS, check_labels
from pushforward.training.config import TrainConfig
from pushforward.training.targets import TargetTable

__all__ = ["Problem"]

MOST = 8192  # images that statistics are of


@dataclass(frozen=True, eq=False)
class Problem:
    """What is learnt, and by what network.

    Args:
        config: how to train.
        data: the images.
        process: the diffusion.
        reference: Gaussian that predictions are relative to.
        statistics: Gaussian of the images, or `None` for one image.
        means: means of the classes, `(classes, channels, height, width)`, or `None`.
        architecture: architecture of the network.
        table: of states and targets, on the CPU.
    """

    config: TrainConfig
    data: ImageData
    process: Process
    reference: Gaussian
    statistics: Gaussian | None
    means: Tensor | None
    architecture: BackboneConfig
    table: TargetTable

    @classmethod
    def of(cls, config: TrainConfig, data: ImageData) -> Problem:
        """The problem that the settings make of the images.

        Raises:
            PushforwardError: no images, or labels or settings that do not fit them; too little memory for a batch.
        """
        if len(data) == 0:
            raise PushforwardError("There are no images to train on.")
        check_labels(data)
        channels, height, width = data.images.shape[1:]
        process = config.process_for((height, width))
        last = torch.tensor([process.t_max], dtype=torch.float64, device="cpu")
        if is_silent(process, config.prediction, last):
            raise PushforwardError(
                f"Process {process.name!r} begins to draw where there is no signal, and there the prediction "
                f"{config.prediction!r} says nothing about the image; train with residual, v, velocity or sample."
            )
        scale = config.scale or _root_mean_square(data.images)
        reference = Gaussian(scale**2)
        floats = config.batch * process.blocks * data.images[0].numel()  # as noise, state, input, target, answer
        check_memory(20 * floats, f"A batch of {config.batch:,} images")
        statistics, means = _statistics(data)
        architecture = preset(
            config.network,
            field=(height, width),
            in_channels=process.blocks * channels,
            out_channels=channels if is_image(config.prediction) else process.blocks * channels,
            classes=0 if data.captions else len(data.classes),
            words=WORDS if data.captions else 0,
            time_angle=scale if process.t_max > 1 else 0.0,
        )
        table = TargetTable.make(process, config.prediction, reference)
        return cls(config, data, process, reference, statistics, means, architecture, table)

    @property
    def mean(self) -> Tensor:
        """The mean image, in [-1, 1], `(channels, height, width)`."""
        if self.statistics is None:
            return from_bytes(self.data.images[0])
        return torch.as_tensor(self.statistics.mean, device="cpu").float()

    def model(self, network: Backbone, name: str) -> Model:
        """A model of the network."""
        return trained(
            network,
            self.process,
            tuple(self.data.images.shape[1:]),
            name=name,
            prediction=self.config.prediction,
            variance=float(self.reference.variance),
            classes=() if self.data.captions else self.data.classes,
            statistics=self.statistics,
            means=self.means,
        )


def _root_mean_square(images: Tensor) -> float:
    """Root mean square of the images in [-1, 1], from their histogram: exact, without a copy in floating point."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 127.5 - 1
    return max(math.sqrt(float((counts * values.square()).sum() / counts.sum())), 1e-2)


def _statistics(data: ImageData) -> tuple[Gaussian | None, Tensor | None]:
    """The Gaussian of the images in [-1, 1] and the means of their classes, from at most `MOST` of them, evenly."""
    if len(data) < 2:
        return None, None
    stride = -(-len(data) // MOST)
    images = from_bytes(data.images[::stride])
    gaussian = fit(images)
    if data.labels is None or not data.classes or data.captions:
        return gaussian, None
    labels = data.labels[::stride]
    overall = torch.as_tensor(gaussian.mean, device="cpu").float()
    of = [images[labels == k] for k in range(len(data.classes))]
    return gaussian, torch.stack([some.mean(0) if len(some) else overall for some in of])
