"""What images are to be of: classes and prompts, one for each image or one for all."""

from __future__ import annotations

from enum import Enum
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.model import Model
from pushforward.model.labels import Condition, Labels, listed
from pushforward.model.prompts import Guided

__all__ = [
    "UNSAID",
    "Condition",
    "Labels",
    "Unsaid",
    "check_told",
    "in_turn",
    "is_guided",
    "listed",
    "named",
    "take_labels",
    "weight_in_effect",
    "weight_of",
]


class Unsaid(Enum):
    """The type of `UNSAID`."""

    UNSAID = "unsaid"


UNSAID = Unsaid.UNSAID  # the default of what may be given and where `None` means something: all stays as it is


def check_told(model: Model) -> None:
    """Raise unless a model can be told what images show, as edits by words tell it."""
    if model.text is None and not model.classes:
        raise PushforwardError(
            f"Model {model.name!r} reads no prompts and has no classes, so it cannot edit by them; translate instead."
        )


def in_turn(model: Model, count: int, first: int = 0) -> Labels:
    """The labels of images that none are given for: the classes, or the captions that a model knows, counted round.

    Args:
        model: the model; of one that has been given a condition, or knows neither, `None`.
        count: how many images.
        first: number of the first image: image i's depends on its number alone.
    """
    if model.conditions:
        return None
    if model.text is not None:
        captions = model.info.get("captions", ())
        return [str(captions[i % len(captions)]) for i in range(first, first + count)] if captions else None
    return torch.arange(first, first + count, device="cpu") % len(model.classes) if model.classes else None


def named(model: Model, labels: Labels) -> list[str]:
    """What each image shows, in words after its number, to stand beside it."""
    numbers = labels.tolist() if isinstance(labels, Tensor) else labels or []
    return [f"{i} {one if isinstance(one, str) else model.classes[one]}" for i, one in enumerate(numbers)]


def take_labels(labels: Labels, some: slice | Tensor) -> Labels:
    """The labels or prompts of some of the images; a single one is every image's."""
    labels = listed(labels)
    if labels is None or len(labels) == 1:
        return labels
    if isinstance(labels, Tensor):
        return labels[some]
    names: list[Any] = list(labels)
    return names[some] if isinstance(some, slice) else [names[i] for i in some.tolist()]


def weight_of(model: Model, guidance: float | None) -> float | None:
    """The weight of guidance that is meant by `None`: 1, or, of a pipeline, its own, which `None` says again."""
    return 1.0 if guidance is None and not isinstance(model.module, Guided) else guidance


def weight_in_effect(model: Model, guidance: float | None) -> float:
    """The weight of guidance that answers are under: the one given, or that of the model as it is."""
    return model.guidance if guidance is None else guidance


def is_guided(model: Model, guidance: float | None) -> bool:
    """Whether answers are under guidance by a weight above 1, see `weight_in_effect`."""
    weight = weight_in_effect(model, guidance)
    return isinstance(weight, Real) and weight > 1  # `Model.given` refuses what is no number
