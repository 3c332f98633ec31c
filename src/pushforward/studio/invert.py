"""Invert: the code behind a picture, what it decodes to, and the way between two codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pushforward.data.words import many
from pushforward.studio._shared.controls import TakeAway, buttons, guidance_number, picture_area, solver_choice, wire
from pushforward.studio._shared.live import live
from pushforward.studio._shared.models import Shelf, asked_what, steps_beside
from pushforward.studio._shared.pictures import picture, row, table, viewed
from pushforward.studio._shared.results import call, codes_file, line, options, png, reading
from pushforward.studio._shared.told import Updates
from pushforward.studio._shared.uploads import Photo, read_photo

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pushforward.maps.inversion import Inversion
    from pushforward.verbs import Model

__all__ = ["FRAMES", "METHODS", "Settings", "Shown", "commands", "layout", "program", "run"]

METHODS = {"exact": "exact", "naive": "naive", "uni-inv": "uni-inv", "direct": "direct", "optimised": "optimise"}
FRAMES = 9
WEIGHTS = [k / (FRAMES - 1) for k in range(FRAMES)]  # of the second code in each
DETERMINISTIC = ("ddim", "gddim:order=2", "dpm++", "unipc", "heun", "o-belm", "bdia")


@dataclass(frozen=True)
class Settings:
    """How codes are found; the same as of `pushforward invert`."""

    model: str
    solver: str = "ddim"
    steps: int = 50
    method: str = "exact"
    what: str | None = None
    guidance: float | None = None


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is to see so far; at the end the pictures before and after, figures, and the way between two codes."""

    says: str
    before: Image.Image | None = None
    after: Image.Image | None = None
    code: Image.Image | None = None
    figures: str = ""
    between: tuple[Image.Image, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    found: Inversion | None = None


def commands(settings: Settings, count: int = 1, *, text: bool = False) -> list[list[str]]:
    """The arguments of `pushforward` that find the same codes, and, of two, draw what is between them."""
    photos = [f"picture-{k}.png" for k in range(count)]
    said = options(
        solver=settings.solver, steps=steps_beside(settings.solver, settings.steps), method=METHODS[settings.method],
        **asked_what(settings.what, text=text), guidance=settings.guidance, out="codes.safetensors", picture="both.png",
    )  # fmt: skip
    found = ["invert", settings.model, *photos, *said]
    walk = ["interpolate", "codes.safetensors", *options(frames=FRAMES, out="between.png")]
    return [found, walk] if count > 1 else [found]


def program(settings: Settings, count: int = 1) -> str:
    """The same in Python."""
    steps = steps_beside(settings.solver, settings.steps)
    find = call("invert", solver=settings.solver, steps=steps, method=settings.method, labels=settings.what,
                guidance=settings.guidance).replace("(", "(images, ", 1)  # fmt: skip
    lines = [*reading(settings.model, count), f"codes = model.{find}", "again = codes.decode()"]
    if count > 1:
        lines += [
            "from pushforward.maps.interpolation import interpolate",
            "halfway = codes.pushforward.decode(interpolate(codes.code[:1], codes.code[1:], 0.5))",
        ]
    return "\n".join(lines)


def run(model: Model, photos: list[Photo], settings: Settings) -> Generator[Shown, None, None]:
    """Find the codes of one or two pictures, decode them again, and of two what lies between."""
    import torch

    from pushforward.verbs.sheets import reconstructed, walks

    images = torch.cat([photo.values for photo in photos])

    def work(tell: Callable[[Shown], None]) -> Shown:
        began, calls = time.perf_counter(), 0

        def watch(step: Any) -> None:
            nonlocal calls
            calls += 1
            left = getattr(step, "residual", None)
            error = f", error {left:.1e}" if isinstance(left, float) else ""
            tell(Shown(f"Round {calls}{error}, {time.perf_counter() - began:.1f} s"))

        found = model.invert(
            images, solver=settings.solver, steps=steps_beside(settings.solver, settings.steps),
            method=settings.method,  # type: ignore[arg-type]
            labels=settings.what, guidance=settings.guidance, callback=watch,
        )  # fmt: skip
        again = model.decode(found)
        seconds = time.perf_counter() - began
        frames = _frames(found) if len(photos) > 1 else None
        files = {f"picture-{k}.png": photo.file for k, photo in enumerate(photos)}
        files |= _codes(found, settings) | {"both.png": png(reconstructed(images, again))}
        if frames is not None:
            files["between.png"] = png(walks(frames, WEIGHTS, [(0, 1)]))
        took = many(float(found.nfe.double().mean()), "network evaluation")
        checked = f" and {many(found.decoding, 'call')} of decoding" if found.decoding else ""
        return Shown(
            f"{took} each in {many(found.rounds, 'round')}{checked}, {seconds:.1f} s",
            row(images, 256), row(again, 256), row(viewed(model, found.code.start), 256),
            _figures(images, again, found), () if frames is None else tuple(picture(one[None], 256) for one in frames),
            files, found,
        )  # fmt: skip

    yield from live(work)


def _frames(found: Inversion) -> Tensor:
    """Images on the great circle from the first code to the second."""
    import torch

    from pushforward.maps.interpolation import interpolate

    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    between = interpolate(found.code[[0] * FRAMES], found.code[[1] * FRAMES], weights)
    with torch.no_grad():
        return found.pushforward.decode(between).float().cpu()


def _codes(found: Inversion, settings: Settings) -> dict[str, bytes]:
    """The file that `pushforward invert` would write."""
    from pushforward.maps.diffusion import Diffusion

    there = found.pushforward
    assert isinstance(there, Diffusion)
    return codes_file(settings.model, there, settings.solver, found.code)


def _figures(images: Tensor, again: Tensor, found: Inversion) -> str:
    """How near the pictures come back, and how Gaussian their codes are, each beside what would be perfect."""
    from pushforward.maps.normality import statistics

    rows = []
    for k, one in enumerate(statistics(found.code.start)["images"]):
        off = (again[k] - images[k]).flatten()
        near = " and ".join("none" if one[key] is None else f"{one[key]:.3f}" for key in ("horizontal", "vertical"))
        rows.append([str(k + 1), f"{float(off.abs().max()):.1e}", f"{float(off.square().mean().sqrt()):.1e}",
                     f"{one['mean']:.3f}", f"{one['std']:.3f}", near, f"{one['p_value']:.2f}"])  # fmt: skip
    rows.append(["perfect", "0", "0", "0", "1", "0 and 0", "above 0.05"])
    header = ["Picture", "Largest error", "Root mean square", "Mean of code", "Deviation", "Neighbours", "p (normal)"]
    return table(header, rows, "Reconstruction, on a range of 2, and how Gaussian the code is")


def layout(shelf: Shelf, model: Any, photo: Any, other: Any, what: Any) -> None:
    """The part of the tab Edit, beneath the pictures that it shares with the others."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            method = gr.Dropdown(list(METHODS), value="exact", label="Method")
            solver = solver_choice("ddim", DETERMINISTIC)
            steps = gr.Slider(5, 200, 50, step=1, label="Steps")
            guidance = guidance_number()
            two = gr.Checkbox(label="Walk to the other picture", info="On the great circle between their codes.")
            go, stop = buttons("Invert")
        with gr.Column(scale=2, min_width=300):
            says = gr.Markdown("", elem_id="invert-says")
            with gr.Row():
                slider = gr.ImageSlider(label="Before and after", format="png", interactive=False, min_width=220,
                                        elem_id="invert-slider", buttons=["fullscreen"])  # fmt: skip
                code = picture_area("Code", "The code as a picture: noise, if it is Gaussian", "invert-code")
            figures = gr.HTML(elem_id="invert-figures")
            frames = gr.State(())
            at = gr.Slider(0, FRAMES - 1, 0, step=1, label="From the first code to the second", visible=False,
                           elem_id="invert-at")  # fmt: skip
            walked = gr.Image(label="Between", format="png", interactive=False, visible=False, buttons=["download"],
                              alt_text="The image of a code between the two", elem_id="invert-between")  # fmt: skip
            taken = TakeAway("codes")

    def act(data: Mapping[Any, Any]) -> Updates:
        opened = shelf.open(data[model])
        photos = [read_photo(data[one], opened) for one in ((photo, other) if data[two] else (photo,))]
        settings = Settings(data[model], data[solver].strip(), int(data[steps]), data[method], data[what] or None,
                            data[guidance] or None)  # fmt: skip
        many = len(photos)
        words = "\n".join(line(one) for one in commands(settings, many, text=opened.text is not None))
        script = program(settings, many)
        return taken.follow(run(opened, photos, settings), words, script, says, show)

    def show(news: Shown) -> dict[Any, Any]:
        changed: dict[Any, Any] = {}
        if news.before and news.after:
            changed |= {slider: (news.before, news.after), code: news.code, figures: news.figures}
        if news.between:
            changed |= {
                frames: news.between,
                at: gr.Slider(value=0, visible=True),
                walked: gr.Image(value=news.between[0], visible=True),
            }
        return changed

    at.change(lambda k, all_: all_[int(k)] if all_ else None, [at, frames], walked, show_progress="hidden",
              queue=False, api_visibility="private")  # fmt: skip
    inputs = {model, photo, other, two, what, method, solver, steps, guidance}
    hidden = gr.update(visible=False)
    empty = {slider: None, code: None, figures: "", frames: (), at: hidden, walked: hidden}
    wire(go, stop, act, inputs, says, empty, taken)
