"""How a model is trained: the settings, and what follows from them alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pushforward.data import schema
from pushforward.errors import PushforwardError
from pushforward.linear import PROCESSES, Process, process_from_config
from pushforward.model.prediction import Prediction

__all__ = ["Card", "TrainConfig"]


@dataclass(frozen=True)
class Card:
    """What the model card says of the data.

    Args:
        data: their name or path.
        licence: licence of the data.
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
        batch: images for each step, over all devices.
        learning_rate: its highest value: it rises for `warmup` steps and falls to zero along a cosine.
        warmup: steps.
        weight_decay: of AdamW.
        ema: decay of the moving average of the weights.
        label_dropout: share of labels or captions hidden, for guidance. (Of half of the other captions, each part that
            commas separate is hidden by the toss of a coin, so that parts can be given alone.)
        scale: standard deviation of the reference Gaussian; by default measured: the data's root mean square.
        precision: `auto` (bfloat16 on a GPU or a CPU with instructions for it), `no`, `bf16` or `fp16`.
        compile: run the network through `torch.compile`; refused on a CPU, where its gradients were wrong.
        save_every: steps between checkpoints; by default they go by the clock: after half a minute, then every three
            minutes, or less often where they would cost more than 2 % of the time.
        sample_every: steps between pictures (samples and loss curve), the last one included; 0 for none; by default by
            the clock, likewise.
        log_every: steps between lines of the log.
        seed: seed of the weights and of all that is drawn.
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
        schema.check_fields(self)
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

    def process_for(self, size: tuple[int, int]) -> Process:
        """The forward process, for images of a size."""
        settings = dict(self.process_settings)
        if "field" in getattr(PROCESSES.get(self.process), "__dataclass_fields__", {}):
            settings["field"] = size
        return process_from_config({"name": self.process, **settings})

    def done(self, step: int, seconds: float) -> float:
        """The share of the run that is done after so many steps and seconds, by whichever ends it first."""
        steps = step / self.steps if self.steps else 0.0
        minutes = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(steps, minutes))

    def rate(self, step: int, done: float) -> float:
        """The share of the highest learning rate that a step takes: a rise, then a cosine of the share done."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warm * max(0.5 * (1 + math.cos(math.pi * done)), 1e-3)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values
