"""Train a diffusion model on a folder of images, an .npz file or a data set.

The model is the folder OUT, usable from the first checkpoint on. The same command goes on with an interrupted training.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pushforward.cli._shared.checks import check_outputs, in_vain
from pushforward.cli._shared.options import FitOption, ReportOptions, grouped
from pushforward.cli._shared.report import command_line, progress, remark, tell_notes, waiting
from pushforward.data.datasets import ImageData, load_images
from pushforward.data.reading import Fit
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.linear import PROCESSES
from pushforward.model.backbone import PRESETS
from pushforward.model.prediction import PREDICTIONS
from pushforward.training.trainer import Card, Interrupted, TrainConfig
from pushforward.training.trainer import train as train_model

__all__ = ["train"]

_DEFAULT = TrainConfig(steps=1)
_TRAINABLE = [name for name in PROCESSES if name != "discrete"]


@grouped()
def train(
    out: Annotated[Path, typer.Argument(help="Write the model into this folder.")],
    data: Annotated[
        str,
        typer.Option(help="Train on these images: a folder, an .npz file, or the name of a data set of `datasets`."),
    ],
    *,
    process: Annotated[
        str, typer.Option(help=f"Train for this forward process: {', '.join(_TRAINABLE)}.")
    ] = _DEFAULT.process,
    setting: Annotated[
        list[str] | None, typer.Option(help="Set a parameter of the process as NAME=NUMBER; may be repeated.")
    ] = None,
    network: Annotated[
        str, typer.Option(help=f"Train a network of this size: {', '.join(PRESETS)}.")
    ] = _DEFAULT.network,
    prediction: Annotated[str, typer.Option(help=f"Have it predict: {', '.join(PREDICTIONS)}.")] = _DEFAULT.prediction,
    size: Annotated[
        int | None, typer.Option(help="Resize the images to this side in pixels; by default they stay as they are.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Read the images as grey (1) or colour (3); by default as they are.")
    ] = None,
    fit: FitOption = "crop",
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes.")] = None,
    batch: Annotated[int, typer.Option(help="Train on this many images per step.")] = _DEFAULT.batch,
    learning_rate: Annotated[float, typer.Option(help="Set the highest learning rate.")] = _DEFAULT.learning_rate,
    warmup: Annotated[int, typer.Option(help="Raise the learning rate over this many steps.")] = _DEFAULT.warmup,
    ema: Annotated[float, typer.Option(help="Average the weights with this decay per step.")] = _DEFAULT.ema,
    label_dropout: Annotated[
        float, typer.Option(help="Hide labels with this probability, so that guidance works.")
    ] = _DEFAULT.label_dropout,
    precision: Annotated[
        str, typer.Option(help="Train in mixed precision: auto, no, bf16 or fp16.")
    ] = _DEFAULT.precision,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network with torch.compile; for a GPU.")
    ] = False,
    save_every: Annotated[
        int | None, typer.Option(help="Save a checkpoint every so many steps; by default every few minutes.", min=1)
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(help="Draw a picture every so many steps, 0 for none; by default every few minutes.", min=0),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in 16 bits.")] = False,
    seed: Annotated[int, typer.Option(help="Seed everything that is drawn.")] = _DEFAULT.seed,
    data_name: Annotated[str | None, typer.Option(help="Call the data so in the model card.")] = None,
    licence: Annotated[
        str, typer.Option(help="State the licence of the data in the model card.")
    ] = _DEFAULT.card.licence,
    reports: ReportOptions,
) -> None:
    """Train a diffusion model on a folder of images, an .npz file or a data set.

    The model is the folder OUT, usable from the first checkpoint on. Ctrl-C (or SIGTERM) saves it and ends with 130 (or
    143); once more, and it ends at once. The same command goes on with an interrupted training;
    `accelerate launch -m pushforward train ...` uses several GPUs.
    """
    check_outputs({"--json": reports.json}, {"OUT": out})
    config = TrainConfig(
        process=process,
        process_settings=_settings(setting or []),
        network=network,
        prediction=prediction,  # type: ignore[arg-type]
        steps=steps,
        minutes=minutes,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        ema=ema,
        label_dropout=label_dropout,
        precision=precision,
        compile=compiled,
        save_every=save_every,
        sample_every=sample_every,
        seed=seed,
        half=half,
        card=Card(data_name or data, licence, command_line()),
    )
    main = os.environ.get("LOCAL_RANK", "0") == "0"
    images = _read(data, size, channels, fit, quiet=reports.quiet or not main)
    both = ["the captions are learnt, not the classes"] * (images.captions is not None and images.labels is not None)
    for note in () if reports.quiet else both:
        remark(note)
    tell_notes(images, quiet=reports.quiet)
    if images.skipped:
        remark(f"{many(len(images.skipped), 'file')} left out, {many(len(images), 'image')} read")
    known = images.captions is not None or images.labels is not None
    in_vain({"label_dropout": None if known else "the data have no labels and no captions"})
    try:
        with progress("training", total=steps, unit="step", quiet=reports.quiet or not main) as bar:

            def tell(step: int, loss: float, done: float) -> None:
                with suppress(OSError):  # a terminal that is gone is no reason to stop
                    bar.update(step - bar.n)
                    bar.set_postfix(loss=f"{loss:.4f}", done=f"{done:.0%}", refresh=False)

            def aside(what: str, done: float) -> None:
                with suppress(OSError):
                    bar.set_description_str("training" if done == 1 else f"{what} {done:.0%}")

            report = train_model(config, images, out, callback=tell, aside=aside)
    except Interrupted as stop:
        if main:
            remark(str(stop))
        raise typer.Exit(stop.status) from None
    reports.tell(
        f"{out}: {many(report.steps, 'step')}, {report.images_per_second:.0f} images/s, loss {report.loss:.4f}"
    )
    reports.write({**asdict(report), "notes": images.notes, "skipped": [name for name, _ in images.skipped]})


def _read(data: str, size: int | None, channels: int | None, fit: Fit, *, quiet: bool) -> ImageData:
    try:
        with waiting("reading the images", quiet=quiet):
            return load_images(data, size=size, channels=channels, fit=fit)
    except (KeyboardInterrupt, SystemExit):
        remark("Interrupted while the images were read: nothing was trained, and nothing lost.")
        raise


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            settings[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise PushforwardError(f"A process setting is NAME=NUMBER, for instance beta_max=12; got {pair!r}.")
    return settings
