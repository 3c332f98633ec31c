"""Learn a plan that makes the best image of a model in a few rounds.

Examples are in `pushforward learn-plan --help`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.models import open_model
from pushforward.cli._shared.options import (
    BatchOption,
    ConditionOptions,
    ModelArgument,
    ModelOptions,
    ReportOptions,
    SeedOption,
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.data.files import check_suffix
from pushforward.data.words import many
from pushforward.maps.labels import UNSAID
from pushforward.plan import save_plan
from pushforward.plan.files import SUFFIX
from pushforward.training.plans import HELD_OUT, evaluations, images_within
from pushforward.training.plans import learn_plan as learn

__all__ = ["learn_plan"]


@grouped()
def learn_plan(
    model: ModelArgument,
    condition: ConditionOptions,
    *,
    rounds: Annotated[
        int, typer.Option(help="Make the best image in this many rounds of batched network calls.", min=2)
    ] = 5,
    max_evaluations: Annotated[
        int | None, typer.Option(help="Spend at most this many network evaluations per image.", min=1)
    ] = None,
    images: Annotated[int, typer.Option(help="Learn from this many images that the model makes.", min=8)] = 64,
    minutes: Annotated[
        float | None, typer.Option(help="Learn from as many images as take about this many minutes.")
    ] = None,
    end: Annotated[
        float, typer.Option(help="End at this time; 0 is a clean image, and from above 0 images can be inverted.")
    ] = 0.0,
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    out: Annotated[Path, typer.Option(help="Write the plan here (.plan); any --solver takes it.")] = Path("fast.plan"),
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Learn a plan that makes the best image of a model in a few rounds, each one batched network call.

    The plan is compared on images that it did not learn from, and written only if it is better than --rounds of
    `pushforward sample` without learning.

    \b
    pushforward learn-plan fashion-vp --rounds 5 --out fast.plan
    pushforward sample fashion-vp --solver fast.plan
    pushforward learn-plan emoji --rounds 4 --minutes 10 --max-evaluations 40
    """
    check_suffix(out, {SUFFIX}, "Plans")
    check_outputs({"--out": out, "--json": reports.json})
    in_vain({"images": None if minutes is None else "--minutes is given"})
    condition.check(1)
    chosen = open_model(model, place, condition.negative, **place.asked)
    labels = condition.labels(chosen, 1)
    said, weight = UNSAID if labels is None else labels, condition.weight(chosen)
    began = time.perf_counter()
    if minutes is not None:
        images = images_within(chosen, rounds, 60 * minutes, max_evaluations, labels=said, guidance=weight)
    total = evaluations(rounds, images, max_evaluations)
    with progress("learning", total=total, unit="evaluation", quiet=reports.quiet) as bar:
        learned = learn(chosen, rounds, max_evaluations=max_evaluations, images=images, labels=said, guidance=weight,
                        seed=seed, end=end, batch=batch, callback=bar.update)  # fmt: skip
    seconds = time.perf_counter() - began
    errors = {name: {"median": median, "rms": rms} for name, (median, rms) in learned.summary.items()}
    about = {"model": model, "images": images, "held_out": HELD_OUT, "errors": errors}
    save_plan(learned.plan, out, about)
    reports.tell(
        f"{out}: {learned.plan.calls}, from {many(images, 'image')} in {seconds:.0f} s",
        f"relative error to the flow's images, {HELD_OUT} not learned from, median and root mean square:",
        *(f"  {name:13} {one['median']:.4f} {one['rms']:.4f}" for name, one in errors.items()),
    )
    reports.write({**about, "process": chosen.process.name, "rounds": rounds, "nfe": learned.plan.nfe,
                   "spent": learned.nfe, "seconds": seconds, "out": out})  # fmt: skip
