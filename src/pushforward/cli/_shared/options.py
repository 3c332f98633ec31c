"""Options that several commands take, alone and in groups.

A group is a dataclass whose fields are options. A command takes it as one argument, under the decorator `grouped`:

    @grouped(solver="ddim", steps=50)
    def invert(model: ModelArgument, sampler: SamplerOptions, place: PlaceOptions, ...) -> None:
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from json import loads
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pushforward.cli._shared.checks import check_split, given, in_vain, spare
from pushforward.cli._shared.labels import choose_labels
from pushforward.cli._shared.report import write_json
from pushforward.data.inputs import Images, read_inputs
from pushforward.data.reading import Fit
from pushforward.errors import PushforwardError
from pushforward.maps.labels import Labels, weight_of
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.model import Model
from pushforward.plan import SOLVERS

__all__ = [
    "BatchOption", "ConditionOptions", "DeviceOption", "FitOption", "GuidanceOption", "ImageOptions", "ImagesArgument",
    "JsonOption", "LabelOption", "ModelArgument", "ModelOptions", "NegativeOption", "PipelineOptions", "PlaceOptions",
    "PromptOption", "QuietOption", "ReportOptions", "SamplerOptions", "SeedOption", "grouped",
]  # fmt: skip

ModelArgument = Annotated[
    str, typer.Argument(help="Model: name of an embedded one, a folder, or a hub name of `diffusers`.")
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Images: files, folders or .npz files.")]
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
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Set the weight of classifier-free guidance; 1 is none, and the default but for a `diffusers` pipeline, "
        "which has its own. Reports count its two evaluations of the network as one."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed the codes; image i depends on the seed and i alone.")]
ShownSeedOption = Annotated[
    int, typer.Option(help="Seed the codes; an image's code depends on the seed and what the image shows.")
]
BatchOption = Annotated[int, typer.Option(help="Process this many images at a time.", min=1)]
RowsOption = Annotated[
    int, typer.Option(help="Process this many images at a time, and states per network call.", min=1)
]
FitOption = Annotated[
    Fit,
    typer.Option(
        help="Fit images of other proportions: crop cuts around the centre, pad fills the rest with white, stretch "
        "changes the proportions."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Run on cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one.")]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="PATH", help="Write a report as JSON to PATH, or to stdout if PATH is - or left out."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress bars and no results but an evaluation's table.")
]


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerOptions:
    """A sampler; what is left at `None` takes the solver's own value."""

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
        float | None,
        typer.Option(help="Set the noise level lambda of a stochastic solver; 1 is ancestral sampling."),
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

    def spec(self, **more: object) -> SamplerSpec:
        """What `--solver` and the options beside it describe; what was not typed gives way to the text of `--solver`.

        Args:
            more: settings for which the command has options of its own; `None` says nothing.

        Raises:
            PushforwardError: they are no sampler, or say a setting twice and differently.
        """
        flags = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "solver"} | more
        said = {name: value for name, value in flags.items() if value is not None}
        typed = {name: value for name, value in said.items() if given(name)}
        return parse(self.solver, typed, {name: value for name, value in said.items() if name not in typed})

    def plan_spec(self, **more: object) -> SamplerSpec:
        """The same for a command that has no use for steps taken at once.

        Raises:
            PushforwardError: as `spec`, or it says that they are.
        """
        spec = self.spec(**more)
        for name in ("parallel", "rounds"):
            if (value := getattr(spec, name)) is not None:
                raise PushforwardError(f"{name}={value} has no effect here; leave it out of --solver.")
        return spec


@dataclass(frozen=True)
class ConditionOptions:
    """What images are to show, and how strongly."""

    label: LabelOption = None
    prompt: PromptOption = None
    negative: NegativeOption = ""
    guidance: GuidanceOption = None

    def weight(self, model: Model) -> float | None:
        """The weight of guidance for a model: what is asked for, or 1; `None`: a pipeline's own."""
        return weight_of(model, self.guidance)

    def check(self, count: int | None = None) -> None:
        """Raise if an option has no effect, as far as is known before there is a model.

        Args:
            count: images that are to take labels or prompts, where that is known.
        """
        self._check(self.guidance)
        if count is not None:
            spare(count, label=self.label, prompt=self.prompt)

    def _check(self, weight: float | None) -> None:
        in_vain({"negative": "guidance is 1" if weight == 1 and self.prompt else None})

    def labels(self, model: Model, count: int) -> Labels:
        """The classes or prompts of so many images of a model; `None` if there are none.

        Raises:
            PushforwardError: an option has no effect, or the model has no such class, or reads no prompts.
        """
        self._check(self.weight(model))
        return choose_labels(model, count, self.label, self.prompt)


