"""What images are to be of, as it is told: classes by name or number, or prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import index
from typing import Protocol, SupportsIndex

import torch
from torch import Tensor

from pushforward.errors import PushforwardError

__all__ = ["Condition", "Labels", "class_numbers", "listed"]

# Classes, as numbers `(count,)` or by name and number, or as many prompts; a single one is every image's.
Labels = Tensor | Sequence[str] | Sequence[int] | None
Condition = Labels | SupportsIndex | Iterable[SupportsIndex]  # as arguments; numbers may be of any library


def listed(labels: Condition) -> Labels:
    """Labels as one or more: a single class or prompt as a list of one, and numbers of any library as Python's.

    Raises:
        PushforwardError: they are neither text nor whole numbers.
    """
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        if labels.ndim > 1 and not labels.is_floating_point():  # networks of others may take vectors
            raise PushforwardError(f"Labels are one number for each image; got shape {tuple(labels.shape)}.")
        return labels if labels.ndim else labels[None]
    if isinstance(labels, str):
        return [labels]
    with suppress(TypeError):
        return [index(labels)]  # type: ignore[arg-type]
    try:
        return [one if isinstance(one, str) else index(one) for one in labels]  # type: ignore[union-attr, return-value]
    except TypeError:
        raise PushforwardError(f"Labels are names, prompts or whole numbers; got {labels!r}.") from None


class Labelled(Protocol):
    """A model or generator with classes."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


def class_numbers(model: Labelled, labels: Tensor | Sequence[str] | Sequence[int]) -> Tensor:
    """The numbers of a model's or generator's classes, by their names or numbers.

    Raises:
        PushforwardError: there is no such class.
    """
    if not isinstance(labels, Tensor):
        return torch.tensor([_number(model, one) for one in labels], dtype=torch.long, device="cpu")
    if not bool(((labels >= 0) & (labels < len(model.classes))).all()):
        raise PushforwardError(
            f"Labels of {model.name!r} go from 0 to {len(model.classes) - 1}; got {labels.tolist()}."
        )
    return labels.long()


def _number(model: Labelled, label: str | int) -> int:
    if isinstance(label, str) and label in model.classes:
        return model.classes.index(label)
    number = int(label) if isinstance(label, int) or label.isdecimal() else -1
    if 0 <= number < len(model.classes):
        return number
    raise PushforwardError(f"Model {model.name!r} has no class {label!r}; it has {', '.join(model.classes)}.")
