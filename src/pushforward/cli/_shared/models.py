"""Models and plans as commands are told them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pushforward.cli._shared.options import PlaceOptions
from pushforward.cli._shared.report import waiting
from pushforward.errors import PushforwardError
from pushforward.maps.labels import is_guided
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, load
from pushforward.plan import Plan

__all__ = ["check_pictures", "image_size", "make_plan", "open_model", "pick_device"]


def make_plan(model: Model, sampler: SamplerSpec, guidance: float | None = 1.0, *, quiet: bool = False) -> Plan:
    """The plan of a sampler for answers under a weight of guidance, whose making is shown if it takes long."""
    with waiting("making the plan", quiet=quiet):
        return sampler.plan(model, guided=is_guided(model, guidance))


def image_size(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model makes.

    Raises:
        PushforwardError: it makes no images of 1 or 3 channels, or does not say their size.
    """
    check_pictures(model)
    if model.image_shape is None:
        raise PushforwardError(f"Model {model.name!r} makes images of unknown size, so it cannot take images.")
    channels, height, width = model.image_shape
    return channels, height, width


def check_pictures(model: Model) -> None:
    """Raise if a model makes what is no picture, as video, sound or images of other channels, before it does."""
    shape = model.image_shape
    if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise PushforwardError(
            f"Model {model.name!r} makes arrays of shape {shape}, and pictures have 1 or 3 channels, height and width; "
            "call it from Python, where sample() gives the arrays."
        )


def pick_device(name: str) -> str:
    """The device to work on.

    Raises:
        PushforwardError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).add(1).item()  # some have names, and no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise PushforwardError(
            f"Device {name!r} cannot be used here ({(str(error).splitlines() or ['unknown'])[0]}); try --device cpu."
        ) from None
    return name


def open_model(
    source: str,
    place: PlaceOptions,
    negative: str = "",
    *,
    call: Mapping[str, Any] | None = None,
    lora: Sequence[str] = (),
) -> Model:
    """The model that `source` names, where and as `place` says, under a negative prompt; see `load` for call and LoRA.

    Raises:
        PushforwardError: no such model, device, dtype or size, or it takes no prompts, or no such call or LoRA.
    """
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if place.dtype not in kinds:
        raise PushforwardError(f"The dtype is one of {', '.join(kinds)}; got {place.dtype!r}.")
    size = None if place.size is None else _pixels(place.size)
    where = pick_device(place.device)
    model = load(source, device=where, dtype=kinds[place.dtype], size=size, call=call, lora=lora)
    if negative and model.text is None:
        raise PushforwardError(f"Model {model.name!r} reads no prompts; leave --negative out.")
    return replace(model, negative=negative)


def _pixels(text: str) -> int | tuple[int, int]:
    sides = [int(part) if part.isdecimal() else 0 for part in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise PushforwardError(f"--size is a side in pixels, or HEIGHTxWIDTH as 512x768; got {text!r}.")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
