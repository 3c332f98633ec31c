"""Inpaint: paint over what is to be made anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.errors import PushforwardError
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
from pushforward.studio._shared.masks import PARTS, canvas, mask_file, mask_of
from pushforward.studio._shared.models import Shelf, asked_what, steps_beside
from pushforward.studio._shared.pictures import picture, preview, viewed
from pushforward.studio._shared.results import Name, call, line, options, png
from pushforward.studio._shared.told import Updates, said
from pushforward.studio._shared.uploads import Photo, draw_into, photo_area, read_photo

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.verbs import Model

__all__ = ["Settings", "Shown", "command", "layout", "program", "run"]

EVERY = 0.2  # seconds between pictures


@dataclass(frozen=True)
class Settings:
    """How parts are painted anew; the same as of `pushforward inpaint`."""

    model: str
    what: str | None = None
    solver: str = "ddpm"
    steps: int = 25
    repeats: int = 4
    draws: int = 4
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far: words, the draws as they are now, and at the end images and files."""

    says: str
    picture: Image.Image | None = None
    images: Tensor | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def command(settings: Settings, *, text: bool = False) -> list[str]:
    """The arguments of `pushforward` that make the same images; `text`: the model reads prompts."""
    told = options(
        mask="mask.png", solver=settings.solver, steps=steps_beside(settings.solver, settings.steps),
        repeats=None if _said_repeats(settings) else settings.repeats, draws=settings.draws,
        **asked_what(settings.what, text=text), guidance=settings.guidance, seed=settings.seed, out="inpainted",
    )  # fmt: skip
    return ["inpaint", settings.model, "picture-0.png", *told]


def _said_repeats(settings: Settings) -> bool:
    """Whether the solver's words say how often steps are repeated; then these hold, as on the command line."""
    return "repeats=" in settings.solver


def _solver(settings: Settings) -> str:
    more = settings.repeats > 1 and not _said_repeats(settings)
    return settings.solver + (f":repeats={settings.repeats}" if more else "")


def program(settings: Settings, photo: Photo) -> str:
    """The same in Python."""
    there = call("model.diffusion", _solver(settings), steps_beside(settings.solver, settings.steps),
                 labels=settings.what, guidance=settings.guidance)  # fmt: skip
    made = call("inpaint", Name(there), Name("images"), Name("known"), draws=settings.draws, seed=settings.seed,
                first=[photo.number])  # fmt: skip
    return "\n".join(
        [
            "import pushforward as pf",
            "from pushforward.data.inputs import read_like",
            "from pushforward.guidance.inpaint import inpaint",
            "from pathlib import Path",
            "",
            f"model = {call('pf.load', settings.model)}",
            "images = read_like(Path('picture-0.png'), model.image_shape)[None]",
            "known = read_like(Path('mask.png'), model.image_shape).mean(0) < 0",
            f"painted = {made}",
        ]
    )


def run(model: Model, photo: Photo, mask: Tensor, settings: Settings) -> Generator[Shown, None, None]:
    """Paint a part of a picture anew, several times.

    Args:
        model: that the picture is of.
        photo: the picture.
        mask: true where it is painted, `(height, width)`.
        settings: how.

    Raises:
        PushforwardError: nothing is painted over.
    """
    from pushforward.guidance.inpaint import inpaint

    if not bool(mask.any()):
        raise PushforwardError("Paint over what is to be made anew, or choose a part.")

    def work(tell: Callable[[Shown], None]) -> Shown:
        began, shown = time.perf_counter(), 0.0

        def watch(step: Any) -> None:
            nonlocal shown
            now = time.perf_counter() - began
            new = now - shown > EVERY
            shown = now if new else shown
            tell(Shown(f"Call {step.done} of {step.total}, {now:.1f} s",
                       preview(viewed(model, step.state)) if new else None))  # fmt: skip

        there = model.diffusion(
            _solver(settings), steps_beside(settings.solver, settings.steps),
            labels=settings.what, guidance=settings.guidance,
        )  # fmt: skip
        images = inpaint(there, photo.values, ~mask, draws=settings.draws, seed=settings.seed, first=[photo.number],
                         callback=watch)[0]  # fmt: skip
        files = {"picture-0.png": photo.file, "mask.png": mask_file(mask)}
        files |= {f"{k}.png": png(picture(one[None], 0)) for k, one in enumerate(images)}
        draws = many(len(images), "draw")
        says = f"{draws}, {there.plan.calls} each, {time.perf_counter() - began:.1f} s"
        return Shown(says, preview(images), images, files)

    yield from live(work)


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it returns what is to offer the model's classes or captions."""
    import gradio as gr

    standard = Settings("")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            photo = photo_area("Picture", "inpaint-photo")
            draw = gr.Button("Have the model draw one")
        with gr.Column(scale=2, min_width=300):
            editor = gr.ImageEditor(label="Paint over it", sources=(), type="numpy", layers=False,
                                    brush=gr.Brush(default_size=40, colors=["#e69f00"], color_mode="fixed"),
                                    transforms=(), format="png", canvas_size=(400, 400), elem_id="inpaint-editor",
                                    buttons=["fullscreen"])  # fmt: skip
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            what = what_choice("The picture shows", "A class or a prompt.")
            part = gr.Dropdown(["none", *PARTS], value="none", label="Paint anew", info="Besides what you paint over.")
            solver = solver_choice(standard.solver, ("ddpm", "ddim", "ddim:eta=0.5", "dpm++", "unipc"))
            steps = gr.Slider(5, 100, standard.steps, step=1, label="Steps")
            repeats = gr.Slider(1, 20, standard.repeats, step=1, label="Repeats", info="More blend in better.")
            draws = gr.Slider(1, 9, standard.draws, step=1, label="Draws")
            with gr.Row():
                guidance = guidance_number()
                seed = seed_number()
            go, stop = buttons("Inpaint")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="inpaint-says")
            shown = picture_area("Draws", "The picture with its part painted anew, several times", "inpaint-picture")
            taken = TakeAway("inpainted")

    def act(data: Mapping[Any, Any]) -> Updates:
        settings = Settings(
            data[model], data[what] or None, data[solver].strip(), int(data[steps]), int(data[repeats]),
            int(data[draws]), data[guidance] or None, int(data[seed] or 0),
        )  # fmt: skip
        opened = shelf.open(settings.model)
        given = read_photo(data[photo], opened)
        mask = mask_of(data[editor], data[part], (given.values.shape[2], given.values.shape[3]))
        words, script = line(command(settings, text=opened.text is not None)), program(settings, given)
        news = run(opened, given, mask, settings)
        return taken.follow(news, words, script, says, lambda one: {shown: one.picture} if one.picture else {})

    @said
    def prepare(path: str | None, name: str) -> Any:
        return None if path is None else canvas(read_photo(path, shelf.open(name)).values)

    photo.change(prepare, [photo, model], editor, api_visibility="private", show_progress="hidden")
    draw_into(photo, draw, shelf, model, what, seed)
    inputs = {model, photo, what, editor, part, solver, steps, repeats, draws, guidance, seed}
    wire(go, stop, act, inputs, says, {shown: None}, taken)
    return [what]
