"""Codes on disk.

A file of codes is a safetensors file: the tensors of a `Code`, and in its metadata a JSON header that says which model
and which plan the codes belong to, in full, so that they decode to the same images on another day:

    format      pushforward-code-1
    model       what `load` finds the model by
    process     its configuration
    shape       of the model's images, `(channels, *field)`
    solver, settings, times    of the plan; a `reference` among the settings is the variance of a Gaussian
    labels      a class or prompt an image, or null
    negative    the negative prompt, of a model that is told in words what to draw
    guidance    weight of classifier-free guidance, or null for a pipeline's own
    call, lora  what a pipeline of `diffusers` is called with, as far as JSON can say it, and what is added to it
    digest      of the model, its weights included (see `model.contents`); files of earlier versions lack it

A header may say more; what it says is handed back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from pushforward.data.files import check_suffix, load_headed, save_headed
from pushforward.data.schema import check
from pushforward.errors import PushforwardError
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import Unsaid, weight_of
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.model.contents import model_digest
from pushforward.plan.auto import first_rule

__all__ = [
    "FORMAT",
    "SUFFIX",
    "check_codes",
    "decoder_of",
    "full_name",
    "header",
    "load_codes",
    "save_codes",
]

FORMAT, SUFFIX = "pushforward-code-1", ".safetensors"


@dataclass(frozen=True)
class _Header:
    """What every header has; see `header`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    model: str
    process: dict[str, Any]
    shape: tuple[int, ...]
    solver: str
    settings: dict[str, Any]
    times: tuple[float, ...]
    labels: tuple[int, ...] | tuple[str, ...] | None
    guidance: float | None
    dtype: str = "float32"
    negative: str = ""
    images: tuple[str, ...] = ()


def header(source: str, spec: SamplerSpec, diffusion: Diffusion, count: int) -> dict[str, Any]:
    """What a file of codes says of the map that decodes them; `decoder_of` is the way back.

    Args:
        source: what `load` found the model by; a folder is written with its full path.
        spec: what the map's plan is made from.
        diffusion: the map, bound to the images' classes or prompts and to its guidance.
        count: number of codes.
    """
    model, plan, labels = diffusion.model, diffusion.plan, diffusion.labels
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    if not isinstance(labels, Unsaid | None):
        labels = [*labels] * (count if len(labels) == 1 else 1)
    return {
        "model": full_name(source),
        "process": model.process.config(),
        "shape": list(model.shape),
        "solver": plan.solver,
        "settings": spec.settled(plan),
        "times": plan.times.tolist(),
        "labels": None if isinstance(labels, Unsaid) else labels,
        "guidance": weight_of(model, diffusion.guidance),
        "digest": model_digest(model),
        **({} if model.text is None else {"negative": model.negative}),
        **{key: model.info[key] for key in ("call", "lora") if key in model.info},
    }


def full_name(source: str) -> str:
    """What a model is found by from anywhere: its name, or the full path of its folder."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def decoder_of(info: Mapping[str, Any], model: Model, *, device: torch.device | str | None = None) -> Diffusion:
    """The map that decodes a header's codes: its plan, its negative prompt, its labels or prompts and its guidance.

    Args:
        info: the header.
        model: that the codes are of, or another of its process and shape (see `check_codes`).
        device: device of the states; by default the network's.

    Raises:
        PushforwardError: no such solver or class, or other arguments that do not fit the model.
    """
    labels = info["labels"]
    if labels is not None and not isinstance(labels[0], str):
        labels = torch.tensor(labels, device="cpu")
    solver, settings, times = info["solver"], info["settings"], info["times"]
    if solver == "auto" and not settings:
        settings = first_rule(times)
    plan = SamplerSpec(solver, settings=settings).at(model, times)
    told = replace(model, negative=str(info.get("negative", model.negative)))
    return Diffusion(told, plan, device=device).given(labels, info["guidance"])


def save_codes(path: Path, code: Code, info: Mapping[str, Any]) -> None:
    """Write codes to a file, whole or not at all.

    Args:
        path: ends in `.safetensors`.
        code: of any number of images.
        info: the header, as `header` makes it; more entries are welcome if JSON can say them.

    Raises:
        PushforwardError: another suffix, or a code whose parts do not fit together.
    """
    check_suffix(path, {SUFFIX}, "Codes")
    parts = {name: getattr(code, name) for name in ("start", "noises", "end", "residual")}
    tensors = {name: value for name, value in parts.items() if value is not None}
    head = {"format": FORMAT, **_plain(info)}
    _check(head, tensors, f"The code for {path}")
    save_headed(path, tensors, head)


def load_codes(path: Path) -> tuple[Code, dict[str, Any]]:
    """The codes in a file, on the CPU, and its header.

    Raises:
        PushforwardError: no such file, another kind of file, another format, or a damaged one.
    """
    tensors, head = load_headed(path, FORMAT, "file of codes", "make one with `pushforward encode` or `invert`")
    _check(head, tensors, str(path))
    return Code(**tensors), head


def check_codes(code: Code, info: Mapping[str, Any], model: Model) -> None:
    """Raise unless a model can decode these codes.

    Raises:
        PushforwardError: the model has another process, or images of another shape.
    """
    process = _plain(model.process.config())
    if info["process"] != process:
        first, second = info["process"].get("name"), process["name"]
        which = f"{first!r}, not {second!r}" if first != second else f"{first!r} with other parameters"
        raise PushforwardError(
            f"The codes were made for process {which}; decode them with model {info['model']!r}, or invert again."
        )
    wanted, found = model.state_shape(1)[1:], tuple(code.start.shape[1:])
    if found != wanted:
        raise PushforwardError(
            f"The codes have shape {found} an image; model {model.name!r} needs {wanted}: take the model they are of."
        )


def _check(head: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless the header is complete and the tensors are a `Code` of as many images as it has labels."""
    check(dict(head), _Header, where, "make the codes again")
    start = tensors.get("start")
    shape = () if start is None else tuple(start.shape)
    fits = len(shape) >= 2 and shape[0] > 0 and set(tensors) <= {"start", "noises", "end", "residual"}
    fits = fits and all(t.is_floating_point() and bool(t.isfinite().all()) for t in tensors.values())
    fits = fits and all(tuple(tensors[name].shape) == shape for name in ("end", "residual") if name in tensors)
    fits = fits and ("noises" not in tensors or tuple(tensors["noises"].shape[1:]) == shape)
    if not fits or (head["labels"] is not None and len(head["labels"]) != shape[0]):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()) or "nothing"
        raise PushforwardError(
            f"{where} holds no finite code of one shape with a label each ({shapes}); make the codes again."
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(value))
