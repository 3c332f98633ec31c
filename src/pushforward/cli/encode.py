"""Draw the codes of images under a stochastic plan: DPM-Encoder.

Examples are in `pushforward encode --help`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer

from pushforward.cli._shared.codes import CodesOptions
from pushforward.cli._shared.models import image_size, make_plan, open_model
from pushforward.cli._shared.options import (
    ConditionOptions,
    ImageOptions,
    ImagesArgument,
    ModelArgument,
    ModelOptions,
    ReportOptions,
    RowsOption,
    SamplerOptions,
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.data.inputs import Images
from pushforward.data.words import many
from pushforward.maps.code import Code, batches
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Encoding
from pushforward.maps.normality import statistics
from pushforward.maps.spec import noisy
from pushforward.maps.storage import header

__all__ = ["encode"]

_EXACT = 1e-4  # what rounding leaves, at most


@grouped(solver="ddim", steps=100)
def encode(
    model: ModelArgument,
    images: ImagesArgument,
    sampler: SamplerOptions,
    condition: ConditionOptions,
    *,
    start: Annotated[float, typer.Option(help="Encode this share of the steps, counted from the image.")] = 1.0,
    independent: Annotated[
        bool, typer.Option("--independent", help="Draw the states independently (edit-friendly), not as a path.")
    ] = False,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Call the network step by step: slower, and rounding does not add up."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed the path of states.")] = 0,
    batch: RowsOption = 64,
    inputs: ImageOptions,
    files: CodesOptions,
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Draw a Gaussian code for each image, under any stochastic plan: decoded again, it gives the image.

    A path of noisy states is drawn around the image, then the noises with which the model passes through these states
    are solved for, in one round of network calls. What is written is decoded and compared. Files that cannot be read
    are left out and named. For the one code of a deterministic sampler, see `pushforward invert`.

    \b
    pushforward encode emoji face.png --picture both.png
    pushforward encode fashion-langevin photos/ --solver gddim --noise 0.5 --steps 50 --json report.json
    pushforward encode fashion-vp data.npz --count 16 --solver ddpm --start 0.6 --label sneaker
    pushforward decode codes.safetensors --out again.png
    """
    files.check(images, reports)
    inputs.check(images)
    condition.check()
    network = open_model(model, place, condition.negative, **place.asked)
    spec = noisy(sampler.plan_spec(start=start))
    guidance = condition.weight(network)
    plan = make_plan(network, spec.invertible(network), guidance, quiet=reports.quiet)
    given = inputs.read(images, image_size(network), skip=True)
    labels = condition.labels(network, len(given.values))
    diffusion = Diffusion(network, plan).given(labels, guidance)
    found, seconds = [], time.perf_counter()
    with progress("encoding", total=plan.nfe * len(given.values), unit="state", quiet=reports.quiet) as bar:
        for some in batches(len(given.values), batch):
            found.append(
                diffusion.some(some).encode(given.values[some], seed=seed, first=some.start, independent=independent,
                                            sequential=sequential, rows=batch, callback=bar.update)
            )  # fmt: skip
    seconds = time.perf_counter() - seconds
    info = header(model, spec, diffusion, len(given.values))
    info |= {**place.kept, "images": given.names, "seed": seed}
    code, again = files.write([one.code for one in found], info, given, diffusion, batch=batch, quiet=reports.quiet)
    report = {
        "model": model, "process": network.process.name, **{key: info[key] for key in ("solver", "settings", "times")},
        "steps": len(plan.steps) - 1, "start": spec.start, "labels": info["labels"], "guidance": guidance,
        "independent": independent, "sequential": sequential, "seed": seed, "nfe": plan.nfe, "seconds": seconds,
        **_measured(given, again, found, code), "out": files.out,
    }  # fmt: skip
    reports.tell(*given.notes, *(reason for _, reason in given.skipped))
    reports.tell(_summary(report, latent=network.decoder is not None))
    reports.write(report)


def _measured(given: Images, again: torch.Tensor, found: list[Encoding], code: Code) -> dict[str, Any]:
    """Errors and codes, in total and of each image."""
    errors = (again - given.values).flatten(1).abs().amax(1)
    normality = statistics(code.start)
    each = normality.pop("images")
    noises = code.noises if code.noises is not None else torch.zeros(0)
    return {
        "count": len(again), "rounds": max(one.rounds for one in found),
        "max_abs_error": float(errors.max()), "code": {**normality, "noise_std": float(noises.std())},
        "notes": given.notes, "skipped": dict(given.skipped),
        "images": [
            {"name": name, "max_abs_error": error, "code": one}
            for name, error, one in zip(given.names, errors.tolist(), each, strict=True)
        ],
    }  # fmt: skip


def _summary(report: dict[str, Any], *, latent: bool) -> str:
    count, rounds, error = report["count"], report["rounds"], report["max_abs_error"]
    text = (
        f"{report['out']}: {many(count, 'image')} in {many(rounds, 'round')}, "
        f"{many(report['nfe'], 'network evaluation')} each, {report['seconds']:.1f} s; max abs error {error:.1e}"
    )
    if latent:
        return text + " (what the autoencoder loses included)"
    return text if error <= _EXACT or report["sequential"] else text + ", by rounding: --sequential is exact"
