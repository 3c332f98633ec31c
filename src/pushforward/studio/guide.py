"""Guide: choose energies, watch chains look for codes whose images have little of them, stop and keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.studio._shared.controls import TakeAway, buttons, picture_area, seed_number, what_choice, wire
from pushforward.studio._shared.live import live
from pushforward.studio._shared.masks import PARTS, mask_file, mask_of
from pushforward.studio._shared.models import Shelf, asked_what
from pushforward.studio._shared.pictures import preview, traces
from pushforward.studio._shared.results import Name, call, codes_file, line, options, png
from pushforward.studio._shared.told import Updates
from pushforward.studio._shared.uploads import Photo, photo_area, read_photo

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.guidance.chains import Chains
    from pushforward.guidance.energies.energy import Energy
    from pushforward.maps.code import Code
    from pushforward.verbs import Model

__all__ = ["Settings", "Shown", "command", "energies", "layout", "program", "run"]

EVERY = 0.3  # seconds between pictures
SAMPLERS = ("langevin", "mala", "hmc", "pcn", "ess")
REFERENCES = {"all of it": "near", "its rough shape": "low-pass", "a part of it": "masked"}


@dataclass(frozen=True)
class Settings:
    """What images shall be like, and how chains look for them; the same as of `pushforward guide`.

    Args:
        model: its name.
        colour: `#rrggbb`, or `None`.
        label: a class that a classifier of clothes is to see.
        text: what CLIP is to see.
        like: what images have in common with the reference picture, one of `REFERENCES`.
        part: which part, for `a part of it`.
        weight: weight of each energy.
        what: a class or prompt that the model is given.
        sampler: `langevin`, `mala`, `hmc`, `pcn` or `ess`.
        moves: number of moves of each chain.
        chains: how many.
        solver: decodes the codes.
        seed: seeds the chains.
    """

    model: str
    colour: str | None = None
    label: str | None = None
    text: str | None = None
    like: str | None = None
    part: str = "upper half"
    weight: float = 5.0
    what: str | None = None
    sampler: str = "langevin"
    moves: int = 60
    chains: int = 4
    solver: str = "dpm++:steps=4"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far: words, the chains' images, their traces in HTML, and files to keep."""

    says: str
    picture: Image.Image | None = None
    traces: str = ""
    images: Tensor | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def energies(settings: Settings, clip: str | None = None) -> list[str]:
    """The energies in the words of `pushforward guide --energy`; no other kind can be asked for.

    Raises:
        PushforwardError: none is chosen, or a text that would be read as settings.
    """
    weight = f"weight={settings.weight:g}"
    for words in (settings.label, settings.text):
        if words and (":" in words or "=" in words):
            raise PushforwardError("Leave colons and equals signs out of texts and classes.")
    found = []
    if settings.colour:
        found.append(f"colour:{settings.colour}:{weight}")
    if settings.label:
        found.append(f"classifier:fashion:label={settings.label}:{weight}")
    if settings.text:
        found.append(f"clip:{settings.text}:model={clip}:{weight}")
    if settings.like:
        kind = REFERENCES[settings.like]
        mask = "mask=mask.png:deviation=1:" if kind == "masked" else ""  # as far as the others reach by one weight
        found.append(f"{kind}:picture-0.png:{mask}{weight}")
    if not found:
        raise PushforwardError("Choose at least one energy: a colour, a class, a text or a reference.")
    return found


def command(settings: Settings, clip: str | None = None, *, text: bool = False) -> list[str]:
    """The arguments of `pushforward` that give the same images; `text`: the model reads prompts."""
    said = options(
        energy=tuple(energies(settings, clip)), sampler=settings.sampler, moves=settings.moves, chains=settings.chains,
        solver=settings.solver, **asked_what(settings.what, text=text), seed=settings.seed, out="guided",
    )  # fmt: skip
    return ["guide", settings.model, *said]


def program(settings: Settings, clip: str | None = None) -> str:
    """The same in Python."""
    made = call("model.guide", Name("wish"), Name(f"pf.{settings.sampler}()"), Name(f"pf.Schedule({settings.moves})"),
                solver=settings.solver, labels=settings.what, chains=settings.chains, seed=settings.seed)  # fmt: skip
    return "\n".join(
        [
            "import pushforward as pf",
            "from pushforward.data.inputs import read_like",
            "from pushforward.guidance.energies.parse import Setting, energy_of",
            "",
            f"model = {call('pf.load', settings.model)}",
            "setting = Setting(lambda path: read_like(path, model.image_shape), model.image_shape)",
            f"wish = energy_of({energies(settings, clip)!r}, setting)",
            f"found = {made}",
        ]
    )


def _wish(model: Model, photo: Photo | None, mask: Tensor, words: list[str]) -> Energy:
    """The energies' sum; pictures are those of the page, and no file is read for them."""
    from pushforward.guidance.energies.parse import Setting, energy_of

    assert model.image_shape is not None

    def no_file(path: Path) -> Tensor:
        raise PushforwardError(f"This page reads no files; {path.name} is none of its pictures.")

    setting = Setting(no_file, model.image_shape, model.device)
    if photo is not None:
        setting.used["image", "picture-0.png"] = photo.values[0]
    setting.used["mask", "mask.png"] = mask
    return energy_of(words, setting)


