"""Decode the way between two codes, or the middle of many.

Examples are in `pushforward interpolate --help`.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer

from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.codes import decoded, open_codes, told
from pushforward.cli._shared.options import (
    BatchOption,
    DeviceOption,
    ReportOptions,
    grouped,
)
from pushforward.data.files import check_suffix
from pushforward.data.memory import check_images
from pushforward.data.pictures import picture_suffixes, save_image, sheet
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.maps.code import Code
from pushforward.maps.interpolation import average, similarity
from pushforward.maps.interpolation import interpolate as between
from pushforward.maps.storage import SUFFIX, full_name, save_codes
from pushforward.verbs.sheets import walks

__all__ = ["interpolate"]


@grouped()
def interpolate(
    codes: Annotated[Path, typer.Argument(help="File that `pushforward encode` or `invert` wrote.")],
    *,
    between_: Annotated[
        str | None,
        typer.Option(
            "--between", help="Walk from each of these images to the next, such as 0,3,5; by default all of them."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Draw this many images from one to the next, both included.", min=2)] = 8,
    middle: Annotated[bool, typer.Option("--average", help="Draw only the middle of all of them.")] = False,
    model: Annotated[str | None, typer.Option(help="Decode with another model of the same process and shape.")] = None,
    batch: BatchOption = 64,
    out: Annotated[Path, typer.Option(help="Write the picture here, one row from each image to the next.")] = Path(
        "between.png"
    ),
    save: Annotated[Path | None, typer.Option(help="Write the new codes here, too (.safetensors).")] = None,
    device: DeviceOption = "auto",
    reports: ReportOptions,
) -> None:
    r"""Decode the way between two codes on the great circle (slerp), or the middle of many.

    Labels or prompts change halfway.

    \b
    pushforward encode emoji a.png b.png --out codes.safetensors
    pushforward interpolate codes.safetensors --frames 9 --out between.png
    pushforward interpolate codes.safetensors --average --out middle.png
    """
    check_suffix(out, picture_suffixes())
    if save is not None:
        check_suffix(save, {SUFFIX}, "Codes")
    check_outputs({"--out": out, "--save": save, "--json": reports.json}, inputs=[codes])
    in_vain({"frames": "--average makes one image" if middle else None})
    code, info, diffusion = open_codes(codes, model, device)
    numbers = _numbers(between_, len(code), least=1 if middle else 2)
    pairs = [] if middle else list(pairwise(numbers))
    weights = torch.linspace(0, 1, frames, dtype=torch.float64)
    if middle:
        new, own = average(code[numbers]), numbers[:1]
    else:
        check_images(frames * len(pairs), code.start.shape[1:])
        new = Code.cat([between(code[[a] * frames], code[[b] * frames], weights) for a, b in pairs])
        own = [a if weight < 0.5 else b for a, b in pairs for weight in weights.tolist()]
    began = time.perf_counter()
    images = decoded(diffusion.some(torch.tensor(own)), new, batch, quiet=reports.quiet)
    seconds = time.perf_counter() - began
    save_image(sheet(images, columns=1) if middle else walks(images, weights.tolist(), pairs), out)
    told_labels = None if info["labels"] is None else [info["labels"][i] for i in own]
    if save is not None:
        name = full_name(model or info["model"])
        save_codes(save, new, {**info, "model": name, "labels": told_labels, "images": [], "notes": []})
    ends = [(a, b, similarity(code[[a]], code[[b]])) for a, b in pairs]
    report = {
        **told(codes, model, info, diffusion.plan), "images": numbers, "frames": None if middle else frames,
        "average": middle, "count": len(images), "labels": told_labels, "seconds": seconds,
        "similarity": [{"from": a, "to": b, **{k: float(v) for k, v in alike.items()}} for a, b, alike in ends],
        "out": out, "save": save,
    }  # fmt: skip
    for a, b, alike in ends:
        reports.tell(f"codes of images {a} and {b}: cosine similarity {float(alike['code']):.3f}")
    reports.tell(f"{out}: {many(len(images), 'image')}, {diffusion.plan.calls} each, {seconds:.1f} s")
    reports.write(report)


def _numbers(text: str | None, count: int, least: int) -> list[int]:
    """The images that a list names, or all."""
    if count < least:
        raise PushforwardError(
            f"There is no way between fewer than {least} codes, and the file has {many(count, 'code')}; encode or "
            "invert several images into one file."
        )
    try:
        numbers = list(range(count)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) < least or not all(0 <= i < count for i in numbers):
        raise PushforwardError(
            f"--between names {least} or more of the {count} images from 0 to {count - 1}, as 0,1; got {text!r}."
        )
    return numbers
