"""Sample images from a model, with any solver.

Examples are in `pushforward sample --help`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import check_pictures, open_model
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
from pushforward.cli._shared.report import progress, waiting
from pushforward.data.files import check_suffix
from pushforward.data.pictures import check_each, picture_suffixes, save_animation, save_each, save_image, sheet
from pushforward.errors import PushforwardError
from pushforward.execute import Parallel, Progress, Round
from pushforward.execute.distributed import join
from pushforward.execute.system import relative_errors
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.drawing import Drawn, draw
from pushforward.maps.labels import Labels, in_turn
from pushforward.model import Model
from pushforward.plan import Plan
from pushforward.verbs.sheets import drawn_sheet

__all__ = ["sample"]

_FRAMES = 60
_ROWS, _TIMES = 4, 8  # of the animation of rounds: images, and times of each


@grouped()
def sample(
    model: ModelArgument,
    sampler: SamplerOptions,
    condition: ConditionOptions,
    *,
    count: Annotated[int, typer.Option(help="Draw this many images.", min=1)] = 64,
    seed: SeedOption = 0,
    batch: BatchOption = 64,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="[METHOD]",
            help="Run all steps at once: preconditioned (the best, and the default of --parallel), plain, picard, "
            "anderson, joint or triangular; auto runs them so only if that is faster here.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Make the best image in this many rounds of batched network calls, all steps at once; --steps is then "
            "chosen, if it is not given.",
            min=1,
        ),
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(help="Spend at most this many network evaluations per image on --rounds.", min=1)
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Allow this relative error in an image with --parallel; 0.001 by default.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Run at most this many steps at once with --parallel.", min=1)
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(help="Show the network at most this many states per call with --parallel (saves memory).", min=1),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run step by step as well and report the difference; without --rounds, fail if it is above "
            "--tolerance.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Write one picture of all images here (.png, .jpg, .webp).")] = Path(
        "samples.png"
    ),
    each: Annotated[Path | None, typer.Option(help="Write every image as a PNG into this folder, too.")] = None,
    animate: Annotated[
        Path | None, typer.Option(help="Write the way from noise to images as an animation (.gif, .webp).")
    ] = None,
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Sample images from a model, with any solver.

    \b
    pushforward sample fashion-vp
    pushforward sample fashion-vp --solver gddim:order=2:steps=20 --count 64 --seed 0 --out grid.png
    pushforward sample fashion-langevin --solver ddim --eta 0.5 --steps 100 --label sneaker --guidance 2
    pushforward sample emoji-2 --prompt "grinning face, noto" --guidance 2 --animate emoji.gif
    pushforward sample ./my-diffusers-folder --solver unipc --steps 10 --json report.json
    pushforward sample fashion-vp --solver rk45 --count 8        # adaptive steps, the slow reference
    pushforward sample fashion-vp --solver ddim --steps 100 --count 4 --parallel --check
    pushforward sample fashion-vp --rounds 5 --count 4           # the best images in 5 rounds
    """
    check_suffix(out, picture_suffixes())
    if animate is not None:
        check_suffix(animate, {".gif", ".webp"}, "Animations")
    check_outputs({"--out": out, "--animate": animate, "--json": reports.json}, {"--each": each})
    if each is not None:
        check_each(each, count)
    condition.check(count)
    main = join(place.device)  # under torchrun, every rank works and the first one writes
    reports = replace(reports, quiet=reports.quiet or not main)
    auto = parallel == "auto"
    spec = sampler.spec(rounds=rounds, max_evaluations=max_evaluations, parallel=None if auto else parallel)
    if auto and (spec.parallel or spec.rounds):
        raise PushforwardError(
            "--parallel auto decides whether to take steps at once, as rounds or --solver do: give one."
        )
    network = open_model(model, place, condition.negative, **place.asked)
    check_pictures(network)
    guidance = condition.weight(network)
    with waiting("making the plan", quiet=reports.quiet):
        diffusion = spec.diffusion(network, guidance)
    plan = diffusion.plan
    labels = _labels(network, condition, count, reports)
    diffusion = diffusion.given(labels, guidance)
    parallel = parallel or spec.parallel or ("preconditioned" if spec.rounds else None)
    given = {"--tolerance": tolerance, "--window": window, "--max-rows": max_rows, "--check": check or None}
    _check_at_once(plan, parallel, [name for name, value in given.items() if value is not None])
    own = {"tolerance": spec.within if tolerance is None else tolerance, "window": window, "max_rows": max_rows}
    method, reason = _method(diffusion, own, min(batch, count), auto=auto)
    asked = {"seed": seed, "batch": batch}
    frames: list[Image.Image] = []

    def watch(step: Progress | Round) -> None:
        if animate is None:
            return
        if isinstance(step, Round):
            frames.append(_round(there, step))
        elif _keep(step):
            frames.append(sheet(_shown(network, step.state)).convert("RGB"))

    there = diffusion.run_by(parallel=method) if isinstance(diffusion, Diffusion) else diffusion
    started = time.perf_counter()
    drawn = _drawn(there, count, asked, watch, quiet=reports.quiet)
    images = drawn.images
    measured: dict[str, Any] = {"rounds": drawn.rounds, "nfe": drawn.nfe}
    if method is not None:
        measured |= {"residual": drawn.residual, "diverged": drawn.diverged}
    measured["seconds"] = time.perf_counter() - started
    over = 0
    if check and method is not None and isinstance(there, Diffusion):
        started = time.perf_counter()
        plain = _drawn(there.run_by(parallel=None), count, asked, lambda _: None, quiet=reports.quiet)
        measured["speedup"] = (time.perf_counter() - started) / measured["seconds"]
        errors = relative_errors(images, plain.images)
        measured["relative_error"] = {"median": errors.quantile(0.5).item(), "worst": errors.max().item()}
        over = int((~(errors <= method.tolerance)).sum()) if method.rounds is None else 0
    if not main:
        return
    save_image(drawn_sheet(drawn, diffusion, spec.solver, seed), out)
    if each is not None:
        save_each(images, each)
    if animate is not None:
        last = [] if method is not None else [sheet(images[:batch]).convert("RGB")]
        save_animation([*frames, *last], animate)
    reports.tell(*([reason] if reason else []), _summary(out, drawn, measured))
    reports.write({
        "model": model, "process": network.process.name, "solver": spec.solver, "settings": dict(diffusion.settings),
        "steps": None if plan is None else len(plan.steps) - 1, "times": diffusion.times.tolist(),
        "count": count, "seed": seed, "guidance": guidance,
        "labels": labels.tolist() if isinstance(labels, Tensor) else labels,
        "parallel": None if method is None else parallel, "reason": reason,
        "tolerance": None if method is None else method.tolerance, **measured, "out": out,
    })  # fmt: skip
    if over and method is not None:
        worst = measured["relative_error"]["worst"]
        raise PushforwardError(
            f"{over} of {count} images are further from step by step than the tolerance of {method.tolerance:g} (worst "
            f"{worst:.1e}); {out} is written as it is. Give a smaller --tolerance, or --dtype float32."
        )


