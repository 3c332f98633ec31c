"""Translate images from one model's data to another's, without pairs or training.

Examples are in `pushforward translate --help`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.batch import FORMAT, Item, Outcome, complete, kept_key, list_items, made_of, open_folder
from pushforward.cli._shared.checks import check_outputs, in_vain, tell_in_vain
from pushforward.cli._shared.labels import choose_labels
from pushforward.cli._shared.models import image_size, open_model
from pushforward.cli._shared.options import (
    GuidanceOption,
    ImageOptions,
    ImagesArgument,
    ModelOptions,
    NegativeOption,
    ReportOptions,
    RowsOption,
    SamplerOptions,
    ShownSeedOption,
    grouped,
)
from pushforward.data.inputs import read_file
from pushforward.data.pictures import compared, from_bytes, save_image, sheet
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.evaluation.pairs import decibels
from pushforward.execute import INVERSE
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import Labels, weight_of
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.model.contents import model_digest
from pushforward.translation.translate import Translation, method_named, refined, sampler_for
from pushforward.translation.translate import translate as translate_images
from pushforward.verbs.samplers import diffusion_of

__all__ = ["translate"]

_SHOWN = 64


@grouped(solver="ddim", steps=100)
def translate(
    images: ImagesArgument,
    sampler: SamplerOptions,
    *,
    source: Annotated[str, typer.Option(help="Model of the images' own kind: a name or a folder.")],
    target: Annotated[str | None, typer.Option(help="Model of the kind wanted; by default the source's.")] = None,
    source_label: Annotated[str | None, typer.Option(help="Class of the images, in the source model.")] = None,
    target_label: Annotated[str | None, typer.Option(help="Class wanted, in the target model.")] = None,
    source_prompt: Annotated[
        str | None, typer.Option(help="Say what the images show, to a model that takes text.")
    ] = None,
    target_prompt: Annotated[str | None, typer.Option(help="Say what they are to show.")] = None,
    negative: NegativeOption = "",
    source_guidance: GuidanceOption = None,
    target_guidance: GuidanceOption = None,
    start: Annotated[
        float, typer.Option(help="Take this share of the steps, counted from the image; more changes more.")
    ] = 0.85,
    method: Annotated[
        str,
        typer.Option(
            help="Translate by codes: stochastic (CycleDiffusion), independent (edit-friendly), deterministic (DDIB), "
            "uni-inv or direct; or without: flowedit, flowalign or sdedit."
        ),
    ] = "stochastic",
    refine: Annotated[
        float | None, typer.Option(help="Refine by SDEdit over this share of the steps (eta 1), for more realism.")
    ] = None,
    seed: ShownSeedOption = 0,
    batch: RowsOption = 32,
    inputs: ImageOptions,
    out: Annotated[Path, typer.Option(help="Write the results into this folder.")] = Path("translated"),
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Translate images from one model's data to another's: an image's code under the source, decoded by the target.

    The models may be one network under two labels or prompts, or two networks trained apart. OUT gets the folder
    images/, and sheet.png with the first images over their translations. An interrupted run goes on with the same
    command; files that cannot be read are named and left out.

    \b
    pushforward translate faces/ --source emoji --source-prompt noto --target-prompt twemoji --out twemoji/
    pushforward translate faces/ --source emoji-noto --target emoji-twemoji --start 0.7 --out twemoji/
    pushforward translate shoes.npz --source fashion-vp --source-label sneaker --target-label "ankle boot"
    pushforward translate cats/ --source ./cat-model --target ./dog-model --steps 1000 --refine 0.1
    """
    way = method_named(method)
    check_outputs({"--json": reports.json}, {"--out": out})
    inputs.check(images)
    unread = "sdedit takes nothing from the source model" if way == "sdedit" else None
    tell_in_vain({"source_label": unread, "source_prompt": unread, "source_guidance": unread})
    prompted = source_prompt and target_prompt
    in_vain({"negative": "guidance is 1" if source_guidance == target_guidance == 1 and prompted else None})
    one = open_model(source, place, negative, **place.asked)
    other = one if target is None else open_model(target, place, negative, **place.asked)
    weights = weight_of(one, source_guidance), weight_of(other, target_guidance)
    in_vain({"negative": "guidance is 1" if weights == (1, 1) and prompted else None})
    spec = sampler.plan_spec(start=start)
    ends = tuple(
        diffusion_of(model, sampler_for(model, spec, way), labels=_label(model, label, prompt), guidance=guidance)
        for model, label, prompt, guidance in (
            (one, source_label, source_prompt, weights[0]),
            (other, target_label, target_prompt, weights[1]),
        )
    )
    if target is None and (source_label or "", source_prompt or "") == (target_label or "", target_prompt or ""):
        raise PushforwardError(
            "Source and target are the same; name another --target model, or a --target-label or --target-prompt."
        )
    last = None if refine is None else _refiner(ends[1], spec, refine)
    items = list_items(images, image_size(one), inputs, out)
    settings = {
        "command": "translate", "images": [str(path.resolve()) for path in images], "split": inputs.split,
        "source": source, "target": target or source, "sampler": spec.kept,
        "source_label": source_label, "target_label": target_label, "source_prompt": source_prompt,
        "target_prompt": target_prompt, "source_guidance": weights[0], "target_guidance": weights[1],
        "negative": negative, "method": way, "refine": refine, "seed": seed, "fit": inputs.fit,
        **place.kept,
    }  # fmt: skip
    open_folder(out, settings, items)
    made = made_of(settings, *(model_digest(model) for model in {id(one): one, id(other): other}.values()))
    effort = _Effort()

    def work(some: list[Item], values: Tensor, numbers: list[int], keys: list[str]) -> None:
        found = translate_images(values, *ends, method=way, seed=seed, first=numbers, rows=batch)
        effort.count(found, some, 0 if last is None else last.plan.nfe)
        result = found.images if last is None else refined(found.images, last, seed=seed + 1, first=numbers)
        for item, image, key in zip(some, result, keys, strict=True):
            save_image(sheet(image[None], smallest=0), _path(out, item), {FORMAT: key})

    outcome = complete(items, lambda item: kept_key(_path(out, item)), work, lambda _: made, label="translating",
                       batch=batch, quiet=reports.quiet)  # fmt: skip
    report = {
        **settings, "count": len(outcome.done) + outcome.before, "done_before": outcome.before,
        "seconds": outcome.seconds, **effort.report(outcome), "times": ends[1].times.tolist(),
        "notes": outcome.lines, "skipped": outcome.skipped, "out": out, "images": _sheet(items, out),
    }  # fmt: skip
    reports.tell(*outcome.lines, *effort.lines, _summary(report))
    reports.write(report)


