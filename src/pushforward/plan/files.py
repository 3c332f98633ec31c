"""Plans on disk: a safetensors file of times and coefficients, which any command takes for a solver.

Its metadata are a JSON header that says the process in full. A plan that is read has the file for its solver and the
digest of the file's content among its settings, so that codes made with it are never decoded with another.

Frequencies that all terms treat alike (those of a band of a learned plan, or of waves along either axis) are written
once; `frequencies` says which of these each frequency is. Files without it hold all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pushforward.data.files import check_suffix, digest, load_headed, save_headed
from pushforward.data.schema import check, check_tensors
from pushforward.errors import PushforwardError
from pushforward.linear import Basis, Operator, Process, process_from_config
from pushforward.plan.plan import Node, Plan, Register

__all__ = ["SUFFIX", "load_plan", "save_plan"]

SUFFIX, FORMAT = ".plan", "pushforward-plan-1"
_REMEDY = "learn the plan again"
_KINDS: tuple[Literal["state", "answer", "noise", "mean"], ...] = ("state", "answer", "noise", "mean")


@dataclass(frozen=True)
class _Header:
    """What the metadata say; `about` is of whoever wrote the plan."""

    format: str
    process: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def save_plan(plan: Plan, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a plan to a file, whole or not at all.

    Args:
        plan: any solver's.
        path: ends in `.plan`.
        about: more to say in its header, as JSON can say it.

    Raises:
        PushforwardError: another suffix.
    """
    check_suffix(path, {SUFFIX}, "Plans")
    terms = [(n, _KINDS.index(r.kind), r.node) for n, node in enumerate(plan.nodes) for r in node.terms]
    values = [operator.lift(plan.basis).coefficients for node in plan.nodes for operator in node.terms.values()]
    coefficients = torch.stack(values)
    tensors = {
        "times": plan.node_times,
        "asked": torch.tensor(plan.asked, device="cpu"),
        "steps": torch.tensor(plan.steps, device="cpu"),
        "terms": torch.tensor(terms, device="cpu"),
        "coefficients": coefficients,
        "mean": plan.mean,
    }
    if plan.basis.shape:
        each = coefficients.flatten(1, -3).movedim(1, 0)
        distinct, which = torch.unique(each.flatten(1), dim=0, return_inverse=True)
        tensors["coefficients"] = distinct.view(-1, *each.shape[1:]).movedim(0, 1)
        tensors["frequencies"] = which.view(plan.basis.shape)
    head = {"format": FORMAT, "process": plan.process.config(), "about": dict(about or {})}
    save_headed(path, tensors, head)


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a file.

    Raises:
        PushforwardError: no such file, or one that holds no plan.
    """
    path = Path(path).expanduser().resolve()
    tensors, head = load_headed(path, FORMAT, "plan", "make one with `pushforward learn-plan`")
    process = process_from_config(check(head, _Header, str(path), _REMEDY).process)
    shapes = {"times": "nodes", "asked": "calls", "steps": "chain", "terms": "terms three",
              "coefficients": "terms ...", "mean": "..."}  # fmt: skip
    if "frequencies" in tensors:
        shapes |= {"coefficients": "terms distinct blocks blocks", "frequencies": "..."}
    check_tensors(tensors, shapes, str(path), _REMEDY, three=3)
    try:
        return _plan(process, path, tensors)
    except (IndexError, ValueError) as error:
        raise PushforwardError(f"{path} holds a plan whose parts do not fit ({error}); {_REMEDY}.") from None


def _plan(process: Process, path: Path, tensors: Mapping[str, Tensor]) -> Plan:
    coefficients, times = tensors["coefficients"].double(), tensors["times"].tolist()
    if "frequencies" in tensors:
        coefficients = coefficients[:, tensors["frequencies"]]
    basis = Basis(tuple(coefficients.shape[1:-2]))
    nodes: list[dict[Register, Operator]] = [{} for _ in times]
    for (n, kind, of), value in zip(tensors["terms"].tolist(), coefficients, strict=True):
        nodes[n][Register(_KINDS[kind], of)] = Operator(value, basis)
    asked = set(tensors["asked"].tolist())
    made = tuple(Node(t, terms, n in asked) for n, (t, terms) in enumerate(zip(times, nodes, strict=True)))
    settings = {"digest": digest(path)[:16]}
    return Plan(process, str(path), made, tuple(tensors["steps"].tolist()), tensors["mean"], settings)
