"""Edit: invert a picture, edit it by text or class with every method in a row, or translate it to another model."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.studio import invert
from pushforward.studio._shared.controls import TakeAway, buttons, guidance_number, seed_number, what_choice, wire
from pushforward.studio._shared.live import live
from pushforward.studio._shared.models import Shelf, asked_what
from pushforward.studio._shared.pictures import copying, figures, picture
from pushforward.studio._shared.results import Name, call, line, options, png, reading
from pushforward.studio._shared.told import Updates
from pushforward.studio._shared.uploads import Photo, draw_into, photo_area, read_photo

if TYPE_CHECKING:
    from torch import Tensor

    from pushforward.verbs import Model

__all__ = ["METHODS", "Settings", "Shown", "command", "layout", "program", "run"]

METHODS = ("stochastic", "independent", "deterministic", "uni-inv", "direct", "flowedit", "flowalign", "sdedit")
SAME = "the same model"


@dataclass(frozen=True)
class Settings:
    """How a picture is changed; the same as of `pushforward edit`, or, to another model, `pushforward translate`."""

    model: str
    source: str | None = None
    target: str | None = None
    to: str | None = None
    methods: tuple[str, ...] = METHODS
    steps: int = 50
    start: float = 0.8
    guidance: float = 3.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far: words, a row of results in HTML, the images by method, and at the end files."""

    says: str
    row: str = ""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def command(settings: Settings, method: str, *, text: bool = False, reads: bool = False) -> list[str]:
    """The arguments of `pushforward` that make the same image.

    Args:
        settings: the settings.
        method: one of its methods.
        text: the model reads prompts.
        reads: so does the other model.
    """
    own = {"method": method, "steps": settings.steps, "seed": settings.seed}
    if settings.to is None:
        said = options(model=settings.model, source=settings.source, target=settings.target, **own,
                       guidance=settings.guidance, skip=1 - settings.start, trials=1, select="none")  # fmt: skip
        return ["edit", "picture-0.png", *said, "--out", method]
    source = asked_what(None if method == "sdedit" else settings.source, text=text, prefix="source_")
    target = asked_what(settings.target, text=reads, prefix="target_")
    said = options(source=settings.model, target=settings.to, **source, **target, **own,
                   target_guidance=settings.guidance, start=settings.start)  # fmt: skip
    return ["translate", "picture-0.png", *said, "--out", method]


def program(settings: Settings, method: str, photo: Photo) -> str:
    """The same in Python."""
    own = {"method": method, "steps": settings.steps, "start": settings.start, "guidance": settings.guidance}
    if settings.to is None:
        seed = settings.seed + photo.number
        made = call("model.edit", Name("images"), settings.source, settings.target, **own, seed=seed)
    else:
        made = call("model.translate", Name("images"), Name(call("pf.load", settings.to)), source=settings.source,
                    target=settings.target, **own, seed=settings.seed, first=photo.number)  # fmt: skip
    return "\n".join([*reading(settings.model, 1), f"edited = {made}.images"])


def run(model: Model, other: Model | None, photo: Photo, settings: Settings) -> Generator[Shown, None, None]:
    """Change a picture by each method, and show each result as it is there.

    Args:
        model: that the picture is of.
        other: to be translated to; `None`: edited by text or class.
        photo: the picture.
        settings: how.

    Raises:
        PushforwardError: no method, or none that works, or no text or class to edit by.
    """
    if not settings.methods:
        raise PushforwardError("Choose at least one method.")
    if other is None and (settings.source is None or settings.target is None):
        raise PushforwardError("Say what the picture shows and what it is to show, or choose another model.")
    reads = other is not None and other.text is not None

    def work(tell: Callable[[Shown], None]) -> Shown:
        shown: list[tuple[Any, str, str]] = [(picture(photo.values), "The picture", "")]
        images: dict[str, Tensor] = {}
        files = {"picture-0.png": photo.file}
        for method in settings.methods:
            began, calls = time.perf_counter(), 0

            def watch(_: object, method: str = method, so_far: str = figures(shown)) -> None:
                nonlocal calls
                calls += 1
                tell(Shown(f"{method}: call {calls}", so_far, dict(images)))

            try:
                found = _changed(model, other, photo, settings, method, watch)
            except PushforwardError as error:
                if not images and method == settings.methods[-1]:
                    raise  # once, not as often as there are methods
                shown.append((None, method, escape(str(error))))
                continue
            images[method] = found.images
            files[f"{method}.png"] = png(picture(found.images, 0))
            words = line(command(settings, method, text=model.text is not None, reads=reads))
            took = f"{many(found.nfe, 'network evaluation')}, {many(found.rounds, 'round')}"
            says = f"{took}, {time.perf_counter() - began:.1f} s"
            copies = copying("Command", words) + copying("Python", program(settings, method, photo))
            shown.append((picture(found.images), method, says + copies))
        says = f"{many(len(images), 'result')}, from the same picture and seed"
        return Shown(says, figures(shown), images, files)

    yield from live(work)


