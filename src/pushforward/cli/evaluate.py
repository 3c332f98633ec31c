"""Compare models and samplers by distances of generated images to real ones.

Examples are in `pushforward evaluate --help`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pushforward.cli._shared.batch import read_object
from pushforward.cli._shared.checks import check_outputs, check_split, in_vain
from pushforward.cli._shared.models import pick_device
from pushforward.cli._shared.options import (
    DeviceOption,
    FitOption,
    GuidanceOption,
    PipelineOptions,
    ReportOptions,
    grouped,
)
from pushforward.cli._shared.report import command_line, plain, progress, remark, tell_notes, write_json
from pushforward.data.datasets import load_images
from pushforward.data.files import atomic_path, digest
from pushforward.data.pictures import save_image, sheet
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import Reference
from pushforward.evaluation.plots import distance_curves
from pushforward.evaluation.report import Row, table, too_few
from pushforward.evaluation.runs import Evaluation, Run, first_images, generate
from pushforward.evaluation.samplers import compare, labels_for, prepare
from pushforward.execute.distributed import join
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Model, load
from pushforward.vision.features import FeatureNet, feature_net, published_statistics

__all__ = ["evaluate"]

_DEFAULT = Evaluation()
_SHOWN = 12  # images of each sampler, side by side


@grouped()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Models: names of embedded ones, folders, or hub names of `diffusers`.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Compare with these real images: a folder, an .npz file, or the name of a data set of `datasets`."
        ),
    ],
    *,
    split: Annotated[str, typer.Option(help="Read this split of the data: train, validation or test.")] = "train",
    size: Annotated[
        int | None, typer.Option(help="Resize the data to this side, as in training; by default they stay as they are.")
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="Read the data as grey (1) or colour (3), as in training; by default as they are."),
    ] = None,
    fit: FitOption = "crop",
    solvers: Annotated[
        list[str],
        typer.Option(
            "--solver",
            "--solvers",
            help="Samplers as solver:name=value:name=value, with commas between or repeated; for instance "
            "gddim:order=2, heun:steps=10, rk45:tolerance=1e-3.",
        ),
    ] = ["auto"],  # noqa: B006 - typer copies it
    steps: Annotated[
        str | None,
        typer.Option(help="Take this many steps, where a sampler does not say its own; several with commas between."),
    ] = None,
    nfe: Annotated[
        str | None,
        typer.Option(help="Take as many steps as make no more network evaluations than this, instead of --steps."),
    ] = None,
    count: Annotated[int, typer.Option(help="Draw this many images with each sampler.")] = _DEFAULT.count,
    features: Annotated[
        str,
        typer.Option(
            help="Measure by these networks: effnet, fashion, inception or TorchScript files; several with commas."
        ),
    ] = "effnet",
    statistics: Annotated[
        Path | None,
        typer.Option(help="Compare with published statistics (.npz with mu and sigma) of the one feature network."),
    ] = None,
    converged: Annotated[
        int, typer.Option(help="Compare with a converged run of this many network calls.")
    ] = _DEFAULT.converged,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Seed the codes; image i depends on the seed and i alone.")] = 0,
    batch: Annotated[
        int, typer.Option(help="Process this many images at a time, and keep them in one file.")
    ] = _DEFAULT.batch,
    resamples: Annotated[
        int, typer.Option(help="Draw this many bootstrap samples for the standard errors.")
    ] = _DEFAULT.resamples,
    precision: Annotated[
        str, typer.Option(help="Run the network in mixed precision: no, bf16 or fp16.")
    ] = _DEFAULT.precision,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    out: Annotated[
        Path, typer.Option(help="Write images, table.txt, results.json and distances.png into this folder.")
    ] = Path("evaluation"),
    device: DeviceOption = "auto",
    pipeline: PipelineOptions,
    reports: ReportOptions,
) -> None:
    r"""Compare models and samplers by distances of generated images to real ones.

    All samplers of a model begin at the same codes, and are also compared image by image with the converged result.
    Extrapolated distances need eight times as many images as a feature has numbers (effnet 1280, fashion 64). The same
    command goes on with an interrupted evaluation; under torchrun or accelerate launch, processes share it.

    \b
    pushforward evaluate fashion-vp --data fashion.npz --features fashion --steps 10,20,50
    pushforward evaluate fashion-vp fashion-langevin --data fashion.npz --solvers auto,gddim:order=2,heun --nfe 10,20
    pushforward evaluate ./my-model --data photos/ --features effnet --count 5000 --out evaluation
    pushforward evaluate ./my-model --data photos/ --features inception-2015-12-05.pt --statistics stats.npz
    pushforward evaluate fashion-vp --data fashion.npz --solvers rk45:tolerance=1e-2,ddim:parallel=preconditioned
    """
    check_outputs({"--json": reports.json}, {"--out": out}, inputs=[statistics])
    check_split([data])
    main = join(device)  # under torchrun, every rank works and the first one writes
    where = pick_device(device)
    settings = Evaluation(count, seed, guidance, batch, converged, resamples, precision, compiled)
    wanted = _samplers(solvers, steps, nfe)
    alone = "each solver has its own steps" if all(number is None for _, number, _ in wanted) else None
    in_vain({"steps": alone, "nfe": alone})
    known = _loaded(models, pipeline.asked)
    images = load_images(data, size=size, channels=channels, split=split, fit=fit)
    nets = _nets(features, statistics)
    published = None if statistics is None else {nets[0].name: Reference(*published_statistics(statistics))}
    every = [
        prepare(model, [_fitting(sampler, n, calls, model) for sampler, n, calls in wanted], images, nets, out,
                settings, published=published, device=where)
        for model in known
    ]  # fmt: skip
    if main:
        tell_notes(images, data, quiet=reports.quiet)
    rows: list[Row] = []
    total = sum(len(runs) * (1 + len(nets)) * count for runs in every)
    with progress("evaluating", total=total, unit="image", quiet=reports.quiet or not main) as bar:

        def tell(what: str, done: int) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(done)

        for runs in every:
            generate(runs, device=where, callback=tell)
        for runs in every if main else ():
            rows += compare(runs, images, nets, published=published, device=where, callback=tell)
    if not main:
        return
    report: dict[str, Any] = {
        "command": command_line(),
        "models": models, "reference": str(statistics) if statistics else data,
        "split": None if statistics else split, "reference_count": None if statistics else len(images),
        "labels": [labels_for(model, images, settings)[1] for model in known],
        "notes": images.notes, "skipped": [name for name, _ in images.skipped],
        "features": {net.name: net.digest for net in nets},
        **asdict(settings), "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    _put_aside(out, report)
    _write(out, rows, known, every)
    write_json(report, str(out / "results.json"))
    reports.write(report)
    if reports.json != "-":
        typer.echo(table(rows))
    for sentence in () if reports.quiet else too_few(rows):
        remark(sentence)


def _nets(names: str, statistics: Path | None) -> list[FeatureNet]:
    """The networks to measure by, which have names of their own."""
    nets = [feature_net(name) for name in names.split(",")]
    if len({net.name for net in nets}) < len(nets):
        raise PushforwardError(
            f"Two feature networks have the same name ({', '.join(net.name for net in nets)}); take one of them."
        )
    if statistics is not None and len(nets) != 1:
        raise PushforwardError(f"Published statistics are of one feature network; {len(nets)} are named.")
    return nets


def _put_aside(out: Path, report: dict[str, Any]) -> None:
    """Move what an evaluation with other results has written to a sub-folder; its images stay, to serve again."""
    path = out / "results.json"
    before = read_object(path)
    if not before or {**before, "command": None} == {**plain(report), "command": None}:
        return
    place = out / f"earlier-{digest(path)[:8]}"
    place.mkdir(exist_ok=True)
    for file in (out / "table.txt", out / "distances.png", *out.glob("samplers*.png"), path):
        if file.is_file():
            file.replace(place / file.name)
    remark(f"{out} held results of another evaluation; they are in {place} now.")


def _write(out: Path, rows: list[Row], models: list[Model], every: list[list[Run]]) -> None:
    """The table, the curves, and the first images of every sampler."""
    with atomic_path(out / "table.txt") as temporary:
        temporary.write_text(table(rows) + "\n", encoding="utf-8")
    with atomic_path(out / "distances.png") as temporary:
        distance_curves(rows, temporary)
    told = iter(rows)
    for model, runs in zip(models, every, strict=True):
        names = [f"{row.sampler}, {many(row.nfe, 'evaluation')}" for row in islice(told, len(runs))]
        versions = [first_images(run, _SHOWN) for run in runs]
        name = "samplers.png" if len(models) == 1 else f"samplers-{model.name.replace('/', '-')}.png"
        save_image(sheet(torch.cat(versions), columns=len(versions[0]), rows=names), out / name)


def _loaded(names: list[str], asked: dict[str, Any]) -> list[Model]:
    """The models, with their pipelines' call; those of the same name go by what the user calls them."""
    if len(set(names)) < len(names):
        raise PushforwardError("A model is named twice.")
    models = [load(name, **asked) for name in names]
    own = [model.name for model in models]
    return [replace(m, name=name) if own.count(m.name) > 1 else m for m, name in zip(models, names, strict=True)]


def _samplers(solvers: list[str], steps: str | None, nfe: str | None) -> list[tuple[SamplerSpec, int | None, bool]]:
    """Every solver with every number of steps, or of network evaluations; `None` for one that has steps of its own."""
    if steps is not None and nfe is not None:
        raise PushforwardError("Give --steps or --nfe, not both.")
    numbers = [SamplerSpec.steps] if nfe is steps is None else _numbers(nfe or steps or "")
    result: list[tuple[SamplerSpec, int | None, bool]] = []
    for text in ",".join(solvers).split(","):
        sampler = parse(text)
        own = sampler.adaptive or sampler == parse(text, otherwise={"steps": sampler.steps + 1})
        result += [(sampler, None, False)] if own else [(sampler, n, nfe is not None) for n in numbers]
    return result


def _fitting(sampler: SamplerSpec, number: int | None, calls: bool, model: Model) -> SamplerSpec:
    """The sampler with its steps."""
    if number is None:
        return sampler
    return sampler.calling(model, number) if calls else replace(sampler, steps=number)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise PushforwardError(
            f"Steps are positive whole numbers with commas between, for instance 10,20,50; got {text!r}."
        )
    return numbers
