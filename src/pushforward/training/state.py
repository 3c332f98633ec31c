"""The state of a training: what changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from pushforward.errors import PushforwardError
from pushforward.execute.distributed import leave_at_exit
from pushforward.model.backbone import Backbone
from pushforward.training.config import TrainConfig
from pushforward.training.problem import Problem

__all__ = ["State", "make_accelerator", "make_state"]


@dataclass(eq=False)
class State:
    """What changes while a network is trained.

    Args:
        config: how.
        network: in training.
        wrapped: the same, as it is asked: compiled, in parallel, in lower precision.
        average: the moving average of its weights.
        optimizer: of its weights.
        scaler: scaler of the loss, in float16.
        step: optimiser steps done.
        seconds: of training, of all runs together.
        losses: losses of the steps, but for the latest, where the device has not given them yet.
        unread: those.
        scheduler: schedule of the learning rate, which follows `done`.
    """

    config: TrainConfig
    network: Backbone
    wrapped: nn.Module
    average: AveragedModel
    optimizer: Any
    scaler: Any
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)
    scheduler: LambdaLR = field(init=False)

    @property
    def averaged(self) -> Backbone:
        """The network with the averaged weights."""
        assert isinstance(self.average.module, Backbone)
        return self.average.module

    @property
    def done(self) -> float:
        """The share of the run that is done, by steps or by time."""
        return self.config.done(self.step, self.seconds)

    def read_losses(self) -> None:
        """Wait for the steps that were queued, and see that their losses are finite.

        Raises:
            PushforwardError: they are not.
        """
        values = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        for value in values:
            if not math.isfinite(value):
                raise PushforwardError(
                    f"The loss is not finite at step {len(self.losses)}; the same command with a lower learning rate "
                    "goes on from the last checkpoint, or begins anew where there is none."
                )
            self.losses.append(value)


def make_accelerator(config: TrainConfig) -> Any:
    """The devices and processes that share the training, as `accelerate` has them.

    Raises:
        PushforwardError: `accelerate` is missing, or the settings do not fit the devices.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise PushforwardError("Training needs accelerate: pip install 'pushforward[train]'.") from error
    leave_at_exit()
    precision = config.precision
    if precision == "auto":
        # Processors with AMX have AVX-512's bfloat16, too.
        fast = torch.cuda.is_available() or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
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
    if config.compile and accelerator.device.type == "cpu":
        raise PushforwardError(
            "On a CPU, torch.compile has given wrong gradients of these networks (PyTorch 2.13: off by 0.4 of "
            "their size): leave --compile out, or train on a GPU."
        )
    return accelerator


def make_state(problem: Problem, accelerator: Any) -> State:
    """The state before the first step, of weights drawn by the seed."""
    config = problem.config
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = Backbone(problem.architecture)
    average = _average(network, config.ema, accelerator.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    asked: Callable[..., Any] = torch.compile(network) if config.compile else network
    wrapped, prepared = accelerator.prepare(asked, optimizer)
    state = State(config, network, wrapped, average, prepared, accelerator.scaler)
    state.scheduler = LambdaLR(optimizer, lambda step: config.rate(step, state.done))
    return state


def _average(network: Backbone, ema: float, device: torch.device) -> AveragedModel:
    """The average `a <- d a + (1 - d) w`, d rising to `ema` as `(1 + n) / (10 + n)` to forget the first weights."""

    @torch.no_grad()
    def move(averages: Any, current: Any, _count: Any) -> None:
        n = float(average.n_averaged)
        torch._foreach_lerp_(averages, current, 1 - min(ema, (1 + n) / (10 + n)))

    average = AveragedModel(network, multi_avg_fn=move).to(device)
    average.n_averaged = average.n_averaged.cpu()  # a count on a GPU would be waited for at every step
    return average
