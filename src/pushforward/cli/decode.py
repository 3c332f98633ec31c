"""Decode a file of codes to images.

Examples are in `pushforward decode --help`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pushforward.cli.common import DeviceOption, JsonOption, QuietOption, decoded, open_model, pick_device, write_json
from pushforward.codes import check_codes, load_codes, plan_of, told
from pushforward.errors import PushforwardError
from pushforward.images import check_suffix, picture_suffixes, save_image, sheet
from pushforward.model import Model
from pushforward.pushforward import Diffusion

__all__ = ["decode"]


def decode(
    codes: Annotated[Path, typer.Argument(help="A file that `pushforward encode` or `invert` wrote.")],
    model: Annotated[
        str | None, typer.Option(help="Another model of the same process and shape; its own if not said.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    out: Annotated[Path, typer.Option(help="Picture of all images (.png, .jpg, .webp).")] = Path("decoded.png"),
    each: Annotated[Path | None, typer.Option(help="Folder for every image as a PNG of its own.")] = None,
    device: DeviceOption = "auto",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    r"""Decode a file of codes to images, by the model and the plan they were made with.

    \b
    pushforward invert fashion-vp shoe.png --out codes.safetensors
    pushforward decode codes.safetensors --out again.png --each again/
    """
    check_suffix(out, picture_suffixes())
    code, info = load_codes(codes)
    source, where = model or info["model"], pick_device(device)
    chosen = _loaded(source, where, str(info.get("dtype", "float32")), own=model is None)
    check_codes(code, info, chosen)
    plan = plan_of(chosen.process, info["solver"], info["times"], info["settings"])
    chosen, labels = told(chosen, info)
    began = time.perf_counter()
    images = decoded(Diffusion(chosen, plan, device=where), code, labels, info["guidance"], batch, quiet=quiet)
    seconds = time.perf_counter() - began
    save_image(sheet(images), out)
    if each is not None:
        for i, image in enumerate(images):
            save_image(sheet(image[None], smallest=0), each / f"{i:05d}.png")
    if not quiet and json != "-":
        count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
        typer.echo(f"{out}: {count}, {plan.nfe} network evaluations each, {seconds:.1f} s")
    report = {
        "codes": codes, "model": source, "process": chosen.process.name, "solver": info["solver"],
        "settings": info["settings"], "times": info["times"], "steps": len(plan.steps) - 1, "count": len(images),
        "labels": info["labels"], "guidance": info["guidance"], "nfe": plan.nfe, "seconds": seconds, "out": out,
    }  # fmt: skip
    write_json(report, json)


def _loaded(source: str, device: str, dtype: str, *, own: bool) -> Model:
    try:
        return open_model(source, device, dtype)
    except PushforwardError as error:
        if not own:
            raise
        msg = f"The codes are of model {source!r}, which cannot be loaded; name it with --model. ({error})"
        raise PushforwardError(msg) from None
