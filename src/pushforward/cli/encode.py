"""Draw the codes of images under a stochastic plan: DPM-Encoder.

Examples are in `pushforward encode --help`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from pushforward.cli._shared.checks import check_outputs, check_split, in_vain, spare
from pushforward.cli._shared.models import (
    choose_labels,
    decoded,
    image_size,
    make_plan,
    open_model,
    pick_device,
    with_negative_prompt,
)
from pushforward.cli._shared.options import (
    CountOption,
    DeviceOption,
    DtypeOption,
    FitOption,
    GuidanceOption,
    JsonOption,
    LabelOption,
    ModelArgument,
    NegativeOption,
    PromptOption,
    QuietOption,
    SizeOption,
    SplitOption,
    plan_options,
)
from pushforward.cli._shared.report import progress, write_json
from pushforward.data.inputs import read_inputs
from pushforward.data.pictures import check_suffix, compared, picture_suffixes, save_image
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.normality import statistics
from pushforward.maps.spec import SamplerSpec, noisy
from pushforward.maps.storage import check_path, header, load_codes, save_codes

__all__ = ["encode"]

_SHOWN = 64
_EXACT = 1e-4  # what rounding may come to, in the values of an image


@plan_options(solver="ddim", steps=100)
def encode(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(help="Images: files, folders or .npz files.")],
    plan: SamplerSpec,
    label: LabelOption = None,
    prompt: PromptOption = None,
    negative: NegativeOption = "",
    guidance: GuidanceOption = 1.0,
    start: Annotated[float, typer.Option(help="Encode this share of the steps, counted from the image.")] = 1.0,
    independent: Annotated[
        bool, typer.Option("--independent", help="Draw the states independently (edit-friendly), not as a path.")
    ] = False,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Call the network step by step: slower, and rounding does not add up.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed the path of states.")] = 0,
    batch: Annotated[
        int, typer.Option(help="Process this many images at a time, and states per network call.", min=1)
    ] = 64,
    count: CountOption = None,
    split: SplitOption = "test",
    fit: FitOption = "crop",
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(help="Write the codes here (.safetensors), for `pushforward decode`.")] = Path(
        "codes.safetensors"
    ),
    picture: Annotated[
        Path | None,
        typer.Option(help=f"Write a picture of the first {_SHOWN} images, each row above its reconstructions."),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
    quiet: QuietOption = False,
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
    check_path(out)
    if picture is not None:
        check_suffix(picture, picture_suffixes())
    check_outputs({"--out": out, "--picture": picture, "--json": json}, inputs=images)
    check_split(images)
    in_vain({"negative": "guidance is 1" if guidance == 1 and prompt else None})
    where = pick_device(device)
    network = with_negative_prompt(open_model(model, where, dtype, size), negative)
    plan = noisy(plan)
    made = make_plan(
        network, plan if plan.end is not None else replace(plan, end=network.process.t_min), start, quiet=quiet
    )
    channels, height, width = image_size(network)
    given = read_inputs(images, (height, width), channels, split=split, count=count, skip=True, fit=fit)
    spare(len(given.values), label=label, prompt=prompt)
    labels = choose_labels(network, label or [], len(given.values), prompt or [])
    diffusion = Diffusion(network, made, device=where).given(labels, guidance)
    found, seconds = [], time.perf_counter()
    with progress("encoding", total=made.nfe * len(given.values), unit="state", quiet=quiet) as bar:
        for first in range(0, len(given.values), batch):
            some = slice(first, first + batch)
            found.append(
                diffusion.some(some).encode(given.values[some], seed=seed, first=first, independent=independent,
                                            sequential=sequential, rows=batch, callback=bar.update)
            )  # fmt: skip
    seconds = time.perf_counter() - seconds
    info = header(model, network, plan.solver, plan.settings, made.times, labels=labels, guidance=guidance)
    save_codes(
        out,
        Code.cat([one.code for one in found]),
        {**info, "images": given.names, "seed": seed, "dtype": dtype, "size": size},
    )
    code, _ = load_codes(out)  # what is on disk is what is checked
    again = decoded(diffusion, code, batch, quiet=quiet)
    errors = (again - given.values).flatten(1).abs().amax(1)
    if picture is not None:
        save_image(compared([given.values[:_SHOWN], again[:_SHOWN]]), picture)
    normality = statistics(code.start)
    each = normality.pop("images")
    noises = code.noises if code.noises is not None else torch.zeros(0)
    report = {
        "model": model, "process": network.process.name, **{key: info[key] for key in ("solver", "settings", "times")},
        "steps": len(made.steps) - 1, "start": start, "count": len(again), "labels": info["labels"],
        "guidance": guidance, "independent": independent, "sequential": sequential, "seed": seed,
        "rounds": max(one.rounds for one in found), "nfe": made.nfe, "seconds": seconds,
        "max_abs_error": float(errors.max()), "code": {**normality, "noise_std": float(noises.std())},
        "notes": given.notes, "skipped": dict(given.skipped), "out": out,
        "images": [
            {"name": name, "max_abs_error": error, "code": one}
            for name, error, one in zip(given.names, errors.tolist(), each, strict=True)
        ],
    }  # fmt: skip
    if not quiet and json != "-":
        for note in (*given.notes, *(reason for _, reason in given.skipped)):
            typer.echo(note)
        typer.echo(_summary(report, latent=network.decoder is not None))
    write_json(report, json)


def _summary(report: dict[str, object], *, latent: bool) -> str:
    count, rounds, error = report["count"], report["rounds"], report["max_abs_error"]
    assert isinstance(error, float)
    text = (
        f"{report['out']}: {count} image{'s' if count != 1 else ''} in {rounds} round{'s' if rounds != 1 else ''}, "
        f"{report['nfe']} network evaluations each, {report['seconds']:.1f} s; max abs error {error:.1e}"
    )
    if latent:
        return text + " (what the autoencoder loses included)"
    return text if error <= _EXACT or report["sequential"] else text + ", by rounding: --sequential is exact"
