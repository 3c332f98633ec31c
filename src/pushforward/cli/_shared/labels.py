"""Labels as commands are told them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pushforward.cli._shared.checks import spare
from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.maps.generator import Generator
from pushforward.maps.labels import Labels
from pushforward.model import Model
from pushforward.model.labels import class_numbers

__all__ = ["choose_labels"]


def choose_labels(
    model: Model | Generator, count: int, names: Sequence[str] | None, prompts: Sequence[str] | None = None
) -> Labels:
    """The named classes or the prompts in turn for `count` images; `None` if there are none.

    Raises:
        PushforwardError: the model has no such class, or reads no prompts; or there are more of them than images.
    """
    spare(count, label=names, prompt=prompts)
    check_images(count, model.image_shape or ())
    reads = getattr(model, "text", None) is not None
    if prompts and not reads:
        raise PushforwardError(f"Model {model.name!r} reads no prompts; leave --prompt out.")
    if prompts:
        if names:
            raise PushforwardError("Give labels or prompts, not both.")
        return [prompts[i % len(prompts)] for i in range(count)]
    if not names:
        return None
    if not model.classes:
        instead = "give a --prompt instead" if reads else "leave --label out"
        raise PushforwardError(f"Model {model.name!r} has no classes; {instead}.")
    return class_numbers(model, names)[torch.arange(count) % len(names)]
