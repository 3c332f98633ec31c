"""Find the codes behind images: exactly, by optimisation, or by the field's plain inversion.

Examples are in `pushforward invert --help`.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.checks import in_vain
from pushforward.cli._shared.codes import CodesOptions
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
    grouped,
)
from pushforward.cli._shared.report import progress
from pushforward.data.inputs import Images
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.evaluation.pairs import decibels
from pushforward.execute import Progress, Round
from pushforward.guidance.invert import Beginning, Method
from pushforward.guidance.invert import invert as find
from pushforward.maps.code import batches
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.inversion import Inversion, Record
from pushforward.maps.normality import statistics
from pushforward.maps.spec import SamplerSpec
from pushforward.maps.storage import header
from pushforward.model import Model
from pushforward.plan import Plan
from pushforward.plan.gddim import with_residuals

__all__ = ["invert"]

_METHODS: dict[str, Method] = {
    "exact": "exact", "optimise": "optimised", "naive": "naive", "uni-inv": "uni-inv", "direct": "direct",
    "flowopt": "flowopt",
}  # fmt: skip
_BEGINNINGS: dict[str, Beginning] = {"forward": "forward", "random": "random"}


@grouped(solver="ddim", steps=50)
def invert(
    model: ModelArgument,
    images: ImagesArgument,
    sampler: SamplerOptions,
    condition: ConditionOptions,
    *,
    method: Annotated[
        str,
        typer.Option(
            help="Find codes by: exact (a fixed point), optimise (least squares), naive (one pass), uni-inv (a nearer "
            "one), direct (one with what it misses) or flowopt (moved by the error)."
        ),
    ] = "exact",
    begin: Annotated[
        str,
        typer.Option(help="Begin optimise or flowopt at the codes of a pass (forward) or at random ones (random)."),
    ] = "forward",
    iterations: Annotated[int, typer.Option(help="Take at most this many steps of optimise or flowopt.", min=1)] = 60,
    clean: Annotated[
        bool,
        typer.Option(
            "--clean",
            help="Add no noise of level t_min: the codes are those of the image itself, but less Gaussian.",
        ),
    ] = False,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Find exact codes one state after another: fewer network evaluations, in more rounds.",
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="Allow this error in any value of the image, on a range of 2.")
    ] = 1e-4,
    seed: Annotated[int, typer.Option(help="Seed the noise of level t_min.")] = 0,
    batch: BatchOption = 64,
    inputs: ImageOptions,
    files: CodesOptions,
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Find the exact codes behind images: decoded by the same solver, they give the images back.

    By default the grid ends at t_min, for a last step to clean data has no inverse, and noise of that level, kept with
    the code, is added to the image, which makes its code properly Gaussian. --clean leaves it out.

    Where there is no exact code, as for stochastic samplers or a grid to time 0, --method optimise finds one that
    decodes to nearly the image; noises stay as the seed draws them. The naive method is DDIM's run forwards, which is
    no inverse but nearly so; uni-inv is nearer at one call more, and direct keeps what the pass misses with the code,
    so that decoding is exact. All of them are of the clean image.

    Every code is decoded again, and that error is what is reported. Images whose exact codes miss the tolerance are
    named, and the exit status is then 1, though all is written.

    \b
    pushforward invert fashion-vp shoe.png --picture both.png
    pushforward invert fashion-vp data.npz --split test --count 64 --out codes.safetensors --json report.json
    pushforward invert fashion-langevin photos/ --solver gddim --order 2 --steps 100 --label sneaker
    pushforward invert fashion-vp shoe.png --sequential --steps 28
    pushforward invert fashion-vp shoe.png --method direct --steps 10
    pushforward invert fashion-vp shoe.png --method optimise --solver ddpm --steps 20 --begin random
    pushforward decode codes.safetensors --out again.png
    """
    files.check(images, reports)
    inputs.check(images)
    condition.check()
    _check_method(method, begin, clean=clean)
    network = open_model(model, place, condition.negative, **place.asked)
    spec = sampler.plan_spec()
    guidance = condition.weight(network)
    plan = _invertible(network, spec, guidance, method, quiet=reports.quiet)
    given = inputs.read(images, image_size(network))
    labels = condition.labels(network, len(given.values))
    diffusion = Diffusion(network, plan).given(labels, guidance)
    found, seconds = [], []
    with progress("inverting", quiet=reports.quiet) as bar:

        def tell(step: Round | Progress | Record) -> None:
            bar.update()
            if isinstance(step, Round):
                bar.set_postfix_str(f"{step.active} to do, error {step.residual:.1e}")
            elif isinstance(step, Record):
                bar.set_postfix_str(f"squared error {float(step.loss.max()):.1e}")

        for some in batches(len(given.values), batch):
            began = time.perf_counter()
            found.append(
                find(diffusion.some(some), given.values[some], _METHODS[method], seed=seed, first=some.start,
                     noisy=not clean, sequential=sequential, tolerance=tolerance, begin=_BEGINNINGS[begin],
                     iterations=iterations, callback=tell)
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
    if method == "direct":
        diffusion = replace(diffusion, plan=with_residuals(plan))
    info = header(model, spec, diffusion, len(given.values))
    info |= {**place.kept, "images": given.names, "seed": seed}
    code, again = files.write([one.code for one in found], info, given, diffusion, batch=batch, quiet=reports.quiet)
    report = {
        "model": model, "process": network.process.name, **{key: info[key] for key in ("solver", "settings", "times")},
        "steps": len(plan.steps) - 1, "count": len(again), "labels": info["labels"], "guidance": guidance,
        "method": method, "clean": clean or method != "exact", "seed": seed, "tolerance": tolerance,
        "notes": given.notes, "out": files.out,
        **_measured(given, again, found, seconds, statistics(code.start), tolerance,
                    latent=network.decoder is not None),
    }  # fmt: skip
    missed = [image for image in report["images"] if not image["met"]]
    reports.tell(*given.notes)
    reports.tell(*(f"{image['name']}: error {image['error']:.1e}, above the tolerance of {tolerance:g}"
                   for image in missed), _summary(report))  # fmt: skip
    reports.write(report)
    if missed and method == "exact":
        worst = max(missed, key=lambda image: image["error"])
        raise PushforwardError(
            f"{len(missed)} of {len(again)} codes miss the tolerance of {tolerance:g}, that of {worst['name']} with an "
            f"error of {worst['error']:.1e}; all were written to {files.out}. Take more --steps or less --guidance"
            f"{'' if place.dtype == 'float32' else ', or --dtype float32'}."
        )


def _check_method(method: str, begin: str, *, clean: bool) -> None:
    """Raise unless there is such a method, and no option is given that it does not use."""
    if method not in _METHODS or begin not in _BEGINNINGS:
        raise PushforwardError(
            f"--method is {', '.join(_METHODS)}, and --begin forward or random; got {method!r} and {begin!r}."
        )
    only = None if method in ("optimise", "flowopt") else "it is of --method optimise or flowopt"
    one_pass = method in ("naive", "uni-inv", "direct")
    in_vain({
        "begin": only, "iterations": only,
        "sequential": None if method == "exact" else f"--method {method} has an order of its own",
        "clean": None if method == "exact" else f"--method {method} adds no noise",
        "tolerance": f"the {method} method makes one pass, whatever it leads to" if one_pass else None,
        "seed": "no noise is drawn" if one_pass or (method == "exact" and clean) else None,
    })  # fmt: skip


def _invertible(model: Model, options: SamplerSpec, guidance: float | None, method: str, *, quiet: bool) -> Plan:
    """The plan that the options describe, to `t_min` where they do not say where to."""
    plan = make_plan(model, options.invertible(model), guidance, quiet=quiet)
    if plan.noises and method != "optimise":
        raise PushforwardError(
            f"The solver {options.solver!r} with these settings is stochastic, so many codes give one image; "
            "invert with a deterministic one, draw one of those codes with `pushforward encode`, or seek one with "
            "--method optimise --begin random."
        )
    if not plan.nodes[-1].time > 0 and method == "exact":
        where = f"t_min = {model.process.t_min:g}"
        raise PushforwardError(
            f"{options.solver} ends at time 0, and the last step of such a plan has no inverse; take one to {where}."
            if options.filed
            else f"A last step to clean data has no inverse; leave --end out, which ends at {where}."
        )
    return plan


def _measured(
    given: Images,
    again: Tensor,
    found: list[Inversion],
    seconds: list[float],
    normality: dict[str, Any],
    tolerance: float,
    *,
    latent: bool,
) -> dict[str, Any]:
    """Errors, effort and codes, in total and of each image.

    An autoencoder has an error of its own, so what is held to the tolerance is then the error of the latents.
    """
    error = (again - given.values).flatten(1)
    mean_square = error.square().mean(1).double()
    residual = torch.cat([one.residual.cpu() for one in found])
    nfe = torch.cat([one.nfe.cpu() for one in found])
    sizes = [len(one.nfe) for one in found]
    rounds = [one.rounds for one, size in zip(found, sizes, strict=True) for _ in range(size)]
    shares = [took / size for took, size in zip(seconds, sizes, strict=True) for _ in range(size)]
    largest = error.abs().amax(1)
    held = (residual if latent else largest).nan_to_num(math.inf)
    columns = {
        "name": given.names,
        "max_abs_error": largest.tolist(),
        "psnr": decibels(mean_square).tolist(),
        "error": held.tolist(),
        "met": (held <= tolerance).tolist(),
        "rounds": rounds,
        "nfe": nfe.tolist(),
        "seconds": shares,
        "residual": residual.tolist(),
        "code": normality.pop("images"),
    }
    return {
        "max_abs_error": float(largest.max()),
        "psnr": float(decibels(mean_square.mean())),
        "rounds": max(rounds),
        "decoding": max(one.decoding for one in found),
        "nfe": float(nfe.double().mean()),
        "seconds": sum(seconds),
        "residual": float(residual.max()),
        "converged": int((held <= tolerance).sum()),
        "code": normality,
        "images": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
    }


def _summary(report: dict[str, Any]) -> str:
    count, code, decoding = report["count"], report["code"], report["decoding"]
    left = count - report["converged"]
    unsure = f"; {left} of them not to the tolerance" if left else ""
    checked = f" and {many(decoding, 'call')} of decoding" if decoding else ""
    return (
        f"{report['out']}: {many(count, 'image')} in {many(report['rounds'], 'round')}{checked}, "
        f"{many(report['nfe'], 'network evaluation')} each, {report['seconds']:.1f} s; "
        f"max abs error {report['max_abs_error']:.1e}, psnr {report['psnr']:.0f} dB; "
        f"codes have mean {code['mean']:.3f}, std {code['std']:.3f}{unsure}"
    )
