"""What several commands share: their common options, reports, progress and images from files."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pushforward.data.files import atomic_path
from pushforward.data.memory import check_images
from pushforward.data.reading import Fit
from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.data.reading import Notes
    from pushforward.execute import Adaptive
    from pushforward.maps.diffusion import Code, Diffusion, Labels
    from pushforward.maps.generator import Generator
    from pushforward.model import Model
    from pushforward.plan import Plan

__all__ = [
    "CountOption", "DeviceOption", "DtypeOption", "FitOption", "GuidanceOption", "Images", "JsonOption", "LabelOption",
    "ModelArgument", "NegativeOption", "PlanOptions", "PromptOption", "QuietOption", "SizeOption", "SplitOption",
    "avoiding", "choose_labels", "decoded", "image_files", "image_size", "make_plan", "open_codes", "open_model",
    "pick_device", "plan_options", "progress", "read_file", "read_inputs", "read_like", "stochastic", "waiting",
    "write_json",
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


def make_plan(model: Model, options: PlanOptions, start: float = 1.0, *, quiet: bool = False) -> Plan | Adaptive:
    """The plan that a command's options describe, of the last `start` of its steps."""
    from pushforward.maps.spec import Sampler

    sampler = Sampler(options.solver, options.steps, options.settings, options.grid, options.end, start)
    with waiting("making the plan", quiet=quiet):
        return sampler.plan(model)


def stochastic(options: PlanOptions) -> PlanOptions:
    """The options with some noise where they leave it to the solver: eta 0.1 of DDIM, lambda 1 of the others."""
    from pushforward.maps.spec import with_noise

    return replace(options, **with_noise(options.solver, options.settings))  # type: ignore[arg-type]


def image_size(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model makes.

    Raises:
        PushforwardError: it makes no images of 1 or 3 channels, or does not say their size.
    """
    shape = model.image_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        msg = f"Model {model.name!r} makes no images of known size ({shape or model.shape}): it cannot take images."
        raise PushforwardError(msg)
    return shape[0], shape[1], shape[2]


def pick_device(name: str) -> str:
    """The device to work on.

    Raises:
        PushforwardError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).add(1).item()  # some have names, and no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        msg = f"Device {name!r} cannot be used here ({(str(error).splitlines() or ['unknown'])[0]}); try --device cpu."
        raise PushforwardError(msg) from None
    return name


def open_model(source: str, device: str, dtype: str = "float32", size: str | None = None) -> Model:
    """A model on a device, its weights of a dtype, for images of a size: `side` or `HEIGHTxWIDTH`, by default its own.

    Raises:
        PushforwardError: no such model, dtype or size.
    """
    import torch

    from pushforward.model import load

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        msg = f"The dtype is one of {', '.join(kinds)}; got {dtype!r}."
        raise PushforwardError(msg)
    return load(source, device=device, dtype=kinds[dtype], size=None if size is None else _pixels(size))


