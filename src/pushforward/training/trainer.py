"""Training a model of any linear diffusion.

The loss is the mean square of `network(u, t) - target` over images, noise and times, with state and target as
`TargetTable` makes them for the process and the prediction. The default prediction, the residual of the reference
Gaussian, has unit variance at every time.

Nothing is drawn from a global generator: the images, times, noise and hidden labels of a step are functions of (seed,
step, process). So a run that is killed and resumed gives the weights of a run that was not.

References:
    Ho & Salimans, arXiv 2207.12598, algorithm 1 (hiding labels);
    Karras et al., arXiv 2206.00364, section 5 (preconditioning).
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from pushforward.data.datasets import ImageData
from pushforward.data.files import atomic_path, naming
from pushforward.data.memory import check_memory
from pushforward.data.pictures import save_image, sheet
from pushforward.data.schema import check, parse
from pushforward.errors import Diverged, PushforwardError
from pushforward.execute import Progress
from pushforward.execute import run as run_plan
from pushforward.linear import PROCESSES, Gaussian, Process, fit, process_from_config
from pushforward.model.backbone import Backbone, BackboneConfig, preset
from pushforward.model.model import Model, save_model, trained
from pushforward.model.network import Network
from pushforward.model.prediction import Prediction, is_image
from pushforward.model.tokens import tokens
from pushforward.plan import SOLVERS
from pushforward.plan.grid import angle
from pushforward.training.plots import loss_curve
from pushforward.training.stopping import Clock, Interrupted, Stop, stopping
from pushforward.training.targets import TIMES, BatchDraws, TargetTable

__all__ = ["Card", "Interrupted", "Report", "TrainConfig", "train"]

WORDS = 4096  # rows of the table of hashed words, of a network that reads captions
_LATE = 2  # steps after which processes act on what they told one another: reading it sooner would have GPUs wait
_MAY_CHANGE = {"steps", "minutes", "save_every", "sample_every", "log_every", "half", "compile", "card"}


@dataclass(frozen=True)
class Card:
    """What the model card says of the data.

    Args:
        data: their name or path.
        licence: of the data.
        command: that made the model.
    """

    data: str = "not stated"
    licence: str = "not stated"
    command: str = "not stated"


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        process: name of the forward process.
        process_settings: its parameters, other than the image size.
        network: name of a network, see `PRESETS`.
        prediction: what the network predicts.
        steps: stop after these optimiser steps.
        minutes: stop after this time (of all runs together); with `steps`, whichever comes first.
        batch: images a step, over all devices.
        learning_rate: its highest value: it rises for `warmup` steps and falls to zero along a cosine.
        warmup: steps.
        weight_decay: of AdamW.
        ema: decay of the moving average of the weights.
        label_dropout: share of labels or captions hidden, for guidance. (Of half of the other captions, each part that
            commas separate is hidden by the toss of a coin, so that parts can be given alone.)
        scale: standard deviation of the reference Gaussian; by default measured: the data's root mean square.
        precision: `auto` (bfloat16 where the device is fast at it), `no`, `bf16` or `fp16`.
        compile: run the network through `torch.compile`; refused on a CPU, where its gradients were wrong.
        save_every: steps between checkpoints; by default they go by the clock: after half a minute, then every three
            minutes, or less often where they would cost more than 2 % of the time.
        sample_every: steps between pictures (samples and loss curve), the last one included; 0 for none; by default by
            the clock, likewise.
        log_every: steps between lines of the log.
        seed: of the weights and of all that is drawn.
        half: store the final weights in 16 bits.
        card: for the model card.
    """

    process: str = "vp"
    process_settings: dict[str, Any] = field(default_factory=dict)
    network: str = "small"
    prediction: Prediction = "residual"
    steps: int | None = None
    minutes: float | None = None
    batch: int = 64
    learning_rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    label_dropout: float = 0.1
    scale: float | None = None
    precision: str = "auto"
    compile: bool = False
    save_every: int | None = None
    sample_every: int | None = None
    log_every: int = 20
    seed: int = 0
    half: bool = False
    card: Card = field(default_factory=Card)

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise PushforwardError("Say when to stop: give steps or minutes.")
        for name in ("steps", "minutes", "batch", "learning_rate", "save_every", "log_every", "scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise PushforwardError(f"The option {name} must be positive; got {value}.")
        for name in ("sample_every", "warmup", "weight_decay", "seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise PushforwardError(f"The option {name} must be 0 or more; got {value}.")
        for name in ("ema", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise PushforwardError(f"The option {name} must be at least 0 and below 1; got {getattr(self, name)}.")
        if self.precision not in ("auto", "no", "bf16", "fp16"):
            raise PushforwardError(f"The precision is auto, no, bf16 or fp16; got {self.precision!r}.")


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
        parameters: of the network.
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


@dataclass(frozen=True)
class _Kept:
    """Of a checkpoint, what is no tensor."""

    config: dict[str, Any]
    data: tuple[int, ...]
    step: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class _Logged:
    """Of a line of the log, what is needed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    step: int


# -- the run ---------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    data: ImageData,
    folder: str | os.PathLike[str],
    *,
    callback: Callable[[int, float, float], None] | None = None,
    aside: Callable[[str, float], None] | None = None,
) -> Report:
    """Train a model, or go on with the training that `folder` holds.

    The folder is a complete model from the first checkpoint on (`config.json`, `model.safetensors` with the averaged
    weights, `README.md`); its sub-folder `training` has the checkpoint, the log, sample pictures and the loss curve.
    Under `accelerate launch` each process takes its share of every batch.

    SIGINT (Ctrl-C), SIGTERM or SIGHUP to any of the processes stops all of them after the step, or picture, that is
    under way, with a checkpoint; a second signal ends the process at once.

    Args:
        config: how.
        data: the images.
        folder: where.
        callback: told (step, loss, fraction of the run done) after every step; on a GPU the loss is the latest one
            read, as reading each would have the GPU wait.
        aside: told what else is under way, a checkpoint or a picture, and the fraction of it that is done.

    Raises:
        PushforwardError: settings that do not fit the data or the training in `folder`; `accelerate` is missing; the
            folder cannot be written (the last checkpoint remains).
        Interrupted: a signal came; it is a `KeyboardInterrupt`.
    """
    with stopping() as stop:
        return _Run(config, data, Path(folder), stop).go(callback, aside or _nothing)


def _nothing(what: str, done: float) -> None:
    """The default of `aside`."""


class _Run:
    """The state of a run: network, optimiser, average, counters."""

    def __init__(self, config: TrainConfig, data: ImageData, folder: Path, stop: Stop) -> None:
        if len(data) == 0:
            raise PushforwardError("There are no images to train on.")
        _check_labels(data)
        self.config, self.data, self.folder, self.stop = config, data, folder, stop
        channels, *size = data.images.shape[1:]
        self.process = make_process(config, (size[0], size[1]))
        scale = config.scale or _root_mean_square(data.images)
        self.reference = Gaussian(scale**2)
        floats = config.batch * self.process.blocks * data.images[0].numel()  # as noise, state, input, target, answer
        check_memory(20 * floats, f"A batch of {config.batch:,} images")
        self.statistics, self.means = _statistics(data)
        self.architecture = self._architecture(channels, (size[0], size[1]), scale)
        lesson = TargetTable.make(self.process, config.prediction, self.reference)
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.draws = BatchDraws(config.seed, len(data), config.batch)
        self.lesson = lesson.to(self.device)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.network = Backbone(self.architecture)
        self.average = AveragedModel(self.network, multi_avg_fn=self._move).to(self.device)
        self.average.n_averaged = self.average.n_averaged.cpu()  # a count on a GPU would be waited for at every step
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model = self._model()
        assert isinstance(self.model.denoiser, Network)
        self.clock = (self.model.denoiser.time_scale * self.lesson.times).to(self.device, torch.float32)
        if config.compile and self.device.type == "cpu":
            raise PushforwardError(
                "On a CPU, torch.compile has given wrong gradients of these networks (PyTorch 2.13: off by 0.4 of "
                "their size): leave --compile out, or train on a GPU."
            )
        network: nn.Module = torch.compile(self.network) if config.compile else self.network  # type: ignore[assignment]
        self.wrapped, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self.unread = list[Tensor]()  # the losses of the latest steps, where the device has them
        self.scheduler = LambdaLR(optimizer, self._rate)
        self.stopped_by = 0  # the signal, once all processes know it
        self.told = deque[Tensor]()  # seconds and signals, of the latest steps
        self.aside: Callable[[str, float], None] = _nothing
        self.resumed_from = self.saved = self._resume()

    def _architecture(self, channels: int, size: tuple[int, int], scale: float) -> BackboneConfig:
        blocks = self.process.blocks
        return preset(
            self.config.network,
            field=size,
            in_channels=blocks * channels,
            out_channels=channels if is_image(self.config.prediction) else blocks * channels,
            classes=0 if self.data.captions else len(self.data.classes),
            words=WORDS if self.data.captions else 0,
            time_angle=scale if self.process.t_max > 1 else 0.0,
        )

    # -- schedule

    def _fraction(self) -> float:
        """How much of the run is done, by steps or by time."""
        steps = self.step / self.config.steps if self.config.steps else 0.0
        minutes = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(steps, minutes))

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.config.warmup) if self.config.warmup else 1.0
        return warm * max(0.5 * (1 + math.cos(math.pi * self._fraction())), 1e-3)

    # -- the loop

    def go(self, callback: Callable[[int, float, float], None] | None, aside: Callable[[str, float], None]) -> Report:
        self.wrapped.train()
        self.aside = aside
        clock, started = time.monotonic(), self.seconds
        self.saving, self.drawing = Clock(clock), Clock(clock)
        self._agree(started)
        if self.config.sample_every and self._due(self.config.sample_every, self.drawing) and self.step:
            self._illustrate()  # unless the interruption let it be drawn
        while self._fraction() < 1 and not self._stopped():
            self.unread.append(self._one_step())
            self.step += 1
            if self.device.type == "cpu" or self.step % self.config.log_every == 0:
                self._read_losses()
            self._agree(started + time.monotonic() - clock)
            self.scheduler.step()
            if self.step % self.config.log_every == 0 and self.accelerator.is_main_process:
                self._log()
            if self._stopped():
                break
            if self._fraction() < 1:
                self._keep()
            if callback is not None:
                callback(self.step, self.losses[-1] if self.losses else math.nan, self._fraction())
        if self.step > self.saved:
            self._save()
        if self._fraction() == 1 and self.config.sample_every != 0:
            self._illustrate(last=True)
        self._agree(self.seconds, now=True)  # and wait for one another
        if self._stopped():
            raise Interrupted(self._said(), self.stopped_by)
        return self._report()

    def _agree(self, seconds: float, *, now: bool = False) -> None:
        """Take the same time and the same request to stop on all processes, so that all stop at the same step."""
        if self.accelerator.num_processes == 1:
            self.seconds = seconds
            return
        mine = torch.tensor([[seconds, self.stop.number]], device=self.device)
        self.told.append(self.accelerator.gather(mine).amax(0))
        while len(self.told) > (0 if now else _LATE):
            self.seconds, number = self.told.popleft().tolist()
            self.stopped_by = int(number)

    def _stopped(self) -> bool:
        """Whether all processes know of a request to stop."""
        if self.accelerator.num_processes == 1:
            self.stopped_by = self.stop.number
        return self.stopped_by != 0

    def _said(self) -> str:
        """What a user is told who stopped the training."""
        if self._fraction() < 1:
            if not self.step:
                return "Interrupted before the first step: there is nothing to save. The same command begins again."
            return f"Interrupted: the training is saved in {self.folder} at step {self.step}; the same command goes on."
        missing = self.config.sample_every != 0 and not self._picture.exists()
        rest = " but for its last picture, which the same command draws" if missing else ""
        return f"Interrupted at the end: the trained model in {self.folder} is complete{rest}."

    def _one_step(self) -> Tensor:
        """The loss, left on the device: the next step is queued behind this one, and waits for nothing."""
        images, condition, k, noise = self._batch()
        seen, target = self.lesson.draw(images, k, noise)
        answer = self.wrapped(seen, self.clock[k], condition)
        loss = (answer.float() - target).square().mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.network)
        mean: Tensor = self.accelerator.gather(loss.detach().reshape(1)).mean()
        return mean

    def _read_losses(self) -> None:
        """Wait for the steps that were queued, and see that their losses are finite."""
        values = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        for value in values:
            if not math.isfinite(value):
                raise PushforwardError(
                    f"The loss is not finite at step {len(self.losses)}; the last checkpoint is kept. "
                    "Use a lower learning rate."
                )
            self.losses.append(value)

    @torch.no_grad()
    def _move(self, averages: Any, current: Any, _count: Any) -> None:
        """`a <- d a + (1 - d) w`, d rising to `ema` as `(1 + n) / (10 + n)` so that the first weights are forgotten."""
        n = float(self.average.n_averaged)
        torch._foreach_lerp_(averages, current, 1 - min(self.config.ema, (1 + n) / (10 + n)))

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """This process's images in [-1, 1], their labels or words, indices of times and noise."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        chosen = self.draws.indices(self.step)[rank::ranks]
        images = self.data.images[chosen].to(self.device).float() / 127.5 - 1
        generator = self.draws.generator(1, self.step, rank)
        k = torch.randint(TIMES, (len(chosen),), generator=generator)
        shape = (len(chosen), self.process.blocks * images.shape[1], *images.shape[2:])
        noise = torch.randn(shape, generator=generator).to(self.device)
        condition = self._condition(chosen, generator)
        return images, None if condition is None else condition.to(self.device), k.to(self.device), noise

    def _condition(self, chosen: Tensor, generator: torch.Generator) -> Tensor | None:
        """What the network is told of the chosen images: their words or labels, some hidden."""
        captions, labels = self.data.captions, self.data.labels
        if captions is None and labels is None:
            return None
        hidden = torch.rand(len(chosen), generator=generator) < self.config.label_dropout
        if captions is not None:
            shown = [
                "" if hide else hide_parts(captions[i], generator)
                for i, hide in zip(chosen.tolist(), hidden.tolist(), strict=True)
            ]
            return tokens(shown, WORDS)
        assert labels is not None
        return torch.where(hidden, len(self.data.classes), labels[chosen])

    # -- what is kept

    def _keep(self) -> None:
        if self._due(self.config.save_every, self.saving):
            self._save()
        if self._due(self.config.sample_every, self.drawing):
            self._illustrate()

    def _due(self, every: int | None, clock: Clock) -> bool:
        """Whether something that a user wants so often is due; on the main process, which does it."""
        if every is None:
            return time.monotonic() >= clock.due
        return every > 0 and self.step % every == 0

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
                f"The {what} of step {self.step} cannot be written to {self.folder} ({why}); {kept}. Mend that, and "
                "the same command goes on."
            ) from error
        if clock is not None:
            now = time.monotonic()
            clock.done(now, now - began)
            self.aside(what, 1.0)

    @property
    def _training(self) -> Path:
        return self.folder / "training"

    def _log(self) -> None:
        recent = self.losses[-self.config.log_every :]
        line = {
            "step": self.step,
            "images": self.step * self.config.batch,
            "seconds": round(self.seconds, 2),
            "loss": round(sum(recent) / len(recent), 6),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        path = self._training / "log.jsonl"
        with self._writing("log"):
            self._training.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        """The model and the checkpoint, each whole or not at all; of finite losses only."""
        self._read_losses()
        if not self.accelerator.is_main_process:
            self.saved = self.step
            return
        state = {
            "config": _jsonable(self.config),
            "data": [len(self.data), *self.data.images.shape[1:]],
            "step": self.step,
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {**self.scheduler.state_dict(), "lr_lambdas": [None]},
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        with self._writing("checkpoint", self.saving):
            _save_model(self)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            with atomic_path(self._training / "checkpoint.pt") as temporary:
                temporary.write_bytes(buffer.getbuffer())  # an error of the disk has its own name this way
        self.saved = self.step

    def _resume(self) -> int:
        path = self._training / "checkpoint.pt"
        for file in (path, path.with_name("log.jsonl")):
            if file.exists() and not file.is_file():
                raise PushforwardError(f"{file} is no file; remove it.")
        if path.exists():
            try:
                self._load(torch.load(path, map_location="cpu", weights_only=True), path)
            except PushforwardError:
                raise
            except Exception as error:  # of pickle, zip, or what the parts find missing or of another kind
                what = f"lacks the entry {error}" if isinstance(error, KeyError) else "is no readable checkpoint"
                raise PushforwardError(f"{path} {what}; remove it to start anew.") from error
        if self.accelerator.is_main_process:
            self._tidy()
        return self.step

    def _load(self, state: dict[str, Any], path: Path) -> None:
        plain = {entry.name: state[entry.name] for entry in fields(_Kept)}
        kept = check(plain, _Kept, str(path), "remove it to start anew")
        self._check_same(state)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.losses = kept.step, kept.seconds, state["losses"].tolist()

    def _check_same(self, state: dict[str, Any]) -> None:
        mine = _jsonable(self.config)
        changed = [k for k in mine if k not in _MAY_CHANGE and mine[k] != state["config"].get(k)]
        if state["data"] != [len(self.data), *self.data.images.shape[1:]]:
            changed.append("data")
        shapes = [{k: v.shape for k, v in weights.items()} for weights in (self.network.state_dict(), state["network"])]
        if not changed and shapes[0] != shapes[1]:
            changed.append("classes or captions")
        if changed:
            raise PushforwardError(
                f"{self.folder} holds a training with other settings ({', '.join(changed)} differ); "
                "give the same ones to go on with it, or another folder."
            )

    def _tidy(self) -> None:
        """Drop what came after the checkpoint, as it will come again, and what a kill left half written."""
        log = self._training / "log.jsonl"
        if log.exists():
            whole = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            said = [parse(one, _Logged, f"Line {n} of {log}", "remove the line") for n, one in enumerate(whole, 1)]
            with atomic_path(log) as temporary:
                kept = [line for line, entry in zip(whole, said, strict=True) if entry.step <= self.step]
                temporary.write_bytes(b"".join(kept))
        for picture in self._training.glob("samples-*.png"):
            if picture.stem.removeprefix("samples-").isdecimal() and int(picture.stem[8:]) > self.step:
                picture.unlink()
        for place in (self.folder, self._training):
            for half in place.glob(f".{'[0-9a-f]' * 16}.*"):
                half.unlink()

    @property
    def _picture(self) -> Path:
        return self._training / f"samples-{self.step:07d}.png"

    def _illustrate(self, *, last: bool = False) -> None:
        """The loss curve and sampled images, if they are not there yet; given up where a stop is asked for."""
        self._read_losses()
        if not self.accelerator.is_main_process or self.stop.number or self._picture.exists():
            return
        what = "last picture" if last else "picture"
        with self._writing(what, self.drawing):
            with atomic_path(self._training / "loss.png") as temporary:
                loss_curve(self.losses, temporary)
            try:
                images = self.sample(callback=lambda done: self._drawn(what, done))
            except Diverged:  # at the beginning a network may give anything
                if last:
                    raise
                return
            except _Enough:
                return
            save_image(sheet(images, columns=10), self._picture)

    def _drawn(self, what: str, done: Progress) -> None:
        if self.stop.number:
            raise _Enough
        self.aside(what, done.done / done.total)

    def _model(self) -> Model:
        """The averaged network as a model."""
        module = self.average.module
        assert isinstance(module, Backbone)
        return trained(
            module,
            self.process,
            tuple(self.data.images.shape[1:]),
            name=self.folder.name,
            prediction=self.config.prediction,
            variance=float(self.reference.variance),
            classes=() if self.data.captions else self.data.classes,
            statistics=self.statistics,
            means=self.means,
        )

    @torch.no_grad()
    def sample(
        self, rows: int = 8, columns: int = 10, steps: int = 30, callback: Callable[[Progress], None] | None = None
    ) -> Tensor:
        """A few images in [-1, 1] from the averaged network, a class or caption a column, by deterministic DDIM."""
        count, captions, classes = rows * columns, self.data.captions, len(self.data.classes)
        condition: Tensor | list[str] | None = None
        if captions:
            condition = [examples(captions, columns)[i % columns] for i in range(count)]
        elif classes:
            condition = (torch.arange(count) % columns % classes).to(self.device)
        shape = (count, self.process.blocks * self.data.images.shape[1], *self.data.images.shape[2:])
        noise = torch.randn(shape, generator=self.draws.generator(2)).to(self.device)
        first = self.reference.covariance(self.process, torch.tensor([self.process.t_max], dtype=torch.float64))
        start = self.process.basis.inverse(first.cholesky()[0].apply(noise))
        plan = SOLVERS["ddim"](self.process, angle(self.process, steps, end=self.process.t_min))
        self.average.eval()
        return self.process.image(run_plan(plan, self.model.given(condition).denoiser, start, callback=callback))

    def _report(self) -> Report:
        last = self.losses[-max(1, len(self.losses) // 10) :]
        images = self.step * self.config.batch
        return Report(
            folder=self.folder,
            steps=self.step,
            images=images,
            seconds=self.seconds,
            images_per_second=images / max(self.seconds, 1e-9),
            loss=sum(last) / max(1, len(last)),
            parameters=sum(p.numel() for p in self.network.parameters()),
            resumed_from=self.resumed_from,
        )


def _check_labels(data: ImageData) -> None:
    """Raise unless each image has a label, and each label is a class's.

    Raises:
        PushforwardError: it has not.
    """
    labels, classes = data.labels, len(data.classes)
    if labels is None or data.captions is not None:
        return
    fitting = labels.shape == (len(data),) and not labels.is_floating_point()
    if not fitting or int(labels.min()) < 0 or int(labels.max()) >= classes:
        got = f"from {labels.min().item()} to {labels.max().item()}" if labels.numel() else "none"
        raise PushforwardError(
            f"{len(data)} images of {classes} classes need as many labels, whole numbers from 0 to {classes - 1}; got "
            f"{tuple(labels.shape)} of them, {got}."
        )


class _Enough(Exception):
    """A picture is given up."""


def hide_parts(caption: str, generator: torch.Generator) -> str:
    """The caption, or in half of the cases what is left of it when a coin is tossed for each of its parts."""
    parts = caption.split(",")
    coins = torch.rand(1 + len(parts), generator=generator).tolist()
    kept = [part for part, coin in zip(parts, coins[1:], strict=True) if coin < 0.5]
    return caption if coins[0] < 0.5 else ",".join(kept)


def examples(captions: Sequence[str], count: int = 10) -> list[str]:
    """A few captions, evenly from all."""
    return [captions[k * len(captions) // count] for k in range(count)]


def make_process(config: TrainConfig, size: tuple[int, int]) -> Process:
    """The forward process that the settings name, for images of a size."""
    settings = dict(config.process_settings)
    if "field" in getattr(PROCESSES.get(config.process), "__dataclass_fields__", {}):
        settings["field"] = size
    return process_from_config({"name": config.process, **settings})


def _accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise PushforwardError("Training needs accelerate: pip install 'pushforward[train]'.") from error
    precision = config.precision
    if precision == "auto":
        fast = torch.cuda.is_available() or bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
        precision = "bf16" if fast else "no"
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError:  # an earlier training in this Python process had another precision
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=precision)
    if config.batch % accelerator.num_processes:
        raise PushforwardError(
            f"The batch of {config.batch} images does not split evenly over {accelerator.num_processes} processes."
        )
    return accelerator


def _root_mean_square(images: Tensor) -> float:
    """Of the images in [-1, 1], from their histogram (exact, without a copy in floating point)."""
    counts = torch.bincount(images.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    return max(math.sqrt(float((counts * values.square()).sum() / counts.sum())), 1e-2)


def _statistics(data: ImageData, most: int = 8192) -> tuple[Gaussian | None, Tensor | None]:
    """The Gaussian of the images in [-1, 1] and the means of their classes, from at most `most` of them, evenly."""
    if len(data) < 2:
        return None, None
    stride = -(-len(data) // most)
    images = data.images[::stride].float() / 127.5 - 1
    gaussian = fit(images)
    if data.labels is None or not data.classes or data.captions:
        return gaussian, None
    labels = data.labels[::stride]
    overall = torch.as_tensor(gaussian.mean).float()
    of = [images[labels == k] for k in range(len(data.classes))]
    return gaussian, torch.stack([some.mean(0) if len(some) else overall for some in of])


def _jsonable(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


# -- the model's folder ----------------------------------------------------------------------------------------------


def _save_model(run: _Run) -> None:
    info = {
        "data": run.config.card.data,
        "licence": run.config.card.licence,
        **({} if run.data.captions is None else {"captions": examples(run.data.captions)}),
        "training": {**_jsonable(run.config), "step": run.step, "seconds": round(run.seconds, 1)},
    }
    dtype = torch.float16 if run.config.half else torch.float32
    save_model(replace(run.model, info=info), run.folder, _card(run), dtype)


def _card(run: _Run) -> str:
    report, config, card = run._report(), run.config, run.config.card
    told = "captions" if run.data.captions else "classes"
    shown = f"such as {run.data.captions[0]!r}" if run.data.captions else ", ".join(run.data.classes) or "none"
    shape = "x".join(str(n) for n in run.data.images.shape[1:])
    return f"""# {run.folder.name}

A diffusion model trained with Pushforward.

| | |
|---|---|
| data | {card.data} ({len(run.data)} images) |
| licence of the data | {card.licence} |
| images (channels x height x width) | {shape} |
| {told} | {shown} |
| process | {run.process.name} |
| prediction | {config.prediction} |
| network | {config.network}, {report.parameters:,} parameters |
| trained | {report.steps:,} steps of {config.batch} images ({report.images / len(run.data):.1f} epochs) |
| time | {report.seconds / 60:.1f} minutes, {report.images_per_second:.0f} images/s |
| loss | {report.loss:.4f} (mean of the last tenth) |
| command | `{card.command}` |
"""
