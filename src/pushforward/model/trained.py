"""Models of the networks that this package trains; only here is the scaling of their time and input decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushforward.linear import Gaussian, Process
from pushforward.model.backbone import Backbone
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.tokens import tokens, warn_of_lost_words

__all__ = ["trained"]


def trained(
    module: Backbone,
    process: Process,
    shape: tuple[int, ...],
    *,
    name: str = "model",
    prediction: str = "residual",
    variance: float = 0.25,
    classes: tuple[str, ...] = (),
    info: Mapping[str, Any] | None = None,
    statistics: Gaussian | None = None,
    means: Tensor | None = None,
) -> Model:
    """Make a model of a network that this package trained.

    Args:
        module: the network.
        process: its diffusion.
        shape: shape of its images, `(channels, height, width)`.
        name: name for reports.
        prediction: what the network predicts (see `model.prediction`).
        variance: mean square of the data's values; images are in [-1, 1].
        classes: names of its labels; label `len(classes)` stands for no class.
        info: what else is known.
        statistics: Gaussian fitted to its data.
        means: mean image of each class.
    """
    reference = Gaussian(variance)
    scale = 1.0 if module.config.time_angle else 1000.0 / process.t_max
    network = Network(
        module,
        prediction=prediction,  # type: ignore[arg-type]
        time_scale=scale,
        reference=reference,
        input_reference=reference,
        unconditional=torch.tensor([len(classes)], device="cpu") if classes else None,
    )
    words = module.config.words
    return Model(
        name,
        process,
        network,
        shape,
        reference,
        classes,
        info=dict(info or {}),
        statistics=statistics,
        means=means,
        text=partial(_words, rows=words) if words else None,
    )


def _words(texts: Sequence[str], rows: int) -> tuple[Tensor]:
    for text in texts:
        warn_of_lost_words(text)
    return (tokens(texts, rows),)