def _pixels(text: str) -> int | tuple[int, int]:
    sides = [int(part) if part.isdecimal() else 0 for part in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        msg = f"--size is a side in pixels, or HEIGHTxWIDTH as 512x768; got {text!r}."
        raise PushforwardError(msg)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def open_codes(path: Path, source: str | None, device: str) -> tuple[Code, dict[str, Any], Diffusion, Plan, Labels]:
    """Codes of a file, its header, and what decodes them: a diffusion with its plan, and labels or prompts.

    Where the model is another than the one they were made with, stderr says so, and the header's `notes`.

    Args:
        path: of the file.
        source: another model than the header's, or `None`.
        device: for the model.

    Raises:
        PushforwardError: the file or the model cannot be read, or they do not fit together.
    """
    from pushforward.maps.diffusion import Diffusion
    from pushforward.maps.spec import plan_at
    from pushforward.maps.storage import check_codes, load_codes, other_weights, told

    code, info = load_codes(path)
    try:
        model = open_model(source or info["model"], device, str(info.get("dtype", "float32")), info.get("size"))
    except PushforwardError as error:
        if source is not None:
            raise
        msg = f"The codes are of model {info['model']!r}, which cannot be loaded; name it with --model. ({error})"
        raise PushforwardError(msg) from None
    check_codes(code, info, model)
    plan = plan_at(model, info["solver"], info["times"], info["settings"])
    note = other_weights(info, model)
    if note is not None:
        typer.echo(f"pushforward: {note}", err=True)
    info["notes"] = [] if note is None else [note]
    model, labels = told(model, info)
    return code, info, Diffusion(model, plan, device=device), plan, labels


def choose_labels(model: Model | Generator, names: Sequence[str], count: int, prompts: Sequence[str] = ()) -> Labels:
    """The named classes or the prompts in turn for `count` images; `None` if there are none.

    Raises:
        PushforwardError: the model has no such class, or reads no prompts.
    """
    import torch

    from pushforward.model.model import class_number

    check_images(count, model.image_shape or ())
    reads = getattr(model, "text", None) is not None
    if prompts and not reads:
        msg = f"Model {model.name!r} reads no prompts; leave --prompt out."
        raise PushforwardError(msg)
    if prompts:
        if names:
            msg = "Give labels or prompts, not both."
            raise PushforwardError(msg)
        return [prompts[i % len(prompts)] for i in range(count)]
    if not names:
        return None
    if not model.classes:
        instead = "give a --prompt instead" if reads else "leave --label out"
        msg = f"Model {model.name!r} has no classes; {instead}."
        raise PushforwardError(msg)
    numbers = [class_number(model, name) for name in names]
    return torch.tensor(numbers)[torch.arange(count) % len(numbers)]


def avoiding(model: Model, negative: str) -> Model:
    """The model with a negative prompt.

    Raises:
        PushforwardError: it reads no prompts.
    """
    if negative and model.text is None:
        msg = f"Model {model.name!r} reads no prompts; leave --negative out."
        raise PushforwardError(msg)
    return replace(model, negative=negative)


def decoded(
    diffusion: Diffusion, code: Code, labels: Labels, guidance: float, batch: int, *, quiet: bool = False
) -> Tensor:
    """The images behind codes, batch after batch, on the CPU, with a progress bar."""
    import torch

    from pushforward.execute import Parallel, Progress, Round
    from pushforward.maps.diffusion import chosen
    from pushforward.plan import Plan

    plan, count = diffusion.plan, len(code.start)
    if not isinstance(plan, Plan):
        msg = "Codes are decoded by a plan; adaptive steps have none."
        raise PushforwardError(msg)
    method, total = (Parallel(tolerance=1e-5), None) if plan.implicit else (None, plan.nfe * -(-count // batch))
    images = []
    with torch.no_grad(), progress("decoding", total=total, unit="call", quiet=quiet) as bar:

        def tell(_: Progress | Round) -> None:
            bar.update()

        for first in range(0, count, batch):
            some = slice(first, first + batch)
            own = chosen(labels, some)
            images.append(diffusion.decode(code[some], own, guidance, parallel=method, callback=tell).float().cpu())
    return torch.cat(images)


# -- images that a user names ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Images:
    """Images read for a model.

    Args:
        values: in [-1, 1], `(count, channels, height, width)`.
        names: of each, its file or its place in an `.npz` file.
        notes: what had to be done to them, one sentence each.
        skipped: files that could not be read, each with the reason.
    """

    values: Tensor
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def read_inputs(
    sources: Sequence[Path],
    size: tuple[int, int],
    channels: int,
    *,
    split: str = "test",
    count: int | None = None,
    skip: bool = False,
    fit: Fit = "crop",
) -> Images:
    """Images from files, folders (searched recursively) and `.npz` files, in this order, brought to a model's shape.

    They are read as those of a training set (`data.reading.read_image`); `notes` says what was done to them.

    Args:
        sources: at least one.
        size: height and width.
        channels: 1 or 3.
        split: of `.npz` files, `train` or `test`.
        count: take the first of them only.
        skip: leave out files that cannot be read, as long as there are others.
        fit: how they are brought to `size`.

    Raises:
        PushforwardError: something is not there, is no image, or is damaged.
    """
    import torch

    from pushforward.data.datasets import brought, load_images
    from pushforward.data.reading import sentences

    skipped: list[tuple[str, str]] = []
    done: Notes = Counter()
    images: list[Tensor] = []
    names: list[str] = []
    for source in sources:
        room = None if count is None else count - len(images)
        if room == 0:
            break
        if source.suffix.lower() == ".npz" and source.is_file():
            some = list(brought(load_images(source, split=split).images[:room], size, channels, fit, done))
            own = [f"{source}[{i}]" for i in range(len(some))]
        else:
            some, own = [], []
            for file in image_files(source):
                if len(some) == room:
                    break
                try:
                    some.append(read_file(file, size, channels, done, fit))
                    own.append(str(file))
                except PushforwardError as error:
                    if not skip:
                        raise
                    skipped.append((str(file), str(error)))
        images += some
        names += own
    if not images and skipped:
        raise PushforwardError(skipped[0][1])
    if not images:
        msg = "There is no image to work on: name at least one file, folder or .npz file."
        raise PushforwardError(msg)
    return Images(torch.stack(images).float() / 127.5 - 1, tuple(names), sentences(done), tuple(skipped))


def image_files(source: Path) -> list[Path]:
    """The image files that a file or folder stands for, sorted.

    Raises:
        PushforwardError: there are none.
    """
    from pushforward.data import datasets as data
    from pushforward.data.imagefolder import SUFFIXES

    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            msg = f"{source} is no image: its name ends in {source.suffix!r}, not in one of {known}."
            raise PushforwardError(msg)
        return [source]
    if not source.is_dir():
        msg = f"There is no file or folder {source}."
        raise PushforwardError(msg)
    return data.image_files(source)


def read_like(path: Path, shape: tuple[int, ...], fit: Fit = "crop", background: str = "white") -> Tensor:
    """An image file in [-1, 1], brought to `shape`, `(channels, height, width)`."""
    return read_file(path, (shape[1], shape[2]), shape[0], Counter(), fit, background).float() / 127.5 - 1


def read_file(
    file: Path,
    size: tuple[int, int] | None,
    channels: int | None,
    done: Notes,
    fit: Fit = "crop",
    background: str = "white",
) -> Tensor:
    """One image as uint8 `(channels, height, width)`, see `data.reading.read_image`; what was done is counted.

    Raises:
        PushforwardError: the file is no image, or damaged; no such fit.
    """
    from pushforward.data.reading import UNREADABLE, explained, read_image

    try:
        return read_image(file, size=size, channels=channels, fit=fit, background=background, done=done)
    except UNREADABLE as error:
        msg = f"{file} cannot be read as an image ({explained(error)}); mend it or leave it out."
        raise PushforwardError(msg) from None


# -- reports -----------------------------------------------------------------------------------------------------------


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
    with atomic_path(destination) as temporary:  # a name that is no text is written as JSON escapes it
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


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


@contextmanager
def waiting(label: str, *, quiet: bool = False) -> Iterator[None]:
    """Show on stderr for how long the block has run, if that is longer than a second.

    Args:
        label: What is under way.
        quiet: Show nothing.
    """
    from tqdm import tqdm

    done = Event()

    def show() -> None:
        if done.wait(1):
            return
        with tqdm(desc=label, bar_format="{desc} ... {elapsed}") as bar:
            while not done.wait(1):
                bar.refresh()

    shown = Thread(target=show, daemon=True)
    if not quiet:
        shown.start()
    try:
        yield
    finally:
        done.set()
        if not quiet:
            shown.join()
