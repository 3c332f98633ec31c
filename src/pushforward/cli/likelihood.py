"""Find how probable images are under a model, in nats and bits per dimension.

Examples are in `pushforward likelihood --help`.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import typer

from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.models import image_size, open_model
from pushforward.cli._shared.options import (
    BatchOption,
    ConditionOptions,
    ImageOptions,
    ImagesArgument,
    ModelArgument,
    PlaceOptions,
    ReportOptions,
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.data.inputs import Images
from pushforward.data.words import many
from pushforward.execute.likelihood import STAGES
from pushforward.maps.likelihood import Likelihood
from pushforward.verbs import log_likelihood

__all__ = ["likelihood"]

_SHOWN = 16  # images named one by one


@grouped()
def likelihood(
    model: ModelArgument,
    images: ImagesArgument,
    condition: ConditionOptions,
    *,
    steps: Annotated[
        int, typer.Option(help="Take this many steps along the flow, an even number; six network calls each.", min=2)
    ] = 40,
    draws: Annotated[
        int, typer.Option(help="Draw noise and probes this many times; the standard error needs two.", min=1)
    ] = 2,
    exact: Annotated[
        bool, typer.Option("--exact", help="Sum the divergence over all numbers of an image: for small images.")
    ] = False,
    continuous: Annotated[
        bool,
        typer.Option("--continuous", help="Take images as they are: add no noise of the width of a level of 8 bits."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed the draws; those of image i depend on the seed and i alone.")] = 0,
    batch: BatchOption = 64,
    inputs: ImageOptions,
    place: PlaceOptions,
    reports: ReportOptions,
) -> None:
    r"""Find how probable images are under a model, by the change of variables along its probability flow.

    Nats are the logarithm of the density of continuous images in [-1, 1] with the noise of the time t_min. Bits per
    dimension are those of images of 8 bits, to which noise as wide as a level is added: on average they are at least
    what a code of the images by this model takes. The divergence is estimated by random probes, and the standard error
    is that of the draws; the steps' error is below what half as many steps change, which is given too. A report names
    every image.

    \b
    pushforward likelihood fashion-vp fashion.npz --split test --count 64
    pushforward likelihood fashion-vp shoe.png --label sneaker --draws 8 --json report.json
    pushforward likelihood ./my-model photos/ --steps 20 --draws 4
    """
    check_outputs({"--json": reports.json}, inputs=images)
    inputs.check(images)
    condition.check()
    network = open_model(model, place, condition.negative)
    langevin = network.process.blocks > 1
    random = langevin or not (exact and continuous)
    in_vain({name: None if random else "nothing is random" for name in ("draws", "seed")})
    given = inputs.read(images, image_size(network))
    guidance, labels = condition.weight(network), condition.labels(network, len(given.values))
    total = STAGES * steps * (draws if random else 1) * len(given.values)
    began = time.perf_counter()
    with progress("likelihood", total=total, unit="state", quiet=reports.quiet) as bar:
        found = log_likelihood(network, given.values, steps=steps, draws=draws, exact=exact, dequantise=not continuous,
                               labels=labels, guidance=guidance, seed=seed, batch=batch,
                               callback=bar.update)  # fmt: skip
    report = {
        "model": model, "process": network.process.name, "time": network.process.t_min, "count": len(given.values),
        "labels": condition.label or condition.prompt,
        "guidance": guidance, "steps": steps, "draws": draws if random else 1, "exact": exact,
        "dequantised": not continuous, "bound": not continuous or langevin, "seed": seed,
        "seconds": time.perf_counter() - began, "notes": given.notes, **_measured(given, found),
    }  # fmt: skip
    reports.tell(*given.notes)
    reports.tell(*(f"{one['name']}: {one['bits']:.3f}{_within(one['bits_error'])} bits per dimension"
                   for one in report["images"][:_SHOWN] if len(given.values) > 1), _summary(report))  # fmt: skip
    reports.write(report)


def _measured(given: Images, found: Likelihood) -> dict[str, Any]:
    """Figures of all images and of each; the errors of the average are of the images drawn, and of the draws alone."""
    count, bits = len(given.values), found.bits
    columns = {
        "name": given.names, "nats": found.nats.tolist(), "nats_error": found.error.tolist(), "bits": bits.tolist(),
        "bits_error": found.bits_error.tolist(), "bits_halved": found.bits_halved.tolist(),
    }  # fmt: skip
    return {
        "nats": float(found.nats.mean()), "bits": float(bits.mean()),
        "bits_error": float(bits.var(correction=0) / (count - 1)) ** 0.5 if count > 1 else None,
        "bits_draws_error": float(found.bits_error.square().sum().sqrt()) / count,
        "bits_halved": float(found.bits_halved.mean()), "dimensions": found.dimensions, "nfe": found.nfe,
        "images": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    }  # fmt: skip


def _within(error: float) -> str:
    """The error, if there is one: a single draw tells none."""
    return f" ± {error:.3f}" if math.isfinite(error) else ""


def _summary(report: dict[str, Any]) -> str:
    count = report["count"]
    error = _within(report["bits_error" if count > 1 else "bits_draws_error"])
    bound = "at most " if report["bound"] else ""
    drawn = report["bits_draws_error"]
    draws = f"error of the draws {drawn:.4f} bits; " if math.isfinite(drawn) else ""
    return (
        f"{many(count, 'image')}: {bound}{report['bits']:.3f}{error} bits per dimension, "
        f"{report['nats']:.1f} nats ({draws}half the steps change "
        f"{report['bits_halved']:.4f} bits); {many(report['nfe'], 'evaluation')} each, {report['seconds']:.1f} s"
    )