@dataclass(frozen=True)
class ImageOptions:
    """Which images are read, and how they are brought to a model's shape."""

    count: Annotated[int | None, typer.Option(help="Read only the first images, this many; all by default.", min=1)] = (
        None
    )
    split: Annotated[str, typer.Option(help="Read this split of an .npz file: train, validation or test.")] = "test"
    fit: FitOption = "crop"

    def read(self, sources: Sequence[Path], shape: tuple[int, int, int], *, skip: bool = False) -> Images:
        """The images of `sources`, brought to `shape (channels, height, width)`; see `read_inputs`."""
        channels, height, width = shape
        return read_inputs(
            sources, (height, width), channels, split=self.split, count=self.count, skip=skip, fit=self.fit
        )

    def check(self, sources: Sequence[Path]) -> None:
        """Raise if a split is named of what has none."""
        check_split(sources)


@dataclass(frozen=True)
class PlaceOptions:
    """Where a model runs, in which precision, and for images of which size."""

    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="Set the size of the images of a `diffusers` model: a side, or HEIGHTxWIDTH such as 512x768; by "
            "default its own.",
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(help="Load the network's weights as float32, bfloat16 or float16; states stay float32."),
    ] = "float32"
    device: DeviceOption = "auto"

    @property
    def kept(self) -> dict[str, str | None]:
        """What results depend on, as they keep it."""
        return {"dtype": self.dtype, "size": self.size}


@dataclass(frozen=True)
class PipelineOptions:
    """What a `diffusers` pipeline is called with, and what is added to it."""

    call: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Call a `diffusers` pipeline with this argument: a number, a text, JSON, or the file of an image, as "
            "in --call guidance_rescale=0.7 --call mask_image=mask.png. Repeat for several.",
        ),
    ] = None
    image: Annotated[
        Path | None, typer.Option(help="Give a `diffusers` pipeline this image to begin with, or to look at.")
    ] = None
    control: Annotated[
        Path | None, typer.Option(help="Give a `diffusers` pipeline with a control network this image to follow.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:WEIGHT]",
            help="Add this LoRA to a `diffusers` pipeline: a file, a folder or a hub name, with its weight, by default "
            "1. Repeat for several.",
        ),
    ] = None

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments `call` and `lora` of `load`.

        Raises:
            PushforwardError: an argument has no value, or is given twice.
        """
        pictures = {"image": self.image, "control": self.control}
        call: dict[str, Any] = {name: str(path) for name, path in pictures.items() if path is not None}
        for text in self.call or []:
            name, equals, value = text.partition("=")
            if not name or not equals:
                raise PushforwardError(f"--call is an argument and its value, as guidance_rescale=0.7; got {text!r}.")
            if name in call:
                raise PushforwardError(f"The argument {name} is given twice; say it once.")
            call[name] = _value(value)
        return {"call": call, "lora": tuple(self.lora or ())}


@dataclass(frozen=True)
class ModelOptions(PipelineOptions, PlaceOptions):
    """All of a model but its name: where it runs, and what its pipeline is called with."""


def _value(text: str) -> Any:
    """A value as JSON says it, or the text itself."""
    try:
        return loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class ReportOptions:
    """What a command says besides its results."""

    json: JsonOption = None
    quiet: QuietOption = False

    def tell(self, *lines: str) -> None:
        """Write lines to stdout, unless that is for JSON, or nothing is to be said."""
        if not self.quiet and self.json != "-":
            for line in lines:
                typer.echo(line)

    def write(self, report: Mapping[str, Any]) -> None:
        """Write the report as JSON, where it was asked for."""
        write_json(report, self.json)


def grouped(**defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command each field of the groups that it takes as an option of its own.

    Args:
        defaults: this command's, where they differ from a group's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        groups: dict[str, type[Any]] = {
            name: one.annotation
            for name, one in signature.parameters.items()
            if isinstance(one.annotation, type) and is_dataclass(one.annotation)
        }

        @wraps(command)
        def called(**arguments: Any) -> None:
            made = {
                name: kind(**{option.name: arguments.pop(option.name) for option in fields(kind)})
                for name, kind in groups.items()
            }
            command(**arguments, **made)

        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += _options(groups[parameter.name], defaults) if parameter.name in groups else own
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _options(kind: type[Any], defaults: Mapping[str, object]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(option.name, option.default),
            annotation=hints[option.name],
        )
        for option in fields(kind)
    ]
