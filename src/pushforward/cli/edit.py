"""Edit images by two texts: what they show, and what they shall show.

Examples are in `pushforward edit --help`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from pydantic import ConfigDict, Field
from torch import Tensor

from pushforward.cli._shared.batch import Item, list_items, made_of, open_folder, read_object, todo, work_through
from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.models import image_size, open_model, pick_device
from pushforward.cli._shared.options import (
    ImageOptions,
    ImagesArgument,
    ModelOptions,
    NegativeOption,
    ReportOptions,
    SamplerOptions,
    grouped,
)
from pushforward.cli._shared.report import progress, write_json
from pushforward.data.pictures import from_bytes, save_image, sheet, to_bytes
from pushforward.data.schema import read
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.evaluation.pairs import SMALLEST, psnr, ssim
from pushforward.model import Model
from pushforward.model.contents import contents, model_digest
from pushforward.translation.edit import Candidate, Search, edits, likelihood, plans
from pushforward.translation.translate import ONE_CODE, method_named
from pushforward.vision.clip import Clip, load_clip

__all__ = ["edit"]

_SELECT = ("likelihood", "directional-clip", "clip", "none")
_COLUMNS = 8
_TRIALS = 15
_Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Candidate:
    """What is needed of a candidate in `candidates.json`, which says more."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    file: str
    reported: dict[str, float | None]
    selected_by: float | None


@dataclass(frozen=True)
class _Ranking:
    candidates: Annotated[tuple[_Candidate, ...], Field(min_length=1)]
    key: str | None = None


