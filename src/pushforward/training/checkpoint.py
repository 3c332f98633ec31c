"""Checkpoints: a training on disk, from which it goes on as if it had not stopped."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field

from pushforward.data.files import atomic_path, digest
from pushforward.data.schema import check, parse
from pushforward.errors import PushforwardError
from pushforward.model.storage import CARD, CONFIG, STATISTICS, WEIGHTS
from pushforward.training.problem import Problem
from pushforward.training.state import State

__all__ = ["folder_of", "resume", "save_checkpoint", "tidy"]

_MOVED = 0.03  # of the mean image, in [-1, 1], beyond which it is of other images: decoders differ by less
_MAY_CHANGE = {
    "steps", "minutes", "learning_rate", "save_every", "sample_every", "log_every", "half", "compile", "card"
}  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """The entries of a checkpoint that are no tensors."""

    config: dict[str, Any]
    data: tuple[int, ...]
    step: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class _Logged:
    """The entry of a line of the log that is needed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    step: int


def folder_of(model: Path) -> Path:
    """Where a model's folder has its training: checkpoint, log and pictures."""
    return model / "training"


def save_checkpoint(model: Path, problem: Problem, state: State) -> None:
    """Write the checkpoint, whole or not at all."""
    entries = {
        "config": problem.config.to_dict(),
        "data": [len(problem.data), *problem.data.images.shape[1:]],
        "mean": problem.mean,
        "told": _told(problem),
        "step": state.step,
        "seconds": state.seconds,
        "losses": torch.tensor(state.losses, device="cpu"),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": {**state.scheduler.state_dict(), "lr_lambdas": [None]},
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    with atomic_path(folder_of(model) / "checkpoint.pt") as temporary:
        temporary.write_bytes(buffer.getbuffer())  # an error of the disk has its own name this way


def resume(model: Path, problem: Problem, state: State) -> None:
    """Take up the checkpoint in the folder of a model, if there is one.

    Raises:
        PushforwardError: it is damaged, or of a training with other settings or data.
    """
    path = folder_of(model) / "checkpoint.pt"
    for file in (path, path.with_name("log.jsonl")):
        if file.exists() and not file.is_file():
            raise PushforwardError(f"{file} is no file; remove it.")
    if not path.exists():
        _check_free(model)
        return
    try:
        _load(torch.load(path, map_location="cpu", weights_only=True), path, problem, state)
    except PushforwardError:
        raise
    except Exception as error:  # of pickle, zip, or what the parts find missing or of another kind
        what = f"lacks the entry {error}" if isinstance(error, KeyError) else "is no readable checkpoint"
        raise PushforwardError(f"{path} {what}; remove it to start anew.") from error


def _load(entries: dict[str, Any], path: Path, problem: Problem, state: State) -> None:
    plain = {entry.name: entries[entry.name] for entry in fields(_Kept)}
    kept = check(plain, _Kept, str(path), "remove it to start anew")
    _check_same(entries, path.parent.parent, problem, state)
    state.network.load_state_dict(entries["network"])
    state.average.load_state_dict(entries["average"])
    state.optimizer.load_state_dict(entries["optimizer"])
    rates = state.scheduler.base_lrs  # perhaps lower than the rate with which the loss ceased to be finite
    state.scheduler.load_state_dict({**entries["scheduler"], "lr_lambdas": [None], "base_lrs": rates})
    for group in state.optimizer.param_groups:
        group["lr"] *= problem.config.learning_rate / entries["config"]["learning_rate"]
    if entries["scaler"] is not None and state.scaler is not None:
        state.scaler.load_state_dict(entries["scaler"])
    state.step, state.seconds, state.losses = kept.step, kept.seconds, entries["losses"].tolist()


def _check_same(entries: dict[str, Any], model: Path, problem: Problem, state: State) -> None:
    mine = problem.config.to_dict()
    changed = [k for k in mine if k not in _MAY_CHANGE and mine[k] != entries["config"].get(k)]
    if entries["data"] != [len(problem.data), *problem.data.images.shape[1:]] or _moved(entries, problem):
        changed.append("data")
    shapes = [{k: v.shape for k, v in weights.items()} for weights in (state.network.state_dict(), entries["network"])]
    told = _told(problem)
    if not changed and (shapes[0] != shapes[1] or entries.get("told", told) != told):  # earlier versions kept none
        changed.append("classes or captions")
    if changed:
        raise PushforwardError(
            f"{model} holds a training with other settings ({', '.join(changed)} differ); "
            "give the same ones to go on with it, or another folder."
        )


def _told(problem: Problem) -> str:
    """A digest of all that is said of the images."""
    return digest(problem.data.labels, problem.data.classes, problem.data.captions)


def _moved(entries: dict[str, Any], problem: Problem) -> bool:
    """Whether the images of a checkpoint have another mean; earlier versions kept none."""
    return "mean" in entries and bool((entries["mean"] - problem.mean).abs().max() > _MOVED)


def _check_free(model: Path) -> None:
    """Raise if a training would replace what it did not write.

    Raises:
        PushforwardError: the folder has a file of a model, and no training.
    """
    for name in (CONFIG, WEIGHTS, STATISTICS, CARD):
        if (model / name).exists() and not folder_of(model).is_dir():
            raise PushforwardError(
                f"{model} holds a {name} and no training to go on with, and the model would replace that file; name "
                "another folder."
            )


def tidy(model: Path, step: int) -> None:
    """Drop what came after the checkpoint of a step, as it will come again, and what a kill left half written."""
    training = folder_of(model)
    log = training / "log.jsonl"
    if log.exists():
        whole = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        said = [parse(one, _Logged, f"Line {n} of {log}", "remove the line") for n, one in enumerate(whole, 1)]
        with atomic_path(log) as temporary:
            kept = [line for line, entry in zip(whole, said, strict=True) if entry.step <= step]
            temporary.write_bytes(b"".join(kept))
    for picture in training.glob("samples-*.png"):
        if picture.stem.removeprefix("samples-").isdecimal() and int(picture.stem[8:]) > step:
            picture.unlink()
    for place in (model, training):
        for half in place.glob(f".{'[0-9a-f]' * 16}.*"):
            half.unlink()
