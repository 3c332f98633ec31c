"""Sample images from a model, with any solver.

Examples are in `pushforward sample --help`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pushforward.cli.common import (
    CorrectorOption,
    EndOption,
    EtaOption,
    GridOption,
    JsonOption,
    NoiseOption,
    OrderOption,
    QuietOption,
    ReferenceOption,
    SolverOption,
    StepsOption,
    VariableOption,
    make_plan,
    progress,
    write_json,
)  # fmt: skip
from pushforward.errors import PushforwardError
from pushforward.execute import Progress
from pushforward.images import check_suffix, picture_suffixes, save_animation, save_image, sheet
from pushforward.model import Model, load
from pushforward.plan import Plan
from pushforward.pushforward import Diffusion

__all__ = ["sample"]

_FRAMES = 60


def sample(
    model: Annotated[str, typer.Argument(help="Name of an embedded model, a folder, or a hub name of `diffusers`.")],
    solver: SolverOption = "auto",
    steps: StepsOption = 20,
    order: OrderOption = None,
    eta: EtaOption = None,
    noise: NoiseOption = None,
    corrector: CorrectorOption = None,
    variable: VariableOption = None,
    reference: ReferenceOption = None,
    grid: GridOption = None,
    end: EndOption = None,
    count: Annotated[int, typer.Option(help="How many images.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of the codes; image i depends on the seed and i alone.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option(help="A class, by name or number; repeat for several. All in turn by default.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Weight of classifier-free guidance; 1 is none.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    out: Annotated[Path, typer.Option(help="Picture of all images (.png, .jpg, .webp).")] = Path("samples.png"),
    each: Annotated[Path | None, typer.Option(help="Folder for every image as a PNG of its own.")] = None,
    animate: Annotated[Path | None, typer.Option(help="The way from noise to images, as a .gif or .webp.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …; auto takes a GPU if there is one.")] = "auto",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    r"""Sample images from a model, with any solver.

    \b
    pushforward sample fashion-vp
    pushforward sample fashion-vp --solver gddim --order 2 --steps 20 --count 64 --seed 0 --out grid.png
    pushforward sample fashion-langevin --solver ddim --eta 0.5 --steps 100 --label sneaker --guidance 2
    pushforward sample emoji --label google --animate emoji.gif
    pushforward sample ./my-diffusers-folder --solver unipc --steps 10 --json report.json
    pushforward sample fashion-vp --solver rk45 --count 8        # adaptive steps, the slow reference
    """
    check_suffix(out, picture_suffixes())
    if animate is not None:
        check_suffix(animate, {".gif", ".webp"})
    chosen = load(model).to(pick_device(device))
    settings = {"order": order, "eta": eta, "noise": noise, "corrector": corrector, "variable": variable}
    plan = make_plan(chosen, solver, steps, grid=grid, end=end, reference=reference, settings=settings)
    pushforward = Diffusion(chosen, plan, device=pick_device(device))
    labels = _labels(chosen, label, count)
    frames: list[Tensor] = []
    calls = batches = 0
    started = time.perf_counter()
    total = -(-count // batch) * plan.nfe if isinstance(plan, Plan) else None
    with progress("sampling", total=total, quiet=quiet) as bar:

        def tell(step: Progress) -> None:
            nonlocal calls, batches
            calls += 1
            batches += step.done == 1
            bar.update()
            if step.done == step.total:
                done = min(count, batches * batch)
                bar.set_postfix_str(f"{done / (time.perf_counter() - started):.1f} images/s")
            if animate is not None and batches == 1 and _keep(step):
                frames.append(chosen.process.image(step.state).float().cpu())

        images = pushforward.sample(count, seed=seed, labels=labels, guidance=guidance, batch=batch, callback=tell)
    seconds = time.perf_counter() - started
    save_image(sheet(images), out)
    if each is not None:
        for i, image in enumerate(images):
            save_image(sheet(image[None], smallest=0), each / f"{i:05d}.png")
    if animate is not None:
        save_animation(_pictures(chosen, frames, images[:batch]), animate)
    nfe = plan.nfe if isinstance(plan, Plan) else calls / batches  # adaptive steps may differ from batch to batch
    if not quiet and json != "-":
        typer.echo(f"{out}: {count} images, {nfe:.0f} network evaluations each, {count / seconds:.1f} images/s")
    report = {
        "model": model, "process": chosen.process.name, "solver": solver,
        "settings": dict(plan.settings) if isinstance(plan, Plan) else {"tolerance": plan.tolerance},
        "steps": len(plan.steps) - 1 if isinstance(plan, Plan) else None, "times": plan.times.tolist(),
        "count": count, "seed": seed, "labels": None if labels is None else labels.tolist(), "guidance": guidance,
        "nfe": nfe, "rounds": nfe, "seconds": seconds, "out": out,
    }  # fmt: skip
    write_json(report, json)


def pick_device(name: str) -> str:
    """The device to work on.

    Raises:
        PushforwardError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        msg = f"Device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu."
        raise PushforwardError(msg) from None
    return name


def _labels(model: Model, names: list[str] | None, count: int) -> Tensor | None:
    if not model.classes:
        if names:
            msg = f"Model {model.name!r} has no classes; leave --label out."
            raise PushforwardError(msg)
        return None
    numbers = [_label(model, name) for name in names] if names else list(range(len(model.classes)))
    return torch.tensor([numbers[i % len(numbers)] for i in range(count)])


def _label(model: Model, name: str) -> int:
    if name in model.classes:
        return model.classes.index(name)
    if name.isdecimal() and int(name) < len(model.classes):
        return int(name)
    msg = f"Model {model.name!r} has no class {name!r}; it has {', '.join(model.classes)}."
    raise PushforwardError(msg)


def _keep(step: Progress) -> bool:
    """Whether this of all network calls is one of the animation's frames, evenly spread if it is known how many."""
    stride = max(1, -(-step.total // _FRAMES))
    return (step.done - 1) % stride == 0


def _pictures(model: Model, states: list[Tensor], last: Tensor) -> list[Any]:
    """Frames: each state scaled to the range of images, then the images themselves."""
    with torch.no_grad():
        shown = [s / s.abs().amax().clamp_min(1.0) if model.decoder is None else model.images(s) for s in states]
    return [sheet(s).convert("RGB") for s in [*shown, last]]
