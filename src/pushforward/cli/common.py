"""What several commands share: their common options, reports and progress."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pushforward.errors import PushforwardError
from pushforward.files import atomic_path

if TYPE_CHECKING:
    from pushforward.execute import Adaptive
    from pushforward.model import Model
    from pushforward.plan import Plan

__all__ = ["JsonOption", "QuietOption", "make_plan", "progress", "write_json"]

JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write a report as JSON to PATH, or to stdout for '-'.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
SolverOption = Annotated[
    str, typer.Option(help="auto, ddim, gddim, exponential, dpm++, unipc, heun, rk4, rk45 …")
]
StepsOption = Annotated[int, typer.Option(help="Steps of the solver.", min=1)]
OrderOption = Annotated[int | None, typer.Option(help="Order of a multistep solver.")]
EtaOption = Annotated[float | None, typer.Option(help="DDIM's eta: 0 deterministic, 1 DDPM.")]
NoiseOption = Annotated[float | None, typer.Option(help="Noise level lambda of a stochastic solver; 1 is ancestral.")]
CorrectorOption = Annotated[str | None, typer.Option(help="reuse (free) or evaluate (one more evaluation a step).")]
VariableOption = Annotated[str | None, typer.Option(help="Interpolate in time, log-snr or angle (multistep solvers).")]
ReferenceOption = Annotated[float | None, typer.Option(help="Variance of the reference Gaussian of the solver.")]
GridOption = Annotated[str | None, typer.Option(help="uniform, power, log-snr, karras, angle, timesteps.")]
EndOption = Annotated[float | None, typer.Option(help="Time of the last state; 0 is clean.")]


def make_plan(
    model: "Model",
    solver: str,
    steps: int,
    *,
    grid: str | None,
    end: float | None,
    reference: float | None,
    settings: Mapping[str, object],
) -> "Plan | Adaptive":
    """The plan that a command's options describe; options left at `None` take the solver's own values."""
    from pushforward.execute import Adaptive
    from pushforward.linear import Gaussian
    from pushforward.plan import auto, named
    from pushforward.plan.grid import default

    given = {name: value for name, value in settings.items() if value is not None}
    if reference is not None:
        given["reference"] = Gaussian(reference)
    at = {} if end is None else {"end": end}
    if solver == "auto" and grid is None and not given and not at:
        return auto(model.process, steps, model.reference)
    if solver == "rk45" and grid is None and not given and not at:
        return Adaptive(model.process)
    if solver in ("auto", "rk45"):
        msg = f"The solver {solver!r} chooses its own settings; name another to set them."
        raise PushforwardError(msg)
    own = dict(model.grid)
    if own and grid in (None, own.get("name", "uniform")):
        own.update({"final" if own.get("name") == "timesteps" else "end": end} if at else {})
        times = default(model.process, steps, **own)
    else:
        times = default(model.process, steps, name=grid or "power", **at)
    return named(model.process, solver, times, given)


def write_json(report: Mapping[str, Any], destination: str | None) -> None:
    """Write a report to a file, to stdout for `-`, or nowhere for `None`.

    Numbers that JSON cannot say (NaN, infinities) become `null`, paths become strings.
    """
    if destination is None:
        return
    text = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    if destination == "-":
        typer.echo(text)
        return
    with atomic_path(destination) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case os.PathLike():
            return os.fspath(value)
        case _:
            return value


def progress(label: str, *, total: int | None = None, unit: str = "round", quiet: bool = False) -> Any:
    """A progress bar on stderr.

        with progress("sampling", total=rounds, quiet=quiet) as bar:
            sample(..., callback=lambda _: bar.update())

    Args:
        label: What is under way.
        total: How many steps there will be, if that is known.
        unit: What one step is.
        quiet: Show nothing.

    Returns:
        A `tqdm` bar, to be used as a context so that its line ends before anything else is written.
    """
    from tqdm import tqdm

    return tqdm(desc=label, total=total, unit=unit, disable=quiet)
