"""Training a model of any linear diffusion.

The loss is the mean square of `network(u, t) - target` over images, noise and times, with state and target as
`TargetTable` makes them for the process and the prediction. The default prediction, the residual of the reference
Gaussian, has unit variance at every time.

The path of the data: settings and images make a `Problem` (config, problem); it and the devices make a `State` (state),
whose network first learns to sketch, if it reads captions (sketch); a step takes a batch (batches) to a loss (targets)
and the state on; the state is written as a model, checkpoint, log and pictures (outputs, checkpoint).

References:
    Karras et al., arXiv 2206.00364, section 5 (preconditioning).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pushforward.data.datasets import ImageData
from pushforward.model.network import Network
from pushforward.training.batches import Batch, BatchDraws, Batches
from pushforward.training.checkpoint import resume, tidy
from pushforward.training.config import Card, TrainConfig
from pushforward.training.outputs import Outputs, Report, report_on
from pushforward.training.problem import Problem
from pushforward.training.sketch import fit_sketcher
from pushforward.training.state import State, make_accelerator, make_state
from pushforward.training.stopping import Agreement, Interrupted, Stop, stopping
from pushforward.training.targets import Objective

__all__ = ["Card", "Interrupted", "Report", "TrainConfig", "train"]


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
        aside: told what else is under way, sketches, a checkpoint or a picture, and the fraction of it that is done.

    Raises:
        PushforwardError: settings that do not fit the data or the training in `folder`; `accelerate` is missing; the
            folder cannot be written (the last checkpoint remains).
        Interrupted: a signal came; it is a `KeyboardInterrupt`.
    """
    with stopping() as stop:
        problem = Problem.of(config, data)
        accelerator = make_accelerator(config)
        state = make_state(problem, accelerator)
        resume(Path(folder), problem, state)
        if accelerator.is_main_process:
            tidy(Path(folder), state.step)
        return _go_on(problem, state, Path(folder), accelerator, stop, callback or _nothing, aside or _nothing)


def _nothing(*_: object) -> None:
    """The default of callbacks."""


def _go_on(
    problem: Problem,
    state: State,
    folder: Path,
    accelerator: Any,
    stop: Stop,
    callback: Callable[[int, float, float], None],
    aside: Callable[[str, float], None],
) -> Report:
    """The loop, from the state on to the end of the run or a request to stop."""
    config, device, resumed_from = problem.config, accelerator.device, state.step
    model = problem.model(state.averaged, folder.name)
    assert isinstance(model.denoiser, Network)
    objective = Objective.on(device, problem.table, model.denoiser.time_scale)
    batches = _batches(problem, accelerator)
    if problem.architecture.sketches and not state.step:
        fit_sketcher(state.network, batches, problem.process, stop, aside)
        state.averaged.sketcher.load_state_dict(state.network.sketcher.state_dict())
    agreement = Agreement(accelerator, stop, state.seconds)
    state.wrapped.train()
    began = time.monotonic() - state.seconds
    outputs = Outputs(folder, problem, state, model, stop, aside, main=accelerator.is_main_process)
    state.seconds = agreement.agree(state.seconds)
    outputs.catch_up()
    while state.done < 1 and not agreement.stopped:
        state.unread.append(_step(state, objective, batches.at(state.step), accelerator))
        state.step += 1
        if device.type == "cpu" or state.step % config.log_every == 0:
            state.read_losses()
        state.seconds = agreement.agree(time.monotonic() - began)
        if state.step % config.log_every == 0:
            outputs.log()
        state.scheduler.step()
        if agreement.stopped:
            break
        if state.done < 1:
            outputs.keep()
        callback(state.step, state.losses[-1] if state.losses else math.nan, state.done)
    if state.step > outputs.saved:
        outputs.save()
    if state.done == 1 and config.sample_every != 0:
        outputs.illustrate(last=True)
    state.seconds = agreement.agree(state.seconds, now=True)  # and wait for one another
    if agreement.stopped:
        raise Interrupted(_said(state, outputs), agreement.number)
    return report_on(folder, problem, state, resumed_from)


def _batches(problem: Problem, accelerator: Any) -> Batches:
    config = problem.config
    return Batches(
        problem.data,
        BatchDraws(config.seed, len(problem.data), config.batch),
        blocks=problem.process.blocks,
        times=len(problem.table.times),
        label_dropout=config.label_dropout,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device=accelerator.device,
    )


def _step(state: State, objective: Objective, batch: Batch, accelerator: Any) -> Tensor:
    """One step; its loss is left on the device: the next step is queued behind this one, and waits for nothing."""
    loss = objective.loss(state.wrapped, batch)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(state.wrapped.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.average.update_parameters(state.network)
    mean: Tensor = accelerator.gather(loss.detach().reshape(1)).mean()
    return mean


def _said(state: State, outputs: Outputs) -> str:
    """What a user is told who stopped the training."""
    folder = outputs.folder
    if state.done < 1:
        if not state.step:
            return "Interrupted before the first step: there is nothing to save. The same command begins again."
        return f"Interrupted: the training is saved in {folder} at step {state.step}; the same command goes on."
    missing = outputs.problem.config.sample_every != 0 and not outputs.picture.exists()
    rest = " but for its last picture, which the same command draws" if missing else ""
    return f"Interrupted at the end: the trained model in {folder} is complete{rest}."
