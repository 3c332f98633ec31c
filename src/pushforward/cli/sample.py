"""Sample images from a model, with any solver.

Examples are in `pushforward sample --help`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.models import choose_labels, open_model, pick_device, with_negative_prompt
from pushforward.cli._shared.options import (
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    LabelOption,
    ModelArgument,
    NegativeOption,
    PromptOption,
    QuietOption,
    SizeOption,
    plan_options,
)
from pushforward.cli._shared.report import progress, waiting, write_json
from pushforward.data.pictures import check_suffix, picture_suffixes, save_animation, save_image, sheet
from pushforward.errors import PushforwardError
from pushforward.execute import PARALLEL_METHODS, Parallel, Progress, Round
from pushforward.execute.distributed import join
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import in_turn
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.plan import Plan

__all__ = ["sample"]

_FRAMES = 60
_TOLERANCE = 1e-3


@plan_options()
def sample(
    model: ModelArgument,
    plan: SamplerSpec,
    count: Annotated[int, typer.Option(help="Draw this many images.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed the codes; image i depends on the seed and i alone.")] = 0,
    label: LabelOption = None,
    prompt: PromptOption = None,
    negative: NegativeOption = "",
    guidance: GuidanceOption = 1.0,
    size: SizeOption = None,
    batch: Annotated[int, typer.Option(help="Process this many images at a time.", min=1)] = 64,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="[METHOD]",
            help="Run all steps at once: preconditioned (the best, and the default of --parallel), plain, picard, "
            "anderson, joint or triangular; auto runs them so only if that is faster here.",
        ),
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
            "--check", help="Run step by step as well and report the difference; fail if it is above --tolerance."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Write one picture of all images here (.png, .jpg, .webp).")] = Path(
        "samples.png"
    ),
    each: Annotated[Path | None, typer.Option(help="Write every image as a PNG into this folder, too.")] = None,
    animate: Annotated[
        Path | None, typer.Option(help="Write the way from noise to images as an animation (.gif, .webp).")
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    r"""Sample images from a model, with any solver.

    \b
    pushforward sample fashion-vp
    pushforward sample fashion-vp --solver gddim --order 2 --steps 20 --count 64 --seed 0 --out grid.png
    pushforward sample fashion-langevin --solver ddim --eta 0.5 --steps 100 --label sneaker --guidance 2
    pushforward sample emoji --prompt "grinning face, noto" --guidance 2 --animate emoji.gif
    pushforward sample ./my-diffusers-folder --solver unipc --steps 10 --json report.json
    pushforward sample fashion-vp --solver rk45 --count 8        # adaptive steps, the slow reference
    pushforward sample fashion-vp --solver ddim --steps 100 --count 4 --parallel --check
    """
    check_suffix(out, picture_suffixes())
    if animate is not None:
        check_suffix(animate, {".gif", ".webp"})
    check_outputs({"--out": out, "--animate": animate, "--json": json}, {"--each": each})
    main = join(device)  # under torchrun, every rank works and the first one writes
    quiet = quiet or not main
    where = pick_device(device)
    chosen = with_negative_prompt(open_model(model, where, dtype, size), negative)
    with waiting("making the plan", quiet=quiet):
        diffusion = plan.diffusion(chosen, device=where)
    made = diffusion.plan if isinstance(diffusion, Diffusion) else None
    given = {"--tolerance": tolerance, "--window": window, "--max-rows": max_rows, "--check": check or None}
    _check_at_once(made, parallel, [name for name, value in given.items() if value is not None])
    labels = choose_labels(chosen, label or [], count, prompt or [])
    if labels is None and (labels := in_turn(chosen, count)) is not None and not quiet and json != "-":
        what, option = ("classes", "--label") if chosen.classes else ("captions that it knows", "--prompt")
        typer.echo(f"The {what} of {chosen.name} are drawn in turn; {option} says which.")
    diffusion = diffusion.given(labels, guidance)
    asked: dict[str, Any] = {"seed": seed, "batch": batch}
    method, reason = _method(
        diffusion, parallel, _TOLERANCE if tolerance is None else tolerance, window, max_rows, batch=min(batch, count)
    )
    if method is not None and animate is not None:
        raise PushforwardError("An animation shows step after step; leave --parallel out for it.")
    frames: list[Tensor] = []
    over = 0

    def one_by_one() -> tuple[Tensor, dict[str, Any]]:
        calls = batches = evaluations = 0
        total = None if made is None else -(-count // batch) * made.nfe
        with progress("sampling", total=total, unit="call", quiet=quiet) as bar:

            def tell(step: Progress) -> None:
                nonlocal calls, batches, evaluations
                calls, evaluations = calls + 1, evaluations + step.nfe
                batches += step.done == 1
                bar.update()
                if animate is not None and batches == 1 and _keep(step):
                    frames.append(chosen.process.image(step.state).float().cpu())

            images = diffusion.sample(count, **asked, callback=tell)
        rounds = calls / batches if made is None else made.nfe  # adaptive steps differ by image
        return images, {"rounds": rounds, "nfe": evaluations / count}

    def at_once(diffusion: Diffusion) -> tuple[Tensor, dict[str, Any]]:
        with progress("sampling", quiet=quiet) as bar:

            def tell(step: Round) -> None:
                bar.update()
                bar.set_postfix_str(f"{step.active} images to do, error {step.residual:.1e}")

            found = list(diffusion.solved(count, **asked, callback=tell))
        solutions = [solution for _, solution in found]
        report = {
            "rounds": max(solution.rounds for solution in solutions),
            "nfe": torch.cat([solution.nfe for solution in solutions]).double().mean().item(),
            "residual": torch.cat([solution.residual for solution in solutions]).max().item(),
            "diverged": int(torch.cat([solution.diverged for solution in solutions]).sum()),
        }
        return torch.cat([images for images, _ in found]), report

    started = time.perf_counter()
    if method is not None and isinstance(diffusion, Diffusion):
        images, measured = at_once(diffusion.run_by(parallel=method))
    else:
        images, measured = one_by_one()
    seconds = time.perf_counter() - started
    measured["seconds"] = seconds
    if check and method is not None:
        started = time.perf_counter()
        expected, _ = one_by_one()
        size = expected.flatten(1).norm(dim=1).clamp_min(torch.finfo(expected.dtype).tiny)
        errors = (images - expected).flatten(1).norm(dim=1) / size
        measured["relative_error"] = {"median": errors.median().item(), "worst": errors.max().item()}
        over = int((~(errors <= method.tolerance)).sum())
        measured["speedup"] = (time.perf_counter() - started) / seconds
    if not main:
        return
    save_image(sheet(images), out)
    if each is not None:
        for i, image in enumerate(images):
            save_image(sheet(image[None], smallest=0), each / f"{i:05d}.png")
    if animate is not None:
        save_animation(_pictures(chosen, frames, images[:batch]), animate)
    if not quiet and json != "-":
        if reason:
            typer.echo(reason)
        typer.echo(_summary(out, count, measured, None if method is None else method.tolerance))
    report = {
        "model": model, "process": chosen.process.name, "solver": plan.solver,
        "settings": dict(diffusion.settings),
        "steps": None if made is None else len(made.steps) - 1, "times": diffusion.times.tolist(),
        "count": count, "seed": seed, "guidance": guidance,
        "labels": labels.tolist() if isinstance(labels, Tensor) else labels,
        "parallel": None if method is None else parallel, "reason": reason,
        "tolerance": None if method is None else method.tolerance, **measured, "out": out,
    }  # fmt: skip
    write_json(report, json)
    if over and method is not None:
        worst = measured["relative_error"]["worst"]
        raise PushforwardError(
            f"{over} of {count} images are further from step by step than the tolerance of {method.tolerance:g} (worst "
            f"{worst:.1e}); {out} is written as it is. Give a smaller --tolerance, or --dtype float32."
        )


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
    diffusion: Diffusion | AdaptiveDiffusion,
    name: str | None,
    tolerance: float,
    window: int | None,
    max_rows: int | None,
    batch: int,
) -> tuple[Parallel | None, str | None]:
    """How to take all steps at once, if at all, and why."""
    if isinstance(diffusion, AdaptiveDiffusion):
        if name not in (None, "auto"):
            raise PushforwardError(
                "Adaptive steps follow one another and cannot be taken at once; name a solver, e.g. ddim."
            )
        return None, None if name is None else "adaptive steps follow one another; running sequentially"
    if name is None and diffusion.plan.implicit:
        name = "preconditioned"  # there is no other way
    if name is None:
        return None, None
    if name == "auto":
        return diffusion.fastest(batch, Parallel(tolerance=tolerance, window=window, max_rows=max_rows))
    if name not in PARALLEL_METHODS:
        raise PushforwardError(
            f"Unknown way {name!r} to take all steps at once; known are auto, {', '.join(PARALLEL_METHODS)}."
        )
    return replace(PARALLEL_METHODS[name], tolerance=tolerance, window=window, max_rows=max_rows), None


def _summary(out: Path, count: int, measured: dict[str, Any], tolerance: float | None) -> str:
    text = f"{out}: {count} images, {measured['nfe']:.0f} network evaluations each"
    if "residual" in measured:
        text += f" in {measured['rounds']} rounds, error estimated at {measured['residual']:.1e} at most"
        if tolerance is not None and not measured["residual"] <= tolerance:
            text += f" (above the tolerance of {tolerance:g}: their precision may not allow it)"
    if measured.get("diverged"):
        text += f" ({measured['diverged']} diverged and were run step by step)"
    text += f", {count / measured['seconds']:.1f} images/s"
    if "relative_error" in measured:
        error = measured["relative_error"]
        text += f"; against step by step: relative error {error['median']:.1e} (worst {error['worst']:.1e}), "
        text += f"{measured['speedup']:.2f} times as fast"
    return text


def _keep(step: Progress) -> bool:
    """Whether this of all network calls is one of the animation's frames, evenly spread if it is known how many."""
    stride = max(1, -(-step.total // _FRAMES))
    return (step.done - 1) % stride == 0


def _pictures(model: Model, states: list[Tensor], last: Tensor) -> list[Any]:
    """Frames: each state scaled to the range of images, then the images themselves."""
    with torch.no_grad():
        shown = [s / s.abs().amax().clamp_min(1.0) if model.decoder is None else model.decoder(s) for s in states]
    return [sheet(s).convert("RGB") for s in [*shown, last]]
