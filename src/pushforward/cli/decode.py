"""Decode a file of codes to images.

Examples are in `pushforward decode --help`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.codes import decoded, open_codes, told
from pushforward.cli._shared.labels import choose_labels
from pushforward.cli._shared.options import (
    BatchOption,
    DeviceOption,
    LabelOption,
    PromptOption,
    ReportOptions,
    grouped,
)
from pushforward.data.files import check_suffix
from pushforward.data.pictures import check_each, picture_suffixes, save_each, save_image
from pushforward.data.words import many
from pushforward.verbs.sheets import titled

__all__ = ["decode"]


@grouped()
def decode(
    codes: Annotated[Path, typer.Argument(help="File that `pushforward encode` or `invert` wrote.")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Decode with another model of the same process and shape; by default the codes' own."),
    ] = None,
    label: LabelOption = None,
    prompt: PromptOption = None,
    batch: BatchOption = 64,
    out: Annotated[Path, typer.Option(help="Write one picture of all images here (.png, .jpg, .webp).")] = Path(
        "decoded.png"
    ),
    each: Annotated[Path | None, typer.Option(help="Write every image as a PNG into this folder, too.")] = None,
    device: DeviceOption = "auto",
    reports: ReportOptions,
) -> None:
    r"""Decode a file of codes to images, by the model and the plan they were made with.

    Under another --label or --prompt than they were made with, they are edits.

    \b
    pushforward invert fashion-vp shoe.png --out codes.safetensors
    pushforward decode codes.safetensors --out again.png --each again/
    pushforward decode codes.safetensors --label "ankle boot" --out boots.png
    """
    check_suffix(out, picture_suffixes())
    check_outputs({"--out": out, "--json": reports.json}, {"--each": each}, inputs=[codes])
    code, info, diffusion = open_codes(codes, model, device)
    if each is not None:
        check_each(each, len(code))
    labels = info["labels"]
    if label or prompt:
        new = choose_labels(diffusion.model, len(code), label, prompt)
        diffusion, labels = diffusion.given(new), new.tolist() if isinstance(new, Tensor) else new
    plan = diffusion.plan
    began = time.perf_counter()
    images = decoded(diffusion, code, batch, quiet=reports.quiet)
    seconds = time.perf_counter() - began
    title = f"{plan.solver}, {plan.calls} per image"
    save_image(titled(images, title, diffusion.model, labels), out)
    if each is not None:
        save_each(images, each)
    count = many(len(images), "image")
    reports.tell(f"{out}: {count}, {plan.calls} each, {seconds:.1f} s")
    reports.write(
        {
            **told(codes, model, info, plan),
            "count": len(images),
            "labels": labels,
            "seconds": seconds,
            "out": out,
        }
    )
