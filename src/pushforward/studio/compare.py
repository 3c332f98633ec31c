"""Compare: solvers and budgets side by side, from the same codes, with their errors to the converged image."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.studio import sample
from pushforward.studio._shared.controls import (
    SOLVERS_OFFERED,
    TakeAway,
    buttons,
    guidance_number,
    seed_number,
    what_choice,
    wire,
)
from pushforward.studio._shared.live import live
from pushforward.studio._shared.models import Shelf, sampler, steps_beside
from pushforward.studio._shared.pictures import copying, embedded, row, table
from pushforward.studio._shared.results import line, png
from pushforward.studio._shared.told import Updates

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.execute import Progress, Round
    from pushforward.maps.drawing import Drawn
    from pushforward.verbs import Model

__all__ = ["Entry", "Settings", "Shown", "command", "layout", "program", "run"]

CONVERGED = "auto:steps=100"  # what others are compared with
ROWS = 24
OFFERED = (*SOLVERS_OFFERED, "ddim:parallel=preconditioned", "ddpm:parallel=preconditioned")


@dataclass(frozen=True)
class Settings:
    """Which solvers are compared, on what."""

    model: str
    solvers: tuple[str, ...] = ("ddim", "gddim:order=2", "dpm++", "unipc")
    nfe: tuple[int, ...] = (5, 10, 20)
    count: int = 4
    what: tuple[str, ...] = ()
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Entry:
    """A row: a sampler, and what it made.

    Args:
        settings: the sampler's, as of the tab Sample.
        drawn: its images, and what they took.
        sheet: the picture of them that its command writes.
        seconds: in all.
        error: median relative distance to the converged images; `None` for a stochastic sampler.
    """

    settings: sample.Settings
    drawn: Drawn
    sheet: Image.Image
    seconds: float
    error: float | None


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far: words, rows as a table, rows as values, and at the end files."""

    says: str
    table: str = ""
    entries: tuple[Entry, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


def samplers(model: Model, settings: Settings) -> list[sample.Settings]:
    """The rows to be made: converged images, and each solver with the most steps of so many network evaluations.

    Raises:
        PushforwardError: no solver or number, more rows than a page shows, or too few evaluations for a solver.
    """
    if not 0 < len(settings.solvers) * len(settings.nfe) <= ROWS:
        raise PushforwardError(
            f"Choose solvers and numbers of network evaluations: at least one row, and at most {ROWS}."
        )
    plain = sample.Settings(settings.model, settings.count, what=settings.what, guidance=settings.guidance,
                            seed=settings.seed)  # fmt: skip
    rows = {replace(plain, solver=CONVERGED): None}
    for solver in settings.solvers:
        for nfe in settings.nfe:
            if steps_beside(solver, nfe) is None:
                rows[replace(plain, solver=solver)] = None
            else:
                rows[replace(plain, solver=solver, steps=sampler(solver).calling(model, nfe).steps)] = None
    return list(rows)


def _file(row: int, settings: sample.Settings) -> str:
    """The name of the file of a row's images."""
    return f"{row}-{settings.solver.replace(':', '-')}.png"


def _line(row: int, settings: sample.Settings, *, text: bool) -> str:
    return line(sample.command(settings, text=text, out=_file(row, settings)))


def command(made: Sequence[sample.Settings], *, text: bool = False) -> str:
    """A line for the shell for each row, which makes its file; `text`: the model reads prompts."""
    return "\n".join(_line(k, one, text=text) for k, one in enumerate(made))


def program(made: Sequence[sample.Settings]) -> str:
    """The same in Python, as a list."""
    begun, _, _ = sample.program(made[0]).rpartition("\n")
    calls = (sample.program(one).rpartition("\n")[2].removeprefix("images = ") for one in made)
    return "\n".join([begun, "images = [", *(f"    {one}," for one in calls), "]"])


def run(model: Model, settings: Settings) -> Generator[Shown, None, None]:
    """Make the rows one after another, and show each as it is there."""
    rows = samplers(model, settings)

    def work(tell: Callable[[Shown], None]) -> Shown:
        entries: list[Entry] = []
        exact: Tensor | None = None
        for k, one in enumerate(rows):
            name = "the converged images" if exact is None else f"row {k} of {len(rows) - 1}, {one.solver}"
            shown = Shown("", _table(model, entries), tuple(entries))
            entries.append(_entry(model, one, exact, lambda says, name=name, shown=shown:  # type: ignore[misc]
                                  tell(replace(shown, says=f"Making {name}: {says}"))))  # fmt: skip
            exact = entries[0].drawn.images
        files = {_file(k, one.settings): png(one.sheet) for k, one in enumerate(entries)}
        says = f"{many(len(rows) - 1, 'sampler')}, each from the same codes"
        return Shown(says, _table(model, entries), tuple(entries), files)

    yield from live(work)


def _entry(model: Model, settings: sample.Settings, exact: Tensor | None, tell: Callable[[str], None]) -> Entry:
    from pushforward.execute import Round
    from pushforward.execute.system import relative_errors
    from pushforward.maps.drawing import draw

    began = time.perf_counter()
    there = sample.mapped(model, settings)
    calls = 0

    def watch(step: Progress | Round) -> None:
        nonlocal calls
        calls += 1
        tell(f"{'round' if isinstance(step, Round) else 'call'} {calls}")

    drawn = draw(there, settings.count, seed=settings.seed, callback=watch)
    seconds = time.perf_counter() - began
    error = None
    if exact is not None and not there.noises:
        error = float(relative_errors(drawn.images, exact).quantile(0.5))
    return Entry(settings, drawn, sample.sheet_of(drawn, there, settings), seconds, error)


def _table(model: Model, entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    rows = []
    for k, one in enumerate(entries):
        name = "converged" if k == 0 else f"{one.settings.solver}"
        error = "" if k == 0 else "stochastic" if one.error is None else f"{one.error:.2g}"
        words = _line(k, one.settings, text=model.text is not None)
        copies = copying("Command", words) + copying("Python", sample.program(one.settings))
        figures = [error, f"{one.drawn.nfe:.0f}", f"{one.drawn.rounds:.0f}", f"{one.seconds:.1f}"]
        rows.append([embedded(row(one.drawn.images), f"Images of {name}"), f"<b>{name}</b>", *figures, copies])
    header = ["Images", "Solver", "Error", "Evaluations", "Rounds", "Seconds", "Copy"]
    says = "From the same codes; the error is the images' median, relative to the converged ones, and evaluations of "
    return table(header, rows, says + "the network are counted per image", first="40%")


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it returns what is to offer the model's classes or captions."""
    import gradio as gr

    standard = Settings("")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            solvers = gr.Dropdown(list(OFFERED), value=list(standard.solvers), label="Solvers", multiselect=True,
                                  allow_custom_value=True, info="With settings after colons if need be.")  # fmt: skip
            nfe = gr.CheckboxGroup([3, 5, 10, 20, 50, 100], value=list(standard.nfe), label="Network evaluations",
                                   info="Of an image, at most.")  # fmt: skip
            what = what_choice("Draw", "Classes or prompts; images take them in turn. Empty: all.", multiple=True)
            count = gr.Slider(1, 8, standard.count, step=1, label="Images")
            with gr.Row():
                guidance = guidance_number()
                seed = seed_number()
            go, stop = buttons("Compare")
        with gr.Column(scale=3, min_width=300):
            says = gr.Markdown("", elem_id="compare-says")
            shown = gr.HTML(elem_id="compare-table")
            taken = TakeAway("comparison")

    def act(data: Mapping[Any, Any]) -> Updates:
        settings = Settings(
            model=data[model], solvers=tuple(data[solvers] or ()), nfe=tuple(map(int, data[nfe] or ())),
            count=int(data[count]), what=tuple(data[what] or ()), guidance=data[guidance] or None,
            seed=int(data[seed] or 0),
        )  # fmt: skip
        opened = shelf.open(settings.model)
        made = samplers(opened, settings)
        words, script = command(made, text=opened.text is not None), program(made)
        return taken.follow(run(opened, settings), words, script, says, lambda one: {shown: one.table})

    inputs = {model, solvers, nfe, what, count, guidance, seed}
    wire(go, stop, act, inputs, says, {shown: ""}, taken)
    return [what]