@grouped(solver="ddim", steps=100)
def edit(
    images: ImagesArgument,
    sampler: SamplerOptions,
    *,
    model: Annotated[
        str,
        typer.Option(
            help="Model that takes text or has classes: an embedded one, a folder, or a hub name of `diffusers`."
        ),
    ],
    source: Annotated[
        str, typer.Option("--source", "--source-label", help="Say what the images show, as a prompt or a class.")
    ],
    target: Annotated[
        str, typer.Option("--target", "--target-label", help="Say what they are to show, as a prompt or a class.")
    ],
    negative: NegativeOption = "",
    guidance: Annotated[
        str, typer.Option(help="Try these weights of guidance towards the target, such as 1,2,3.")
    ] = "3",
    source_guidance: Annotated[
        float, typer.Option(help="Set the weight of guidance while encoding; 1 in the paper.")
    ] = 1.0,
    skip: Annotated[
        str, typer.Option(help="Try skipping these shares of the steps, such as .15,.3; skipping less changes more.")
    ] = "0.2",
    trials: Annotated[
        int | None,
        typer.Option(
            help=f"Draw this many codes for each combination; by default {_TRIALS}, or 1 where an image has one code.",
            min=1,
        ),
    ] = None,
    select: Annotated[
        str,
        typer.Option(
            help="Choose the best by likelihood (of the texts, under the model itself), directional-clip or clip (with "
            "--clip), or none (take the first)."
        ),
    ] = "likelihood",
    clip: Annotated[
        str | None, typer.Option(help="Select with this CLIP: a folder or hub name of `transformers`.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Report the scores of this other CLIP; those of the selecting one are too good.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Edit by codes: stochastic, independent (edit-friendly), deterministic, uni-inv or direct; or "
            "without: flowedit, flowalign or sdedit."
        ),
    ] = "stochastic",
    seed: Annotated[int, typer.Option(help="Seed the codes.")] = 0,
    batch: Annotated[
        int, typer.Option(help="Process this many candidates at a time, and states per network call.", min=1)
    ] = 16,
    inputs: ImageOptions,
    out: Annotated[Path, typer.Option(help="Write the results into this folder.")] = Path("edited"),
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Edit images by text or class: the code of an image under one, decoded under another.

    All combinations of guidance, skip and trial are made and kept. OUT gets, for each image, a folder with every
    candidate, best.png, ranking.png (the image, then its edits from the best on) and candidates.json. An interrupted
    run goes on with the same command.

    \b
    pushforward edit shoe.png --model fashion-vp --source-label sneaker --target-label "ankle boot" --trials 8
    pushforward edit face.png --model emoji --source "grinning face" --target "crying face" --trials 8
    pushforward edit cat.jpg --model ./stable-diffusion --source "a photo of a cat" --target "a photo of a dog" \
        --guidance 1,2,3,5 --skip .15,.3,.5 --select directional-clip --clip ./clip-b32 --judge ./clip-l14
    """
    way = method_named(method, "edit")
    check_outputs({"--json": reports.json}, {"--out": out})
    inputs.check(images)
    in_vain({"source_guidance": "sdedit does not encode the image" if way == "sdedit" else None})
    network = open_model(model, place, negative, **place.asked)
    draws = trials or (1 if way in ONE_CODE else _TRIALS)
    search = Search(_numbers(guidance, "guidance"), _numbers(skip, "skip"), draws, source_guidance, way)
    spec = sampler.plan_spec()
    network.given([target], max(search.guidances))  # what is wrong is said before all work
    plans(network, spec, search)
    score, judges = _scorers(network, source, target, select, clip, judge, pick_device(place.device))
    items = list_items(images, image_size(network), inputs, out, folders=True)
    settings = {
        "command": "edit", "images": [str(path.resolve()) for path in images], "split": inputs.split,
        "model": model, "source": source, "target": target, "negative": negative,
        "sampler": spec.kept, "search": asdict(search), "select": select, "clip": clip, "judge": judge,
        "seed": seed, "fit": inputs.fit, **place.kept,
    }  # fmt: skip
    open_folder(out, settings, items)
    networks = contents([score, *judges.values()]) if clip is not None or judge is not None else None
    made = made_of(settings, model_digest(network), networks)
    rows: list[dict[str, Any]] = []
    left, outcome = todo(items, lambda item: _key(out / item.name), lambda _: made)
    bar = progress("editing", total=search.count * len(left), unit="candidate", quiet=reports.quiet)

    def work(some: list[Item], values: Tensor, numbers: list[int], keys: list[str]) -> None:
        for item, image, number, key in zip(some, values, numbers, keys, strict=True):
            found = list(
                edits(network, image, source, target, spec, search, seed=seed + number, batch=batch,
                      callback=bar.update)
            )  # fmt: skip
            _write(out / item.name, image, found, score, judges, batch, key)

    started = time.perf_counter()
    with bar:
        work_through(left, outcome, work, lambda _: made, label="images", batch=1, quiet=True)
    for item in items:
        if _report(out / item.name).is_file():
            rows.append({"name": item.name, "source": item.source, **_best(out / item.name)})
    report = {
        **settings, "count": len(rows), "candidates": search.count, "done_before": outcome.before,
        "seconds": time.perf_counter() - started, "notes": outcome.lines, "skipped": outcome.skipped, "out": out,
        "images": rows,
    }  # fmt: skip
    reports.tell(*outcome.lines)
    for row in rows:
        figures = ", ".join(f"{key} {value:.3g}" for key, value in row["reported"].items() if value is not None)
        reports.tell(f"{out / row['name']}: {many(search.count, 'candidate')}, the best {row['best']}: {figures}")
    reports.write(report)


def _numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise PushforwardError(f"--{name} is one number or several, as 1,2,3; got {text!r}.")
    return numbers


def _scorers(
    model: Model, source: str, target: str, select: str, clip: str | None, judge: str | None, where: str
) -> tuple[_Score | None, dict[str, _Score]]:
    """What selects, and what is reported: functions of the image and its edits, `(count,)`, the higher the better."""
    if select not in _SELECT:
        raise PushforwardError(f"--select is one of {', '.join(_SELECT)}; got {select!r}.")
    if select.endswith("clip") != (clip is not None):
        what = (
            "needs --clip, a folder or hub name of a CLIP model of `transformers`"
            if clip is None
            else ("does not use --clip; leave it out, or take --select directional-clip or clip")
        )
        raise PushforwardError(f"--select {select} {what}.")
    if judge is not None and clip is not None and (judge == clip or Path(judge).resolve() == Path(clip).resolve()):
        raise PushforwardError(
            "--judge must not be the network that selects: the best of many by a score has a high score by luck."
        )

    def directional(network: Clip) -> _Score:
        return lambda image, edited: network.directional(image.expand_as(edited), edited, source, target)

    def similar(network: Clip) -> _Score:
        return lambda _, edited: network.similarity(edited, target)

    reported: dict[str, _Score] = {"psnr": lambda image, edited: psnr(edited, image.expand_as(edited))}
    if min(image_size(model)[1:]) >= SMALLEST:
        reported["ssim"] = lambda image, edited: ssim(edited, image.expand_as(edited))
    if judge is not None:
        judging = load_clip(judge, device=where)
        reported |= {"clip": similar(judging), "directional_clip": directional(judging)}
    if select == "none":
        return None, reported
    if select == "likelihood":
        return lambda _, edited: likelihood(model, edited, source, target, batch=len(edited)), reported
    assert clip is not None
    network = load_clip(clip, device=where)
    return directional(network) if select == "directional-clip" else similar(network), reported


@torch.no_grad()
def _write(
    folder: Path,
    image: Tensor,
    made: list[Candidate],
    score: _Score | None,
    judges: dict[str, _Score],
    batch: int,
    key: str,
) -> None:
    """All candidates with their settings and scores; the report last, so that it stands for a finished image.

    Scores are of the pictures as they are written, in 8 bits.
    """
    edited = from_bytes(to_bytes(torch.stack([one.image for one in made])))

    def values(of: _Score) -> list[float]:
        return torch.cat([of(image[None], part).cpu() for part in edited.split(batch)]).tolist()

    scores = values(score) if score is not None else [0.0] * len(made)
    measured = {name: values(judge) for name, judge in judges.items()}
    order = sorted(range(len(made)), key=lambda k: scores[k] if math.isfinite(scores[k]) else -math.inf, reverse=True)
    for one, picture in zip(made, edited, strict=True):
        save_image(sheet(picture[None], smallest=0), folder / f"{one.name}.png")
    save_image(sheet(edited[order[:1]], smallest=0), folder / "best.png")
    captions = ["the image", *(_caption(made[k], None if score is None else scores[k]) for k in order)]
    save_image(sheet(torch.cat([image[None], edited[order]]), columns=_COLUMNS, captions=captions),
               folder / "ranking.png")  # fmt: skip
    candidates = [
        {
            "file": f"{made[k].name}.png", "skip": made[k].skip, "guidance": made[k].guidance, "trial": made[k].trial,
            "selected_by": None if score is None else scores[k],
            "reported": {name: values[k] for name, values in measured.items()},
        }
        for k in order
    ]  # fmt: skip
    write_json({"candidates": candidates, "key": key}, str(_report(folder)))


def _caption(one: Candidate, score: float | None) -> str:
    """Settings of a candidate, and what it is ranked by."""
    settings = f"skip {one.skip:g}, guidance {one.guidance:g}"
    return settings if score is None else f"{settings}\n{score:.3g}"


def _report(folder: Path) -> Path:
    return folder / "candidates.json"


def _key(folder: Path) -> str | None:
    """What the candidates in a folder were made of; `None` if they are not complete."""
    return read_object(_report(folder)).get("key")


def _best(folder: Path) -> dict[str, Any]:
    """The best candidate of an image, as its report has it."""
    best = read(_report(folder), _Ranking, "remove its folder to have the image edited again").candidates[0]
    return {"best": best.file, "reported": best.reported, "selected_by": best.selected_by}
