"""Draw images that carry a watermark.

Examples are in `pushforward watermark embed --help`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import check_pictures, make_plan, open_model
from pushforward.cli._shared.options import (
    BatchOption,
    ConditionOptions,
    ModelArgument,
    ModelOptions,
    ReportOptions,
    SamplerOptions,
    SeedOption,
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.cli._shared.watermarks import KeyOption, key_of, message_of
from pushforward.cli._shared.watermarks import shown as worded
from pushforward.data.pictures import check_each, save_each
from pushforward.data.words import many
from pushforward.maps.labels import in_turn
from pushforward.maps.storage import header, save_codes
from pushforward.verbs.watermarks import watermark

__all__ = ["watermark_embed"]


@grouped()
def watermark_embed(
    model: ModelArgument,
    sampler: SamplerOptions,
    condition: ConditionOptions,
    *,
    key: KeyOption,
    message: Annotated[
        str | None,
        typer.Option(
            help="Write this into the images: a text, or hexadecimal digits as 0x1f2e; without it, they show the key "
            "alone (Tree-Ring)."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Draw this many images.", min=1)] = 16,
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    out: Annotated[
        Path, typer.Option(help="Write the images into this folder, each as a PNG, and codes.safetensors.")
    ] = Path("marked"),
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Draw images that carry a keyed watermark: a message in the signs of their codes, or a ring of keyed frequencies.

    Over keys, marked images are distributed exactly as unmarked ones. Who has the model and the key reads the mark
    with `pushforward watermark read`, also after noise, compression or a change of size. Short messages survive more.

    \b
    pushforward watermark embed fashion-vp --key secret.txt --message me --count 64 --out marked
    pushforward watermark embed emoji --key "my own words" --message 0x5eed1234 --solver gddim:order=2 --steps 50
    pushforward watermark embed fashion-vp --key secret.txt              # a ring, without a message
    """
    codes = out / "codes.safetensors"
    check_outputs({"--json": reports.json}, {"--out": out})
    check_each(out, count)
    secret, told = key_of(key), message_of(message)
    condition.check(count)
    network = open_model(model, place, condition.negative, **place.asked)
    check_pictures(network)
    spec = sampler.plan_spec()
    labels = condition.labels(network, count)
    labels = in_turn(network, count) if labels is None else labels
    guidance, began = condition.weight(network), time.perf_counter()
    plan = make_plan(network, spec, guidance, quiet=reports.quiet)
    with progress("sampling", total=plan.nfe * -(-count // batch), unit="call", quiet=reports.quiet) as bar:
        marked = watermark(network, count, key=secret, message=told, solver=plan, labels=labels, guidance=guidance,
                           seed=seed, batch=batch, callback=lambda _: bar.update())  # fmt: skip
    seconds = time.perf_counter() - began
    info = header(model, spec, marked.pushforward, count)
    mark = {"kind": "ring" if told is None else "bits", "message": None if told is None else worded(told)}
    save_each(marked.images, out)
    save_codes(codes, marked.code, {**info, **place.kept, "seed": seed, "watermark": mark})
    carried = "a ring" if told is None else f"{8 * len(told)} bits"
    reports.tell(f"{out}: {many(count, 'image')} with {carried} in each, {plan.calls} each, {seconds:.1f} s")
    reports.write({
        "model": model, "process": network.process.name, "solver": spec.solver, "settings": dict(plan.settings),
        "steps": len(plan.steps) - 1, "count": count, "seed": seed, "labels": info["labels"], "guidance": guidance,
        **mark, "bits": 0 if told is None else 8 * len(told), "nfe": plan.nfe, "seconds": seconds, "out": out,
        "codes": codes,
    })  # fmt: skip