def _labels(network: Model, condition: ConditionOptions, count: int, reports: ReportOptions) -> Labels:
    """What the images are to show: as the options say, or the model's classes or captions in turn, and that is told."""
    labels = condition.labels(network, count)
    if labels is None and (labels := in_turn(network, count)) is not None:
        what, option = ("classes", "--label") if network.classes else ("captions that it knows", "--prompt")
        reports.tell(f"The {what} of {network.name} are drawn in turn; {option} says which.")
    return labels


# -- the ways to sample ------------------------------------------------------------------------------------------------


def _drawn(
    there: Diffusion | AdaptiveDiffusion, count: int, asked: dict[str, Any], watch: Callable[[Progress | Round], None],
    *, quiet: bool,
) -> Drawn:  # fmt: skip
    """Images, with a progress bar; `watch` is told of the first batch's network calls or rounds."""
    batches, plan, at_once = 0, there.plan, there.parallel is not None
    total = None if plan is None or at_once else -(-count // asked["batch"]) * plan.nfe
    with progress("sampling", total=total, unit="round" if at_once else "call", quiet=quiet) as bar:

        def tell(step: Progress | Round) -> None:
            nonlocal batches
            batches += step.done == 1
            bar.update()
            if batches == 1:
                watch(step)
            if isinstance(step, Round):
                bar.set_postfix_str(f"{step.active} to do, error {step.residual:.1e}")

        return draw(there, count, **asked, callback=tell)


def _check_at_once(plan: Plan | None, parallel: str | None, given: list[str]) -> None:
    """Raise if options of `--parallel` are given in vain."""
    if plan is not None and plan.implicit:
        vain = [name for name in given if name in ("--window", "--check")]
        why = f"the steps of {plan.solver!r} depend on later ones, so they are all taken at once, and never one by one"
    else:
        vain = given if parallel is None else []
        why = "they are for steps taken at once (add --parallel)"
    if vain:
        raise PushforwardError(f"{', '.join(vain)} cannot be used here: {why}. Leave out what has no effect.")


def _method(
    diffusion: Diffusion | AdaptiveDiffusion, own: dict[str, Any], batch: int, *, auto: bool
) -> tuple[Parallel | None, str | None]:
    """How to take all steps at once, if at all, and why; `own` are the settings that were given."""
    if isinstance(diffusion, AdaptiveDiffusion):
        return None, "adaptive steps follow one another; running sequentially" if auto else None
    if auto:
        return diffusion.fastest(batch, Parallel(**own))
    return None if diffusion.parallel is None else replace(diffusion.parallel, **own), None


# -- what is written ---------------------------------------------------------------------------------------------------


def _summary(out: Path, drawn: Drawn, measured: dict[str, Any]) -> str:
    text = f"{out}: {drawn}, {len(drawn.images) / measured['seconds']:.1f} images/s"
    text += "; --check measures the error" * (drawn.vague and "relative_error" not in measured)
    if "relative_error" in measured:
        error = measured["relative_error"]
        text += f"; against step by step: relative error {error['median']:.1e} (worst {error['worst']:.1e}), "
        text += f"{measured['speedup']:.2f} times as fast"
    return text


def _keep(step: Progress) -> bool:
    """Whether this of all network calls is one of the animation's frames, evenly spread if it is known how many."""
    stride = max(1, -(-step.total // _FRAMES))
    return (step.done - 1) % stride == 0


def _shown(model: Model, states: Tensor) -> Tensor:
    """The image part of states as images: scaled to their range, or decoded."""
    states = model.process.image(states).float()
    if model.decoder is None:
        return states / states.abs().amax().clamp_min(1.0)
    with torch.no_grad():
        return model.decoder(states)


def _round(there: Diffusion | AdaptiveDiffusion, step: Round) -> Image.Image:
    """The states of a few images at a few times, all of which a round moves."""
    assert step.states is not None
    assert there.plan is not None
    states = step.states()[:, :_ROWS]
    nodes = torch.linspace(0, len(states) - 1, min(_TIMES, len(states))).round().long().tolist()
    parts = [_shown(there.model, states[k]) for k in nodes]
    return sheet(
        torch.stack(parts, 1).flatten(0, 1), columns=len(nodes), title=f"round {step.done}: error {step.residual:.1g}",
        heads=[f"t = {there.plan.node_times[k]:.2f}" for k in nodes],
    )  # fmt: skip