def _changed(
    model: Model, other: Model | None, photo: Photo, settings: Settings, method: str, watch: Callable[[object], None]
) -> Any:
    own: Any = {"method": method, "steps": settings.steps, "guidance": settings.guidance, "callback": watch}
    start = round(settings.start, 6)
    if other is None:
        return model.edit(photo.values, settings.source, settings.target, start=start,
                          seed=settings.seed + photo.number, **own)  # fmt: skip
    return model.translate(photo.values, other, source=settings.source, target=settings.target, start=start,
                           seed=settings.seed, first=[photo.number], **own)  # fmt: skip


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it returns what is to offer the model's classes or captions."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=260):
            photo = photo_area("Picture", "edit-photo")
            draw = gr.Button("Have the model draw one")
        with gr.Column(min_width=260):
            other = photo_area("Another one, to walk to", "edit-other")
            draw_other = gr.Button("Have the model draw another")
    source = what_choice("The picture shows", "A class or a prompt.")
    with gr.Tab("Change it"):
        target, seed = _change(shelf, model, photo, source)
    with gr.Tab("Invert it"):
        invert.layout(shelf, model, photo, other, source)

    draw_into(photo, draw, shelf, model, source, seed)
    draw_into(other, draw_other, shelf, model, source, seed, step=1)
    return [source, target]


def _change(shelf: Shelf, model: Any, photo: Any, source: Any) -> tuple[Any, Any]:
    import gradio as gr

    standard = Settings("")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            target = what_choice("It is to show", "A class or a prompt.")
            to = gr.Dropdown([SAME, *shelf.names], value=SAME, label="With the model", info="Another one translates.")
            methods = gr.Dropdown(list(METHODS), value=list(METHODS), label="Methods", multiselect=True)
            start = gr.Slider(0.1, 1, standard.start, step=0.05, label="Share of the steps", info="More changes more.")
            steps = gr.Slider(5, 200, standard.steps, step=1, label="Steps")
            with gr.Row():
                guidance = guidance_number(standard.guidance, "1: none.")
                seed = seed_number()
            go, stop = buttons("Change")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="edit-says")
            shown = gr.HTML(elem_id="edit-row")
            taken = TakeAway("edited")

    def act(data: Mapping[Any, Any]) -> Updates:
        there = None if data[to] in (SAME, data[model]) else data[to]
        settings = Settings(
            data[model], data[source] or None, data[target] or None, there, tuple(data[methods] or ()),
            int(data[steps]), float(data[start]), float(data[guidance] or 1), int(data[seed] or 0),
        )  # fmt: skip
        opened, other = shelf.open(settings.model), None if there is None else shelf.open(there)
        given = read_photo(data[photo], opened)
        text, reads = opened.text is not None, other is not None and other.text is not None
        words = "\n".join(line(command(settings, one, text=text, reads=reads)) for one in settings.methods)
        script = program(settings, settings.methods[0], given) if settings.methods else ""
        news = run(opened, other, given, settings)
        return taken.follow(news, words, script, says, lambda one: {shown: one.row})

    inputs = {model, photo, source, target, to, methods, start, steps, guidance, seed}
    wire(go, stop, act, inputs, says, {shown: ""}, taken)
    return target, seed