def run(model: Model, photo: Photo | None, settings: Settings, clip: str | None = None) -> Generator[Shown, None, None]:
    """Move chains, and show them after every move; what is shown can be kept."""
    from pushforward.guidance.dynamics import SAMPLERS, Schedule
    from pushforward.verbs.sheets import chains_sheet

    words = energies(settings, clip)
    if settings.like and photo is None:
        raise PushforwardError("Give the reference first: drop a picture.")
    if settings.sampler not in SAMPLERS:
        raise PushforwardError(f"Chains move by {', '.join(SAMPLERS)}; got {settings.sampler!r}.")
    shape = model.image_shape or (1, 1, 1)
    mask = mask_of(None, settings.part, (shape[1], shape[2]))
    given = {} if photo is None else {"picture-0.png": photo.file, "mask.png": mask_file(mask)}

    def work(tell: Callable[[Shown], None]) -> Shown:
        began, shown = time.perf_counter(), -1.0
        wish = _wish(model, photo, mask, words)
        there = model.diffusion(settings.solver, labels=settings.what)
        start = there.draw(settings.chains, seed=settings.seed)

        def files(images: Tensor, energies: Tensor, code: Code) -> dict[str, bytes]:
            codes = codes_file(settings.model, there, settings.solver, code)
            samples = chains_sheet(images, energies.tolist(), range(len(images)))
            return {**given, **codes, "samples.png": png(samples)}

        def watch(chains: Chains) -> None:
            nonlocal shown
            now = time.perf_counter() - began
            record = chains.history[-1]
            says = f"Move {chains.step} of {settings.moves}: mean energy {float(record.energy.mean()):.4g}, {now:.1f} s"
            if now - shown < EVERY:
                tell(Shown(says))
                return
            shown, images = now, chains.point.images.float().cpu()
            tell(Shown(says, preview(images), _traces(chains.history), images,
                       files(images, record.energy, start.with_variables(chains.variables))))  # fmt: skip

        found = model.guide(
            wish, SAMPLERS[settings.sampler](), Schedule(settings.moves), solver=settings.solver, labels=settings.what,
            chains=settings.chains, seed=settings.seed, callback=watch,
        )  # fmt: skip
        before, after = float(found.history[0].energy.mean()), float(found.energy.mean())
        says = f"Mean energy {before:.4g} before, {after:.4g} after {many(settings.moves, 'move')}, "
        says += f"{time.perf_counter() - began:.1f} s"
        return Shown(says, preview(found.images), _traces(found.history), found.images,
                     files(found.images, found.energy, found.code))  # fmt: skip

    yield from live(work)


def _traces(history: Any) -> str:
    import torch

    return traces(torch.stack([record.energy for record in history]).T.tolist(), "Energy of each chain")


def layout(shelf: Shelf, model: Any) -> list[Any]:
    """The tab; it returns what is to offer the model's classes or captions."""
    import gradio as gr

    from pushforward.vision.classifiers import FASHION_LABELS

    standard = Settings("")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("Move images towards one of these, or several:")
            coloured = gr.Checkbox(label="A colour")
            colour = gr.ColorPicker("#2060c0", label="Colour", visible=False)
            label = what_choice("A class", "Seen by a classifier of clothes, in grey images of 28 x 28.",
                                offered=FASHION_LABELS)  # fmt: skip
            text = gr.Textbox(label="A text", info="Seen by CLIP.", visible=shelf.clip is not None)
            like = gr.Dropdown(["none", *REFERENCES], value="none", label="Like a picture, in")
            photo = photo_area("Reference", "guide-photo")
            part = gr.Dropdown(list(PARTS), value=standard.part, label="Part of the picture", visible=False)
            weight = gr.Slider(0.1, 500, standard.weight, label="Weight", info="How strongly images are moved.")
            what = what_choice("Draw", "A class or a prompt, if any.")
            sampler = gr.Radio(SAMPLERS, value=standard.sampler, label="Chains move by",
                               info="Methods of Markov chain Monte Carlo.")  # fmt: skip
            moves = gr.Slider(5, 400, standard.moves, step=1, label="Moves")
            chains = gr.Slider(1, 16, standard.chains, step=1, label="Chains")
            seed = seed_number()
            go, stop = buttons("Guide")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="guide-says")
            shown = picture_area("Chains", "The image of each chain", "guide-picture")
            curves = gr.HTML(elem_id="guide-traces")
            gr.Markdown("What is shown can be kept: stop when you like it, and download.")
            taken = TakeAway("guided")

    def act(data: Mapping[Any, Any]) -> Updates:
        settings = Settings(
            data[model], data[colour] if data[coloured] else None, data[label] or None, (data[text] or "").strip(),
            None if data[like] == "none" else data[like], data[part], float(data[weight]), data[what] or None,
            data[sampler], int(data[moves]), int(data[chains]), seed=int(data[seed] or 0),
        )  # fmt: skip
        opened = shelf.open(settings.model)
        given = read_photo(data[photo], opened) if settings.like and data[photo] else None
        words = line(command(settings, shelf.clip, text=opened.text is not None))
        script = program(settings, shelf.clip)
        news = run(opened, given, settings, shelf.clip)
        return taken.follow(news, words, script, says, show)

    def show(news: Shown) -> dict[Any, Any]:
        return {shown: news.picture, curves: news.traces} if news.picture else {}

    coloured.change(lambda on: gr.ColorPicker(visible=on), coloured, colour, queue=False, api_visibility="private")
    like.change(lambda kind: gr.Dropdown(visible=kind == "a part of it"), like, part, queue=False,
                api_visibility="private")  # fmt: skip
    inputs = {
        model, coloured, colour, label, text, like, photo, part, weight, what, sampler, moves, chains, seed,
    }  # fmt: skip
    wire(go, stop, act, inputs, says, {shown: None, curves: ""}, taken)
    return [what]
