"""Models, plans and labels as commands are told them, and codes from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pushforward.cli._shared.report import progress, waiting
from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.maps.code import Code
    from pushforward.maps.diffusion import Diffusion
    from pushforward.maps.generator import Generator
    from pushforward.maps.labels import Labels
    from pushforward.maps.spec import SamplerSpec
    from pushforward.model import Model
    from pushforward.plan import Plan

__all__ = [
    "choose_labels",
    "decoded",
    "image_size",
    "make_plan",
    "open_codes",
    "open_model",
    "pick_device",
    "with_negative_prompt",
]  # fmt: skip


def make_plan(model: Model, sampler: SamplerSpec, start: float = 1.0, *, quiet: bool = False) -> Plan:
    """The plan that a command's options describe, of the last `start` of its steps."""
    if start != 1:
        sampler = replace(sampler, start=start)
    with waiting("making the plan", quiet=quiet):
        return sampler.plan(model)


def image_size(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model makes.

    Raises:
        PushforwardError: it makes no images of 1 or 3 channels, or does not say their size.
    """
    shape = model.image_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise PushforwardError(
            f"Model {model.name!r} makes no images of known size ({shape or model.shape}): it cannot take images."
        )
    return shape[0], shape[1], shape[2]


def pick_device(name: str) -> str:
    """The device to work on.

    Raises:
        PushforwardError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).add(1).item()  # some have names, and no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise PushforwardError(
            f"Device {name!r} cannot be used here ({(str(error).splitlines() or ['unknown'])[0]}); try --device cpu."
        ) from None
    return name


def open_model(source: str, device: str, dtype: str = "float32", size: str | None = None) -> Model:
    """A model on a device, its weights of a dtype, for images of a size: `side` or `HEIGHTxWIDTH`, by default its own.

    Raises:
        PushforwardError: no such model, dtype or size.
    """
    import torch

    from pushforward.model import load

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise PushforwardError(f"The dtype is one of {', '.join(kinds)}; got {dtype!r}.")
    return load(source, device=device, dtype=kinds[dtype], size=None if size is None else _pixels(size))


def _pixels(text: str) -> int | tuple[int, int]:
    sides = [int(part) if part.isdecimal() else 0 for part in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise PushforwardError(f"--size is a side in pixels, or HEIGHTxWIDTH as 512x768; got {text!r}.")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def open_codes(path: Path, source: str | None, device: str) -> tuple[Code, dict[str, Any], Diffusion]:
    """Codes of a file, its header, and the map that decodes them.

    Where the model is another than the one they were made with, stderr says so, and the header's `notes`.

    Args:
        path: of the file.
        source: another model than the header's, or `None`.
        device: for the model.

    Raises:
        PushforwardError: the file or the model cannot be read, or they do not fit together.
    """
    from pushforward.maps.storage import check_codes, decoder_of, load_codes, other_weights

    code, info = load_codes(path)
    try:
        model = open_model(source or info["model"], device, str(info.get("dtype", "float32")), info.get("size"))
    except PushforwardError as error:
        if source is not None:
            raise
        raise PushforwardError(
            f"The codes are of model {info['model']!r}, which cannot be loaded; name it with --model. ({error})"
        ) from None
    check_codes(code, info, model)
    note = other_weights(info, model)
    if note is not None:
        typer.echo(f"pushforward: {note}", err=True)
    info["notes"] = [] if note is None else [note]
    return code, info, decoder_of(info, model, device=device)


def choose_labels(model: Model | Generator, names: Sequence[str], count: int, prompts: Sequence[str] = ()) -> Labels:
    """The named classes or the prompts in turn for `count` images; `None` if there are none.

    Raises:
        PushforwardError: the model has no such class, or reads no prompts.
    """
    import torch

    from pushforward.model.model import class_number

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
    numbers = [class_number(model, name) for name in names]
    return torch.tensor(numbers)[torch.arange(count) % len(numbers)]


def with_negative_prompt(model: Model, negative: str) -> Model:
    """The model with a negative prompt.

    Raises:
        PushforwardError: it reads no prompts.
    """
    if negative and model.text is None:
        raise PushforwardError(f"Model {model.name!r} reads no prompts; leave --negative out.")
    return replace(model, negative=negative)


def decoded(diffusion: Diffusion, code: Code, batch: int, *, quiet: bool = False) -> Tensor:
    """The images behind codes, batch after batch, on the CPU, with a progress bar."""
    import torch

    from pushforward.execute import Parallel, Progress, Round

    plan, count = diffusion.plan, len(code)
    total = None if plan.implicit else plan.nfe * -(-count // batch)
    there = diffusion.run_by(parallel=Parallel(tolerance=1e-5) if plan.implicit else None)
    images = []
    with torch.no_grad(), progress("decoding", total=total, unit="call", quiet=quiet) as bar:

        def tell(_: Progress | Round) -> None:
            bar.update()

        for first in range(0, count, batch):
            some = slice(first, first + batch)
            images.append(there.some(some).decode(code[some], callback=tell).float().cpu())
    return torch.cat(images)
