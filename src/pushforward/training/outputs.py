"""What a training writes to the folder of its model: model, card, checkpoint, log and pictures; and its report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pushforward.data.files import atomic_path, naming
from pushforward.data.pictures import save_image, sheet
from pushforward.errors import Diverged, PushforwardError
from pushforward.execute import Progress
from pushforward.execute import run as run_plan
from pushforward.model.model import Model
from pushforward.model.storage import save_model
from pushforward.plan import SOLVERS
from pushforward.plan.grid import angle
from pushforward.training.batches import BatchDraws, examples
from pushforward.training.checkpoint import folder_of, save_checkpoint
from pushforward.training.plots import loss_curve
from pushforward.training.problem import Problem
from pushforward.training.state import State
from pushforward.training.stopping import Clock, Stop

__all__ = ["Outputs", "Report", "report_on"]

ROWS, COLUMNS, STEPS = 8, 10, 30  # of the pictures: a class or caption for each column, by so many steps of DDIM


@dataclass(frozen=True)
class Report:
    """What a run did.

    Args:
        folder: the model.
        steps: optimiser steps in all.
        images: seen in all.
        seconds: of training in all.
        images_per_second: on average.
        loss: mean of the last tenth.
        parameters: parameters of the network.
        resumed_from: the step this run began at.
    """

    folder: Path
    steps: int
    images: int
    seconds: float
    images_per_second: float
    loss: float
    parameters: int
    resumed_from: int


class _Enough(Exception):
    """A picture is given up."""


class Outputs:
    """The folder of a model in training, on all processes, of which the main one writes.

    Args:
        folder: folder of the model.
        problem: what is learnt.
        state: state of the training, after it has been resumed.
        model: model of the averaged network.
        stop: a request to stop, for which pictures are given up.
        aside: told what is under way, and the fraction of it that is done.
        main: whether this is the main process.
    """

    def __init__(
        self,
        folder: Path,
        problem: Problem,
        state: State,
        model: Model,
        stop: Stop,
        aside: Callable[[str, float], None],
        *,
        main: bool,
    ) -> None:
        self.folder, self.problem, self.state, self.model = folder, problem, state, model
        self.stop, self.aside, self.main = stop, aside, main
        self.saved = state.step  # the step of the checkpoint
        now = time.monotonic()
        self.saving, self.drawing = Clock(now), Clock(now)

    def keep(self) -> None:
        """Save and illustrate, if it is time."""
        if self._due(self.problem.config.save_every, self.saving):
            self.save()
        if self._due(self.problem.config.sample_every, self.drawing):
            self.illustrate()

    def catch_up(self) -> None:
        """Draw the picture of the step that was resumed, unless the interruption let it be drawn."""
        every = self.problem.config.sample_every
        if every and self._due(every, self.drawing) and self.state.step:
            self.illustrate()

    def log(self) -> None:
        """Add a line to the log."""
        if not self.main:
            return
        state, config = self.state, self.problem.config
        recent = state.losses[-config.log_every :]
        line = {
            "step": state.step,
            "images": state.step * config.batch,
            "seconds": round(state.seconds, 2),
            "loss": round(sum(recent) / len(recent), 6),
            "learning_rate": state.optimizer.param_groups[0]["lr"],
        }
        path = folder_of(self.folder) / "log.jsonl"
        with self._writing("log"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the model and the checkpoint, each whole or not at all; of finite losses only."""
        self.state.read_losses()
        if self.main:
            with self._writing("checkpoint", self.saving):
                folder_of(self.folder).mkdir(parents=True, exist_ok=True)  # first: by it the model is known as ours
                _save_model(self.folder, self.problem, self.state, self.model)
                save_checkpoint(self.folder, self.problem, self.state)
        self.saved = self.state.step

    def illustrate(self, *, last: bool = False) -> None:
        """Draw the loss curve and sampled images, if not there yet; given up where a stop is asked for."""
        self.state.read_losses()
        if not self.main or self.stop.number or self.picture.exists():
            return
        what = "last picture" if last else "picture"
        with self._writing(what, self.drawing):
            with atomic_path(folder_of(self.folder) / "loss.png") as temporary:
                loss_curve(self.state.losses, temporary)
            try:
                images = draw_samples(self.problem, self.model, lambda done: self._drawn(what, done))
            except Diverged:  # at the beginning a network may give anything
                if last:
                    raise
                return
            except _Enough:
                return
            data, step = self.problem.data, self.state.step
            heads = examples(data.captions, COLUMNS) if data.captions else (data.classes * COLUMNS)[:COLUMNS]
            save_image(sheet(images, columns=COLUMNS, title=f"after {step} steps", heads=heads), self.picture)

    @property
    def picture(self) -> Path:
        """The file of this step's samples."""
        return folder_of(self.folder) / f"samples-{self.state.step:07d}.png"

    def _drawn(self, what: str, done: Progress) -> None:
        if self.stop.number:
            raise _Enough
        self.aside(what, done.done / done.total)

    def _due(self, every: int | None, clock: Clock) -> bool:
        """Whether something that a user wants so often is due; on the main process, which does it."""
        if every is None:
            return time.monotonic() >= clock.due
        return every > 0 and self.state.step % every == 0

    @contextmanager
    def _writing(self, what: str, clock: Clock | None = None) -> Iterator[None]:
        """What is written to the folder, told and timed; if it cannot be, a sentence says what remains."""
        began = time.monotonic()
        if clock is not None:
            self.aside(what, 0.0)
        try:
            yield
        except (OSError, SafetensorError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            raise PushforwardError(
                f"The {what} of step {self.state.step} cannot be written to {self.folder} ({why}); {kept}. Mend that, "
                "and the same command goes on."
            ) from error
        if clock is not None:
            now = time.monotonic()
            clock.done(now, now - began)
            self.aside(what, 1.0)


@torch.no_grad()
def draw_samples(problem: Problem, model: Model, callback: Callable[[Progress], None]) -> Tensor:
    """A few images in [-1, 1], a class or caption for each column, by deterministic DDIM."""
    assert model.module is not None
    process, data = problem.process, problem.data
    count, captions, classes, device = ROWS * COLUMNS, data.captions, len(data.classes), model.device
    condition: Tensor | list[str] | None = None
    if captions:
        condition = [examples(captions, COLUMNS)[i % COLUMNS] for i in range(count)]
    elif classes:
        condition = (torch.arange(count, device="cpu") % COLUMNS % classes).to(device)
    shape = (count, process.blocks * data.images.shape[1], *data.images.shape[2:])
    draws = BatchDraws(problem.config.seed, len(data), problem.config.batch)
    noise = torch.randn(shape, generator=draws.generator(2), device="cpu", dtype=torch.float32).to(device)
    first = problem.reference.covariance(process, torch.tensor([process.t_max], dtype=torch.float64, device="cpu"))
    start = process.basis.inverse(first.cholesky()[0].apply(noise))
    plan = SOLVERS["ddim"](process, angle(process, STEPS, end=process.t_min))
    model.module.eval()
    return process.image(run_plan(plan, model.given(condition).denoiser, start, callback=callback))


def report_on(folder: Path, problem: Problem, state: State, resumed_from: int) -> Report:
    """What a run did."""
    last = state.losses[-max(1, len(state.losses) // 10) :]
    images = state.step * problem.config.batch
    return Report(
        folder=folder,
        steps=state.step,
        images=images,
        seconds=state.seconds,
        images_per_second=images / max(state.seconds, 1e-9),
        loss=sum(last) / max(1, len(last)),
        parameters=sum(p.numel() for p in state.network.parameters()),
        resumed_from=resumed_from,
    )


def _save_model(folder: Path, problem: Problem, state: State, model: Model) -> None:
    config, captions = problem.config, problem.data.captions
    info: dict[str, Any] = {
        "data": config.card.data,
        "licence": config.card.licence,
        **({} if captions is None else {"captions": examples(captions)}),
        "training": {**config.to_dict(), "step": state.step, "seconds": round(state.seconds, 1)},
    }
    dtype = torch.float16 if config.half else torch.float32
    save_model(replace(model, info=info), folder, _card(folder, problem, state), dtype)


def _card(folder: Path, problem: Problem, state: State) -> str:
    report, config, card = report_on(folder, problem, state, 0), problem.config, problem.config.card
    told = "captions" if problem.data.captions else "classes"
    shown = (
        f"such as {problem.data.captions[0]!r}" if problem.data.captions else ", ".join(problem.data.classes) or "none"
    )
    shape = "x".join(str(n) for n in problem.data.images.shape[1:])
    return f"""# {folder.name}

A diffusion model trained with Pushforward.

| | |
|---|---|
| data | {_cell(card.data)} ({len(problem.data)} images) |
| licence of the data | {_cell(card.licence)} |
| images (channels x height x width) | {shape} |
| {told} | {_cell(shown)} |
| process | {problem.process.name} |
| prediction | {config.prediction} |
| network | {config.network}, {report.parameters:,} parameters |
| trained | {report.steps:,} steps of {config.batch} images ({report.images / len(problem.data):.1f} epochs) |
| time | {report.seconds / 60:.1f} minutes, {report.images_per_second:.0f} images/s |
| loss | {report.loss:.4f} (mean of the last tenth) |

Made by:

{indent(card.command, "    ")}
"""


def _cell(text: str) -> str:
    """Text as Markdown shows it in a cell of a table: in one line, and no sign of it marks anything."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", " ".join(text.split()))
