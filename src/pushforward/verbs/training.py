"""Models made of images."""

from __future__ import annotations

import os
from collections.abc import Callable

from pushforward.data.datasets import ImageData, load_images
from pushforward.training import trainer
from pushforward.training.trainer import TrainConfig
from pushforward.verbs.model import Model, load

__all__ = ["train"]


def train(
    data: ImageData | str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: TrainConfig,
    *,
    callback: Callable[[int, float, float], None] | None = None,
) -> Model:
    """Train a model, or go on with a training that was interrupted.

        model = pushforward.train("photos/", "my-model", pushforward.TrainConfig(process="flow", minutes=30))

    Args:
        data: images with their classes or captions: a folder, an `.npz` file or the name of a data set, as
            `data.datasets.load_images` reads it, or what that gave.
        out: folder of the model, which is whole from the first checkpoint on.
        config: process, network, when to stop and all else.
        callback: told (step, loss, fraction of the training done) after every step.

    Raises:
        PushforwardError: data that cannot be read, or settings that do not fit them or the training in `out`.
        Interrupted: a signal came, and a checkpoint was saved; it is a `KeyboardInterrupt`.
    """
    images = data if isinstance(data, ImageData) else load_images(data)
    trainer.train(config, images, out, callback=callback)
    return load(os.fspath(out))