def _label(model: Model, label: str | None, prompt: str | None) -> Labels:
    return choose_labels(model, 1, [label] if label else None, [prompt] if prompt else None)


@dataclass
class _Effort:
    """What the translations of this run took, and the codes that give their images back badly."""

    evaluations: float = 0.0
    rounds: int = 0
    missed: dict[str, float] = field(default_factory=dict)

    def count(self, found: Translation, items: Sequence[Item], more: int) -> None:
        """Add a batch's, each image of which took `more` network calls afterwards."""
        self.evaluations += len(items) * (found.nfe + more)
        self.rounds = max(self.rounds, found.rounds + more)
        if found.residual is not None:
            errors = zip(items, found.residual.tolist(), strict=True)
            self.missed |= {item.name: error for item, error in errors if not error <= INVERSE.tolerance}

    def report(self, outcome: Outcome) -> dict[str, Any]:
        done = len(outcome.done)
        return {"missed": self.missed} | ({"nfe": self.evaluations / done, "rounds": self.rounds} if done else {})

    @property
    def lines(self) -> list[str]:
        if not self.missed:
            return []
        return [
            f"{len(self.missed)} of the codes give their images back under the source to no better than "
            f"{max(self.missed.values()):.1e}, not {INVERSE.tolerance:g} (--json names them); more --steps may help."
        ]


def _refiner(target: Diffusion, sampler: SamplerSpec, share: float) -> Diffusion:
    """The target with the last steps of an ancestral sampler."""
    last = SamplerSpec("ddim", sampler.steps, {"eta": 1.0}, sampler.grid, start=share)
    return replace(target, plan=sampler_for(target.model, last, "sdedit").plan(target.model))


def _path(out: Path, item: Item) -> Path:
    return out / "images" / f"{item.name}.png"


def _sheet(items: Sequence[Item], out: Path) -> list[dict[str, Any]]:
    """Write `sheet.png`, and say for each result how far it is from its source."""
    shown: list[tuple[Tensor, Tensor]] = []
    done: list[Item] = []
    rows = []
    for item in items:
        path = _path(out, item)
        if not path.is_file():
            continue
        result = read_file(path, None, None, Counter())
        try:
            source = item.read(Counter())
        except PushforwardError:  # it could be read when the result was made
            continue
        if len(shown) < _SHOWN:
            done.append(item)
            shown.append((source, result.expand_as(source) if result.shape[0] < source.shape[0] else result))
        if result.shape == source.shape:
            square = (result.double() - source.double()).square().mean()
            psnr = float(decibels(square, 255))
            rows.append({"name": item.name, "source": item.source, "psnr_to_source": psnr})
    if shown:
        pairs = [from_bytes(torch.stack(side)) for side in zip(*shown, strict=True)]
        near = {row["name"]: f"{row['psnr_to_source']:.1f} dB" for row in rows}
        captions = [near.get(item.name, "") for item in done]
        save_image(compared(pairs, names=["source", "translated"], captions=[(), captions]), out / "sheet.png")
    return rows


def _summary(report: dict[str, Any]) -> str:
    text = f"{report['out']}: {many(report['count'], 'image')}"
    if "nfe" in report:
        text += f", {many(report['nfe'], 'network evaluation')} each in {many(report['rounds'], 'round')}"
        text += f", {report['seconds']:.1f} s"
    near = [row["psnr_to_source"] for row in report["images"]]
    return text + (f"; psnr to the source {sum(near) / len(near):.1f} dB on average" if near else "")
