"""Options that several commands take, and those of a plan as one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from pushforward.data.reading import Fit

__all__ = [
    "CountOption", "DeviceOption", "DtypeOption", "FitOption", "GuidanceOption", "JsonOption", "LabelOption",
    "ModelArgument", "NegativeOption", "PlanOptions", "PromptOption", "QuietOption", "SizeOption", "SplitOption",
    "plan_options",
]  # fmt: skip

ModelArgument = Annotated[
    str, typer.Argument(help="Name of an embedded model, a folder, or a hub name of `diffusers`.")
]
LabelOption = Annotated[
    list[str] | None, typer.Option(help="A class, by name or number; repeat for several, which images take in turn.")
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(help="What to draw, for a model that reads; repeat for several, which images take in turn."),
]
NegativeOption = Annotated[str, typer.Option(help="What not to draw: guidance leads away from this prompt.")]
GuidanceOption = Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")]
CountOption = Annotated[int | None, typer.Option(help="Take this many images; all by default.", min=1)]
SplitOption = Annotated[str, typer.Option(help="Of an .npz file: train, validation or test.")]
FitOption = Annotated[
    Fit,
    typer.Option(
        help="How images of other proportions are brought to size: crop cuts around the centre, pad fills the rest "
        "with white, stretch changes the proportions."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS",
        help="Of the images of a `diffusers` model: side, or HEIGHTxWIDTH as 512x768; by default its own.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Of the network's weights: float32, bfloat16 or float16; states stay float32.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one.")]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write a report as JSON to PATH; to stdout for '-' or nothing."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@dataclass(frozen=True)
class PlanOptions:
    """The options that describe a plan; those left at `None` take the solver's own values.

    A command takes them as one argument `plan`, under the decorator `plan_options`.
    """

    solver: Annotated[str, typer.Option(help="auto, ddim, gddim, exponential, dpm++, unipc, heun, rk4, rk45 …")] = (
        "auto"
    )
    steps: Annotated[int, typer.Option(help="Steps of the solver.", min=1)] = 20
    order: Annotated[int | None, typer.Option(help="Order of a multistep solver.")] = None
    eta: Annotated[float | None, typer.Option(help="DDIM's eta: 0 deterministic, 1 DDPM.")] = None
    noise: Annotated[float | None, typer.Option(help="Noise level lambda of a stochastic solver; 1 is ancestral.")] = (
        None
    )
    corrector: Annotated[str | None, typer.Option(help="reuse (free) or evaluate (one more evaluation a step).")] = None
    variable: Annotated[str | None, typer.Option(help="Interpolate in time, log-snr or angle (multistep solvers).")] = (
        None
    )
    reference: Annotated[float | None, typer.Option(help="Variance of the reference Gaussian of the solver.")] = None
    grid: Annotated[str | None, typer.Option(help="uniform, power, log-snr, karras, angle, timesteps.")] = None
    end: Annotated[float | None, typer.Option(help="Time of the last state; 0 is clean.")] = None

    @property
    def settings(self) -> dict[str, object]:
        """The solver's settings that were given, numbers and words; `reference` is a variance."""
        names = ("order", "eta", "noise", "corrector", "variable", "reference")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def plan_options(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `PlanOptions` in the place of its one argument `plan`.

        @plan_options(solver="ddim", steps=50)
        def invert(model: ModelArgument, plan: PlanOptions, ...) -> None:

    Args:
        defaults: this command's, where they differ from those of `PlanOptions`.
    """
    hints = get_type_hints(PlanOptions, include_extras=True)
    options = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(option.name, option.default),
            annotation=hints[option.name],
        )
        for option in fields(PlanOptions)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**arguments: Any) -> None:
            plan = PlanOptions(**{option.name: arguments.pop(option.name) for option in options})
            command(plan=plan, **arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options if parameter.name == "plan" else [own]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return called

    return decorate
