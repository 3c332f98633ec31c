"""Making plans from the names that a command line or a settings file gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import get_args

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Process
from pushforward.plan import solvers
from pushforward.plan.plan import Plan
from pushforward.plan.recurrence import repeated
from pushforward.plan.runge_kutta import TABLEAUX

SOLVERS: dict[str, Callable[..., Plan]] = {
    "auto": solvers.auto,
    "ddim": solvers.ddim,
    "ddpm": solvers.ddpm,
    "gddim": solvers.gddim,
    "exponential": solvers.exponential,
    "dpm++": solvers.dpm_solver_pp,
    "unipc": solvers.unipc,
    "o-belm": solvers.o_belm,
    "bdia": solvers.bdia,
    "collocation": solvers.collocation,
    "euler-maruyama": solvers.euler_maruyama,
    "sscs": solvers.sscs,
    **{name: partial(solvers.runge_kutta, tableau=name) for name in TABLEAUX},
}


def plan_of(process: Process, solver: str, times: Tensor | Sequence[float], settings: Mapping[str, object]) -> Plan:
    """Make `SOLVERS[solver](process, times, **settings)`, after checking names and settings.

    Every solver takes the setting `repeats`, how many times each step is taken (see `plan.recurrence`).

    Args:
        process: the diffusion.
        solver: a name in `SOLVERS`.
        times: decreasing times, `(steps + 1,)`.
        settings: settings of the solver; a `reference` may be given as the variance of a Gaussian.

    Raises:
        PushforwardError: the solver or a setting is unknown, or `times` is not a grid.
    """
    if solver not in SOLVERS:
        raise PushforwardError(f"Unknown solver {solver!r}; known are {', '.join(SOLVERS)}.")
    grid, own = torch.as_tensor(times, dtype=torch.float64, device="cpu"), dict(settings)
    if isinstance(variance := own.get("reference"), int | float):
        own["reference"] = Gaussian(float(variance))
    repeats = own.pop("repeats", None)
    check_settings(f"Solver {solver!r}", SOLVERS[solver], own)
    if repeats is None:
        return SOLVERS[solver](process, grid, **own)
    if not isinstance(repeats, int):
        raise PushforwardError(
            f"The number of times that each step is taken must be a whole number; got repeats = {repeats!r}."
        )
    return repeated(partial(SOLVERS[solver], **own), process, grid, repeats)


_KINDS: Mapping[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def check_settings(what: str, function: Callable[..., object], settings: Mapping[str, object]) -> None:
    """Raise unless `function` has keyword arguments of these names, and they take these words.

    Raises:
        PushforwardError: it lacks one of them, or one is another word than those that it knows.
    """
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    known = {
        p.name: p.annotation
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in ("tableau", "arrivals", "name")
    }
    for name, value in settings.items():
        if name not in known:
            raise PushforwardError(f"{what} has no setting {name!r}; it has {', '.join(known) or 'none'}.")
        kinds = get_args(known[name])  # words, or words and None
        words = [word for kind in kinds for word in get_args(kind) or (kind,) if isinstance(word, str)]
        if words and value not in words and not (value is None and NoneType in kinds):
            raise PushforwardError(f"{what} takes {name} of {', '.join(words)}; got {value!r}.")
        if isinstance(value, str) and (kind := _KINDS.get(known[name])):
            raise PushforwardError(f"{what} takes {kind} as {name}; got {value!r}.")
