"""Sample: pictures as they form, step by step or with all steps at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pushforward.studio._shared.controls import (
    TakeAway,
    buttons,
    guidance_number,
    picture_area,
    seed_number,
    solver_choice,
    what_choice,
    wire,
)
from pushforward.studio._shared.live import live
from pushforward.studio._shared.models import Shelf, asked_what, sampler, steps_beside, take_turns
from pushforward.studio._shared.pictures import embedded, preview, row, table, viewed
from pushforward.studio._shared.results import Name, call, codes_file, line, options, png
from pushforward.studio._shared.told import Updates

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.execute import Progress, Round
    from pushforward.maps.adaptive import AdaptiveDiffusion
    from pushforward.maps.diffusion import Diffusion
    from pushforward.maps.drawing import Drawn
    from pushforward.verbs import Model

__all__ = ["Settings", "Shown", "command", "layout", "mapped", "program", "run", "sheet_of"]

COLUMNS = 12  # states of a round that are shown
EVERY = 0.15  # seconds between pictures


@dataclass(frozen=True)
class Settings:
    """What is to be drawn, and how; the same as of `pushforward sample`."""

    model: str
    count: int = 16
    solver: str = "auto"
    steps: int = 20
    what: tuple[str, ...] = ()
    guidance: float | None = None
    seed: int = 0
    parallel: bool = False
    tolerance: float = 1e-3


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far.

    Args:
        says: in words.
        picture: all images, as they are now.
        rounds: where all steps are taken at once, a table: time across, rounds down.
        images: at the end, in [-1, 1].
        files: at the end, by name.
    """

    says: str
    picture: Image.Image | None = None
    rounds: str = ""
    images: Tensor | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def command(settings: Settings, *, text: bool = False, out: str = "samples.png") -> list[str]:
    """The arguments of `pushforward` that make the same images, as a file; `text`: the model reads prompts."""
    said = options(
        count=settings.count, solver=settings.solver, steps=steps_beside(settings.solver, settings.steps),
        **asked_what(settings.what, text=text), guidance=settings.guidance, seed=settings.seed,
    )  # fmt: skip
    said += ["--parallel", *options(tolerance=settings.tolerance)] if settings.parallel else []
    return ["sample", settings.model, *said, "--out", out]


def program(settings: Settings) -> str:
    """The same in Python."""
    what = take_turns(settings.what, 1 if len(settings.what) == 1 else settings.count)
    drawn = call(
        "model.sample", settings.count, solver=settings.solver, steps=steps_beside(settings.solver, settings.steps),
        labels=what or None, guidance=settings.guidance, seed=settings.seed,
        parallel=Name(f"pf.Parallel(tolerance={settings.tolerance:g})") if settings.parallel else None,
    )  # fmt: skip
    return f"import pushforward as pf\n\nmodel = {call('pf.load', settings.model)}\nimages = {drawn}"


def mapped(model: Model, settings: Settings) -> Diffusion | AdaptiveDiffusion:
    """The map from codes to the images, bound to what each shows."""
    from pushforward.execute import Parallel
    from pushforward.maps.labels import UNSAID
    from pushforward.verbs.samplers import map_of

    there = map_of(
        model, sampler(settings.solver, steps_beside(settings.solver, settings.steps)),
        labels=take_turns(settings.what, settings.count) or UNSAID, guidance=settings.guidance,
        parallel=Parallel(settings.tolerance) if settings.parallel else None,
    )  # fmt: skip
    return there.in_turn(settings.count)


