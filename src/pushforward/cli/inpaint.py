"""Paint parts of images anew, by a model of what such images are.

Examples are in `pushforward inpaint --help`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.batch import FORMAT, Item, complete, kept_key, list_items, made_of, open_folder
from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import image_size, make_plan, open_model
from pushforward.cli._shared.options import (
    BatchOption,
    ConditionOptions,
    ImageOptions,
    ImagesArgument,
    ModelArgument,
    ModelOptions,
    ReportOptions,
    SamplerOptions,
    ShownSeedOption,
    grouped,
)
from pushforward.data.files import digest
from pushforward.data.inputs import read_file, read_like
from pushforward.data.memory import check_images
from pushforward.data.pictures import compared, from_bytes, read_mask, save_image, sheet
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.guidance.inpaint import inpaint as paint
from pushforward.guidance.inpaint import inpainted
from pushforward.maps.diffusion import Diffusion
from pushforward.model.contents import model_digest

__all__ = ["inpaint"]

_SHOWN = 16  # images of the sheet, at most


@grouped(solver="ddpm", steps=25)
def inpaint(
    model: ModelArgument,
    images: ImagesArgument,
    sampler: SamplerOptions,
    condition: ConditionOptions,
    *,
    mask: Annotated[Path, typer.Option(help="Mask: a picture that is white where images are painted anew.")],
    repeats: Annotated[
        int, typer.Option(help="Take each step this many times; with more, the parts agree better.", min=1)
    ] = 4,
    draws: Annotated[int, typer.Option(help="Draw this many versions of each image.", min=1)] = 1,
    seed: ShownSeedOption = 0,
    batch: BatchOption = 32,
    inputs: ImageOptions,
    out: Annotated[Path, typer.Option(help="Write the results into this folder.")] = Path("inpainted"),
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Paint parts of images anew, by a model of what such images are.

    The other parts stay as they are, to the last bit (RePaint's repeats, DDNM's answers). OUT gets the folder images/,
    and sheet.png with the first images, their known parts, and their draws below. An interrupted run goes on with the
    same command; files that cannot be read are named and left out.

    \b
    pushforward inpaint fashion-vp data.npz --mask lower-half.png --count 8 --draws 4
    pushforward inpaint ./face-model photos/ --mask glasses.png --steps 50 --repeats 10
    """
    check_outputs({"--json": reports.json}, {"--out": out}, inputs=[mask])
    inputs.check(images)
    condition.check()
    network = open_model(model, place, condition.negative, **place.asked)
    guidance, shape = condition.weight(network), image_size(network)
    known = ~read_mask(mask, lambda path: read_like(path, shape, inputs.fit, background="black"))
    spec = sampler.plan_spec(repeats=repeats)
    plan = make_plan(network, spec, guidance, quiet=reports.quiet)
    inpainted(network, torch.zeros(network.shape), known)  # what is wrong is said before all work
    check_images(draws, shape, "draws")
    items = list_items(images, shape, inputs, out)
    labels = condition.labels(network, len(items))
    diffusion = Diffusion(network, plan, parallel=spec.method(plan)).given(labels, guidance)
    settings = {
        "command": "inpaint", "images": [str(path.resolve()) for path in images], "split": inputs.split,
        "model": model, "mask": str(mask.resolve()), "known": digest(known), "sampler": spec.kept, "draws": draws,
        "labels": condition.label, "prompts": condition.prompt, "negative": condition.negative,
        "guidance": guidance, "seed": seed, "fit": inputs.fit, **place.kept,
    }  # fmt: skip
    open_folder(out, settings, items)
    same = made_of(settings, model_digest(network))

    def made(item: Item) -> str:
        return same if labels is None else made_of(settings, same, labels[item.position])

    def work(some: list[Item], values: Tensor, numbers: list[int], keys: list[str]) -> None:
        there = diffusion.some(torch.tensor([item.position for item in some]))
        found = paint(there, values, known, draws=draws, seed=seed, first=numbers, batch=batch)
        for item, drawn, key in zip(some, found, keys, strict=True):
            for path, image in zip(_paths(out, item, draws), drawn, strict=True):
                save_image(sheet(image[None], smallest=0), path, {FORMAT: key})

    def kept(item: Item) -> str | None:
        keys = {kept_key(path) for path in _paths(out, item, draws)}
        return keys.pop() if len(keys) == 1 else None

    outcome = complete(items, kept, work, made, label="inpainting", batch=max(1, batch // draws), quiet=reports.quiet)
    rows = _sheet(items, known, draws, out)
    reports.tell(
        *outcome.lines,
        f"{out}: {many(len(rows), 'image')}, {draws} of each, {plan.calls} per draw, {outcome.seconds:.1f} s",
    )
    reports.write({
        **settings, "count": len(rows), "done_before": outcome.before, "seconds": outcome.seconds, "nfe": plan.nfe,
        "painted": float((~known).double().mean()), "notes": outcome.lines, "skipped": outcome.skipped, "out": out,
        "images": rows,
    })  # fmt: skip


def _paths(out: Path, item: Item, draws: int) -> list[Path]:
    ends = [""] if draws == 1 else [f"-{k}" for k in range(draws)]
    return [out / "images" / f"{item.name}{end}.png" for end in ends]


def _sheet(items: Sequence[Item], known: Tensor, draws: int, out: Path) -> list[dict[str, object]]:
    """Write `sheet.png`: images, what is known of them, and their draws; and name the results."""
    columns: list[Tensor] = []
    rows: list[dict[str, object]] = []
    for item in items:
        paths = _paths(out, item, draws)
        if not paths[0].is_file():
            continue
        rows.append({"name": item.name, "source": item.source, "results": [str(path) for path in paths]})
        if len(columns) < _SHOWN:
            try:
                source = item.read(Counter())
            except PushforwardError:  # it could be read when the results were made
                continue
            drawn = [read_file(path, None, None, Counter()) for path in paths]
            columns.append(torch.stack([source, torch.where(known, source, 127), *drawn]))
    if columns:
        versions = from_bytes(torch.stack(columns, 1))
        names = ["image", "kept (grey: painted)", *(f"draw {k}" for k in range(draws))]
        save_image(compared(list(versions), columns=_SHOWN, names=names), out / "sheet.png")
    return rows
