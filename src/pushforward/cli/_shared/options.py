"""Options that several commands take, and those of a plan as one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from pushforward.cli._shared.checks import given
from pushforward.data.reading import Fit
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.plan import SOLVERS

__all__ = [
    "CountOption", "DeviceOption", "DtypeOption", "FitOption", "GuidanceOption", "JsonOption", "LabelOption",
    "ModelArgument", "NegativeOption", "PromptOption", "QuietOption", "SizeOption", "SplitOption",
    "plan_options",
]  # fmt: skip

ModelArgument = Annotated[
    str, typer.Argument(help="Model: name of an embedded one, a folder, or a hub name of `diffusers`.")
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option(help="Draw this class, by name or number. Repeat for several; images take them in turn."),
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Draw what this text says, with a model that takes text. Repeat for several; images take them in turn."
    ),
]
NegativeOption = Annotated[str, typer.Option(help="Prompt that guidance leads away from.")]
GuidanceOption = Annotated[float, typer.Option(help="Set the weight of classifier-free guidance; 1 is none.")]
CountOption = Annotated[int | None, typer.Option(help="Read only the first images, this many; all by default.", min=1)]
SplitOption = Annotated[str, typer.Option(help="Read this split of an .npz file: train, validation or test.")]
FitOption = Annotated[
    Fit,
    typer.Option(
        help="Fit images of other proportions: crop cuts around the centre, pad fills the rest with white, stretch "
        "changes the proportions."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS",
        help="Set the size of the images of a `diffusers` model: a side, or HEIGHTxWIDTH such as 512x768; by default "
        "its own.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Load the network's weights as float32, bfloat16 or float16; states stay float32.")
]
DeviceOption = Annotated[str, typer.Option(help="Run on cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one.")]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="PATH", help="Write a report as JSON to PATH, or to stdout if PATH is - or left out."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]


@dataclass(frozen=True)
class _PlanFlags:
    """The options that describe a sampler; those left at `None` take the solver's own values."""

    solver: Annotated[
        str,
        typer.Option(
            help=f"Solver, alone or with settings: gddim:order=2:steps=20. One of {', '.join(SOLVERS)}, rk45. "
            "The options below are shorthand for such settings."
        ),
    ] = "auto"
    steps: Annotated[int, typer.Option(help="Take this many steps.", min=1)] = 20
    order: Annotated[int | None, typer.Option(help="Set the order of a multistep solver.")] = None
    eta: Annotated[float | None, typer.Option(help="Set DDIM's eta, from 0 (deterministic) to 1 (DDPM).")] = None
    noise: Annotated[
        float | None, typer.Option(help="Set the noise level lambda of a stochastic solver; 1 is ancestral sampling.")
    ] = None
    corrector: Annotated[
        str | None, typer.Option(help="Add a corrector: reuse (free) or evaluate (one more network call per step).")
    ] = None
    variable: Annotated[
        str | None, typer.Option(help="Interpolate answers in time, log-snr or angle (multistep solvers).")
    ] = None
    reference: Annotated[float | None, typer.Option(help="Set the variance of the solver's reference Gaussian.")] = None
    grid: Annotated[
        str | None,
        typer.Option(help="Space the steps by this grid: uniform, power, log-snr, karras, angle or timesteps."),
    ] = None
    end: Annotated[float | None, typer.Option(help="End at this time; 0 is a clean image.")] = None


def plan_options(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that describe a sampler in the place of its one argument `plan`, a `SamplerSpec`.

        @plan_options(solver="ddim", steps=50)
        def invert(model: ModelArgument, plan: SamplerSpec, ...) -> None:

    Args:
        defaults: this command's, where they differ from those of `_PlanFlags`.
    """
    hints = get_type_hints(_PlanFlags, include_extras=True)
    options = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(option.name, option.default),
            annotation=hints[option.name],
        )
        for option in fields(_PlanFlags)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def called(**arguments: Any) -> None:
            flags = {option.name: arguments.pop(option.name) for option in options}
            command(plan=_sampler(flags.pop("solver"), flags), **arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options if parameter.name == "plan" else [own]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _sampler(solver: str, flags: Mapping[str, Any]) -> SamplerSpec:
    """The sampler that `--solver` and the flags beside it describe."""
    said = {name: value for name, value in flags.items() if value is not None}
    return parse(solver, {name: said.pop(name) for name in [*said] if given(name)}, said)