def run(model: Model, settings: Settings) -> Generator[Shown, None, None]:
    """Draw the images, and show them on the way."""
    from pushforward.execute import Round
    from pushforward.maps.drawing import draw

    def work(tell: Callable[[Shown], None]) -> Shown:
        began, shown = time.perf_counter(), -1.0
        rows: list[list[str]] = []
        tell(Shown("Making the plan …"))
        there = mapped(model, settings)

        def watch(step: Progress | Round) -> None:
            nonlocal shown
            now = time.perf_counter() - began
            if isinstance(step, Round):
                assert step.last is not None
                rows.append(_round(model, step))
                tell(Shown(f"Round {step.done}: error {step.residual:.1e}, {step.active} to do, {now:.1f} s",
                           preview(viewed(model, step.last())), _grid(rows)))  # fmt: skip
                return
            says = f"Call {step.done}{f' of {step.total}' if step.total else ''}, {now:.1f} s"
            new = now - shown > EVERY
            shown = now if new else shown
            tell(Shown(says, preview(viewed(model, step.state)) if new else None))

        drawn = draw(there, settings.count, seed=settings.seed, callback=watch)
        files = {"samples.png": png(sheet_of(drawn, there, settings)), **_codes(there, settings)}
        return Shown(f"{drawn}, {time.perf_counter() - began:.1f} s", preview(drawn.images),
                     _grid(rows) if rows else "", drawn.images, files)  # fmt: skip

    yield from live(work)


def _round(model: Model, step: Round) -> list[str]:
    """A round as a row of the table: its number and error, and the states of the first image from noise to data."""
    import torch

    assert step.states is not None
    states = step.states()[:, 0]
    some = torch.linspace(0, len(states) - 1, min(COLUMNS, len(states))).round().long()
    says = f"States of the first image after round {step.done}"
    strip = embedded(row(viewed(model, states[some])), says, least=15 * len(some))
    return [f"{step.done}<br>{step.residual:.1e}", strip]


def _grid(rows: list[list[str]]) -> str:
    return table(["Round, error", "Noise → image"], rows, "The first image: time across, rounds down")


def sheet_of(drawn: Drawn, there: Diffusion | AdaptiveDiffusion, settings: Settings) -> Image.Image:
    """The picture that the command writes."""
    from pushforward.verbs.sheets import drawn_sheet

    return drawn_sheet(drawn, there, sampler(settings.solver).solver, settings.seed)


def _codes(there: Diffusion | AdaptiveDiffusion, settings: Settings) -> dict[str, bytes]:
    """The file of the images' codes, for `pushforward decode`; none where steps are chosen on the way."""
    from pushforward.maps.diffusion import Diffusion

    if not isinstance(there, Diffusion):
        return {}
    code = there.draw(settings.count, seed=settings.seed)
    return codes_file(settings.model, there, settings.solver, code)


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it returns what is to offer the model's classes or captions."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            what = what_choice("Draw", "Classes or prompts; images take them in turn. Empty: all.", multiple=True)
            solver = solver_choice()
            steps = gr.Slider(1, 200, 20, step=1, label="Steps")
            count = gr.Slider(1, 64, 16, step=1, label="Images")
            with gr.Row():
                guidance = guidance_number()
                seed = seed_number()
            parallel = gr.Checkbox(label="All steps at once", info="Solve the whole chain together, in rounds.")
            tolerance = gr.Dropdown([1e-1, 1e-2, 1e-3, 1e-4], value=1e-3, label="Error allowed", visible=False)
            go, stop = buttons("Sample")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="sample-says")
            shown = picture_area("Images", "The sampled images", "sample-picture")
            rounds = gr.HTML(elem_id="sample-rounds")
            taken = TakeAway("samples")

    def act(data: Mapping[Any, Any]) -> Updates:
        settings = Settings(
            model=data[model], count=int(data[count]), solver=data[solver].strip(), steps=int(data[steps]),
            what=tuple(data[what] or ()), guidance=data[guidance] or None, seed=int(data[seed] or 0),
            parallel=data[parallel], tolerance=float(data[tolerance]),
        )  # fmt: skip
        opened = shelf.open(settings.model)
        words, script = line(command(settings, text=opened.text is not None)), program(settings)
        return taken.follow(run(opened, settings), words, script, says, show)

    def show(news: Shown) -> dict[Any, Any]:
        return {
            **({shown: news.picture} if news.picture else {}),
            **({rounds: news.rounds} if news.rounds else {}),
        }

    parallel.change(lambda on: gr.Dropdown(visible=on), parallel, tolerance, queue=False, api_visibility="private")
    inputs = {model, what, solver, steps, count, guidance, seed, parallel, tolerance}
    wire(go, stop, act, inputs, says, {shown: None, rounds: ""}, taken)
    return [what]
