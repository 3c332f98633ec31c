"""Chains and descents on disk, so that an interrupted run resumes as if it had never stopped.

A safetensors file holds all tensors. A JSON header in its metadata holds the names of the energies' terms, and whatever
else the caller stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pushforward.data.files import load_tensors, save_headed
from pushforward.data.schema import check_tensors, parse
from pushforward.errors import PushforwardError
from pushforward.guidance.chains import Chains, Draw, Point, Record
from pushforward.guidance.posterior import Descents
from pushforward.guidance.tempering import Ladder

__all__ = ["load_chains", "load_descents", "save_checkpoint"]

_KEY, _CHAINS, _DESCENTS = "pushforward", "pushforward-chains-1", "pushforward-descents-1"
_FIGURES = ("prior", "acceptance", "step", "projections")
_SWAPPED = ("swaps", "arrived")
_DRAWN = ("variables", "images", "log_weights")
_SHAPES = {
    "variables": "rows numbers", "images": "rows ...", "energies": "terms rows", "slope": "rows numbers",
    "history.energies": "records terms chains", "history.prior": "records chains",
    "history.acceptance": "records chains", "history.step": "records chains",
    "history.projections": "records directions chains",
}  # fmt: skip
_OF_CHAINS = {"tuning": "three rows", "log_weights": "chains"}
_OF_LADDERS = {
    "betas": "rungs chains", "fresh": "rungs chains", "history.swaps": "records pairs chains",
    "history.arrived": "records chains",
}  # fmt: skip
_OF_DRAWS = {
    "draws.energies": "draws terms chains", "draws.variables": "draws chains numbers",
    "draws.images": "draws chains ...", "draws.log_weights": "draws chains",
}  # fmt: skip


@dataclass(frozen=True)
class _Head:
    format: str
    terms: tuple[str, ...]
    info: dict[str, Any]
    draws: tuple[int, ...] = ()


def save_checkpoint(path: Path, state: Chains | Descents, info: Mapping[str, Any]) -> None:
    """Write chains or descents to a file atomically.

    Args:
        path: the file to write.
        state: chains or descents after any step.
        info: further values to store, of types that JSON has.
    """
    history = state.history
    tensors: dict[str, Tensor] = {
        "variables": state.variables,
        "images": state.point.images,
        "energies": _table(state.point.energies),
        "slope": state.point.slope,
        "history.energies": torch.stack([_table(record.energies) for record in history]),
        **{f"history.{k}": torch.stack([getattr(record, k) for record in history]) for k in _FIGURES},
    }
    if state.nfe is not None:
        tensors["nfe"] = state.nfe
    head: dict[str, Any] = {"terms": list(state.point.energies), "info": dict(info)}
    if isinstance(state, Descents):
        head["format"] = _DESCENTS
        tensors |= {f"state.{name}": tensor for name, tensor in state.state.items()}
    else:
        head |= {"format": _CHAINS, "draws": [draw.step for draw in state.draws]}
        tensors |= {"tuning": state.tuning, "log_weights": state.log_weights}
        if state.ladder is not None:
            tensors |= {"betas": state.ladder.betas, "fresh": state.ladder.fresh}
            tensors |= {f"history.{k}": torch.stack([getattr(record, k) for record in history]) for k in _SWAPPED}
        if state.draws:
            tensors["draws.energies"] = torch.stack([_table(draw.energies) for draw in state.draws])
            tensors |= {f"draws.{k}": torch.stack([getattr(draw, k) for draw in state.draws]) for k in _DRAWN}
    save_headed(path, tensors, head)


def load_chains(path: Path, device: torch.device | str = "cpu") -> tuple[Chains, dict[str, Any]]:
    """Read the chains in a file, and what was written with them.

    Raises:
        PushforwardError: the file does not exist or is damaged.
    """
    with _reading(path, _CHAINS, device) as (head, t):
        point, history = _common(head, t)
        draws = tuple(
            Draw(step, t["draws.variables"][i], t["draws.images"][i], _named(head, t["draws.energies"][i]),
                 t["draws.log_weights"][i])
            for i, step in enumerate(head.draws)
        )  # fmt: skip
        ladder = Ladder(t["betas"], t["fresh"]) if "betas" in t else None
        return Chains(
            t["variables"], point, t["tuning"], t["log_weights"], history, draws, t.get("nfe"), ladder
        ), head.info


def load_descents(path: Path, device: torch.device | str = "cpu") -> tuple[Descents, dict[str, Any]]:
    """Read the descents in a file, and what was written with them.

    Raises:
        PushforwardError: the file does not exist or is damaged.
    """
    with _reading(path, _DESCENTS, device) as (head, t):
        point, history = _common(head, t)
        state = {name.removeprefix("state."): tensor for name, tensor in t.items() if name.startswith("state.")}
        return Descents(state, t["variables"], point, history, t["nfe"]), head.info


@contextmanager
def _reading(path: Path, kind: str, device: torch.device | str) -> Iterator[tuple[_Head, dict[str, Tensor]]]:
    """Yield header and tensors of a file; missing parts raise an error in the block."""
    try:
        tensors, metadata = load_tensors(path, device)
        head = parse(metadata[_KEY], _Head, f"The header of {path}", "remove it to start again")
        if head.format != kind:
            raise KeyError(kind)
        shapes = _SHAPES | (_OF_CHAINS if kind == _CHAINS else {"nfe": "chains"})
        shapes |= {"nfe": "chains"} if "nfe" in tensors else {}
        shapes |= _OF_DRAWS if head.draws else {}
        shapes |= _OF_LADDERS if "betas" in tensors else {}
        rungs = len(tensors["betas"]) if "betas" in tensors else 1
        rows = rungs * tensors["history.prior"].shape[1]
        check_tensors(tensors, shapes, str(path), "remove it to start again", terms=len(head.terms),
                      draws=len(head.draws), three=3, pairs=rungs - 1, rows=rows)  # fmt: skip
        yield head, tensors
    except PushforwardError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise PushforwardError(
            f"{path} is missing, damaged or not a file of {kind.split('-')[1]} ({error}); remove it to start again."
        ) from None


def _common(head: _Head, t: Mapping[str, Tensor]) -> tuple[Point, tuple[Record, ...]]:
    """Read what chains and descents both have."""
    figures = _FIGURES + _SWAPPED if "betas" in t else _FIGURES
    history = tuple(
        Record(_named(head, energies), *(t[f"history.{k}"][i] for k in figures))
        for i, energies in enumerate(t["history.energies"])
    )
    return Point(t["images"], _named(head, t["energies"]), t["slope"]), history


def _table(energies: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(energies.values()))


def _named(head: _Head, table: Tensor) -> dict[str, Tensor]:
    return dict(zip(head.terms, table, strict=True))
