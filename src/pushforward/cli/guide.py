"""Guide a model or a GAN by energies of its images.

Examples are in `pushforward guide --help`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pushforward.cli._shared.batch import made_of, open_folder
from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.labels import choose_labels
from pushforward.cli._shared.models import image_size, make_plan, open_model, pick_device
from pushforward.cli._shared.options import (
    ConditionOptions,
    FitOption,
    ModelOptions,
    ReportOptions,
    grouped,
)
from pushforward.cli._shared.report import progress, remark, write_json
from pushforward.cli._shared.runs import Kept
from pushforward.data.files import digest, save_tensors
from pushforward.data.inputs import read_inputs, read_like
from pushforward.data.pictures import save_image, sheet
from pushforward.errors import PushforwardError
from pushforward.execute import Exact, Gradient, Implicit, Phantom
from pushforward.guidance.chains import Chains, Record
from pushforward.guidance.checkpoints import load_chains, load_descents
from pushforward.guidance.diagnostics import plot
from pushforward.guidance.dynamics import SAMPLERS, Dynamics, Schedule
from pushforward.guidance.energies.energy import Energy, total, values_of
from pushforward.guidance.energies.parse import ENERGIES, Setting, energy_of
from pushforward.guidance.particles import PARTICLES, Particles
from pushforward.guidance.particles import guide as gather
from pushforward.guidance.posterior import Descents, Guided, best, with_prior
from pushforward.guidance.posterior import guide as run
from pushforward.guidance.report import report_of, summary
from pushforward.guidance.samplers import parse_sampler
from pushforward.guidance.steering import STEERINGS, Steering
from pushforward.guidance.steering import guide as steer
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.generator import Generator
from pushforward.maps.load import is_generator, load_generator
from pushforward.maps.spec import SamplerSpec, parse
from pushforward.maps.storage import header, save_codes
from pushforward.model.contents import contents, model_digest
from pushforward.verbs.sheets import chains_sheet

__all__ = ["guide"]

_GRADIENTS: Mapping[str, Callable[[], Gradient]] = {"exact": Exact, "implicit": Implicit, "phantom": Phantom}
_MOVES, _SOLVER, _NOISY = 200, "dpm++:steps=10", "dpm++:noise=1:steps=20"
_FRAMES = 8  # moments that the sheet of chains shows
_SHOWN = 16  # chains on that sheet, at most

_ENERGIES = "; ".join(
    f"{name}{':' * bool(about)}{about}{f' ({own})' * bool(own)}" for name, (about, own, _) in ENERGIES.items()
)


@grouped()
def guide(
    model: Annotated[
        str,
        typer.Argument(
            help="Model: an embedded one, a folder or hub name of `diffusers`; or a GAN, as a DCGAN checkpoint or "
            "TorchScript file."
        ),
    ],
    *,
    energies: Annotated[
        list[str],
        typer.Option(
            "--energy",
            help=f"Energy that images are to have little of; repeat for a sum. Each takes weight=. {_ENERGIES}.",
        ),
    ],
    sampler: Annotated[
        str,
        typer.Option(
            help="Draw codes by langevin, mala or hmc (such as hmc:leaps=5), or without a gradient by ess or "
            "pcn; or images by particles, which estimate the evidence too, fk or psi (such as fk:particles=8); seek "
            "single best codes by adam or l-bfgs, or by white, which keeps the spectrum of noise; or steer each step "
            f"of the solver by {', '.join(STEERINGS)} (such as mpgd:direct=2)."
        ),
    ] = "langevin",
    moves: Annotated[
        int | None, typer.Option(help="Move each chain or descent this many times; 200 by default.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="The old name of --moves.", min=1, hidden=True)] = None,
    chains: Annotated[int, typer.Option(help="Run this many chains, or draw this many images.", min=1)] = 16,
    warm_up: Annotated[
        int | None, typer.Option(help="Discard this many moves before the first draw; half of them by default.", min=0)
    ] = None,
    anneal: Annotated[
        int, typer.Option(help="Let the energy grow to its full weight over this many moves.", min=0)
    ] = 0,
    rungs: Annotated[
        int,
        typer.Option(
            help="Make each chain a ladder of so many, with weights of the energy from 1 to 0, that swap their states; "
            "it forgets where it began, and costs as much as that many chains.",
            min=1,
        ),
    ] = 1,
    draws: Annotated[int, typer.Option(help="Keep this many samples of each chain, evenly spaced.", min=1)] = 1,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            "--plan",
            help=f"Decode a diffusion's codes with this sampler, for gradients and pictures; by default {_SOLVER}, for "
            f"particles {_NOISY}.",
        ),
    ] = None,
    gradient: Annotated[
        str | None,
        typer.Option(help="Take gradients through a diffusion so: exact (the default), implicit or phantom."),
    ] = None,
    latent: Annotated[
        str | None,
        typer.Option(help="Set the shape of a code, such as 100 or 100x1x1, for a GAN in a TorchScript file."),
    ] = None,
    condition: ConditionOptions,
    seed: Annotated[int, typer.Option(help="Seed the chains; chain i depends on the seed and i alone.")] = 0,
    batch: Annotated[int, typer.Option(help="Process this many chains at a time.", min=1)] = 64,
    out: Annotated[
        Path, typer.Option(help="Write the results into this folder; the same command continues there.")
    ] = Path("guided"),
    fit: FitOption = "crop",
    place: ModelOptions,
    reports: ReportOptions,
) -> None:
    r"""Guide a model or a GAN by energies of its images.

    Samples p(z) ~ N(z; 0, I) exp(-sum of energies) over the codes z. The folder gets the samples, a sheet of the chains
    over time, their traces, and the codes.

    \b
    pushforward guide fashion-vp --energy classifier:fashion:label=sneaker:weight=5 --sampler hmc --moves 40
    pushforward guide MODEL --energy clip:"a smiling face":weight=500 --sampler langevin --moves 200 --chains 16
    pushforward guide emoji --energy colour:#2060c0 --sampler mala:step-size=0.1 --draws 4
    pushforward guide fashion-vp --energy classifier:fashion:label=sneaker:weight=5 --sampler pcn --rungs 4
    pushforward guide fashion-vp --energy masked:shirt.png:mask=known.png --sampler tfg --solver ddim:steps=20
    pushforward guide dcgan.pth --energy face:me.png:network=dlib.safetensors:weight=2500 --sampler mala
    pushforward guide MODEL --energy python:mine.py:name=energy --sampler adam:prior=chi --moves 100
    pushforward guide MODEL --energy "command:./score.sh:weight=3" --sampler ess    # any program's number per PNG file
    pushforward guide fashion-vp --energy classifier:fashion:label=sneaker:weight=5 --sampler fk:particles=8
    """
    if steps is not None:
        remark("--steps of guide is called --moves now.")
        moves = moves or steps
    how = parse_sampler(sampler)
    _check(how, gan=is_generator(model), place=place, moves=moves, solver=solver,
           gradient=gradient, latent=latent, scheduled=(warm_up, anneal, draws, rungs) != (None, 0, 1, 1))  # fmt: skip
    check_outputs({"--json": reports.json}, {"--out": out})
    condition.check(chains)
    usual = _NOISY if isinstance(how, Particles) else _SOLVER
    moves, solver, gradient = moves or _MOVES, usual if solver is None else solver, gradient or "exact"
    schedule = Schedule(moves, warm_up, anneal, draws, rungs) if isinstance(how, Dynamics) else None
    free, shape = _open(model, parse(solver), condition, place, latent, quiet=reports.quiet)
    pushforward = _given(free, condition, chains)
    setting = Setting(lambda path: read_like(path, shape, fit), shape, pick_device(place.device))
    wanted = energy_of(energies, setting)
    settings: dict[str, Any] = {
        "model": model, "energies": energies, "sampler": sampler, "chains": chains, "seed": seed,
        "labels": condition.label, "prompts": condition.prompt, "negative": condition.negative,
        "guidance": pushforward.guidance if isinstance(pushforward, Diffusion) else 1.0, "fit": fit,
    }  # fmt: skip
    if not isinstance(how, Particles | Steering):
        settings["steps"] = moves  # as folders of earlier versions call them
    if schedule is not None:
        settings |= {"warm_up": schedule.warmed, "anneal": anneal, "draws": draws}
        settings |= {"rungs": rungs} if rungs > 1 else {}  # which folders of earlier versions do not have
    if isinstance(pushforward, Diffusion):
        through = None if isinstance(how, Particles | Steering) else gradient
        settings |= {"plan": solver, **parse(solver).rule, **place.kept, "gradient": through}
        pushforward = pushforward.run_by(gradient=_GRADIENTS[gradient]())
    else:
        settings |= {} if latent is None else {"latent": latent}
    own = model_digest(free.model) if isinstance(free, Diffusion) else digest(contents(free))
    open_folder(out, settings)
    made = made_of(settings, own, contents(setting.used))
    job = _Job(pushforward, wanted, chains, moves, schedule, seed, batch, out,
               str(setting.device), made, reports.quiet)  # fmt: skip
    found, plain, seconds = _run(job, how)
    _write(found, schedule, out)
    if not isinstance(how, Steering):
        more = {"seed": seed, **place.kept}
        _write_codes(found, pushforward, model, parse(solver), more, out)
    report = {
        **settings, "asked": energies, **report_of(found, schedule), "unguided_energy": plain, "seconds": seconds,
        "out": out,
    }  # fmt: skip
    write_json(report, str(out / "report.json"))
    reports.tell(summary(report))
    reports.write(report)


# -- what the words stand for ------------------------------------------------------------------------------------------


def _check(
    how: Dynamics | Particles | Steering | dict[str, Any], *, gan: bool, place: ModelOptions,
    moves: int | None, solver: str | None, gradient: str | None, latent: str | None, scheduled: bool,
) -> None:  # fmt: skip
    """Raise unless the options fit the sampler and the kind of the model."""
    steered_ = isinstance(how, Steering)
    vain = {
        f"A warm-up, annealing, rungs and draws are of chains: {', '.join(SAMPLERS)}; leave them out.":
            not isinstance(how, Dynamics) and scheduled,
        f"Only a diffusion has steps to steer; a GAN's codes are sampled by {', '.join(SAMPLERS)}.": steered_ and gan,
        f"Steering takes the steps of its solver: give --solver ddim:steps={moves} instead of --moves.":
            steered_ and moves is not None,
        "Steering takes no gradient through the plan; leave --gradient out.": steered_ and gradient is not None,
        f"Particles go once through the steps of a diffusion; sample a GAN's codes by {', '.join(SAMPLERS)}.":
            isinstance(how, Particles) and gan,
        "Particles take their solver's steps once: say --solver dpm++:noise=1:steps=20 or psi:moves=10, not --moves.":
            isinstance(how, Particles) and moves is not None,
        f"Particles ({', '.join(PARTICLES)}) need no gradient through the whole plan; leave --gradient out.":
            isinstance(how, Particles) and gradient is not None,
        "This sampler takes no gradient; leave --gradient out.":
            isinstance(how, Dynamics) and not how.gradient and gradient is not None,
        "A GAN has no plan, and its own gradient, precision and size; leave out --solver, --gradient, --dtype, --size.":
            gan and (solver, gradient, place.dtype, place.size) != (None, None, "float32", None),
        "A GAN is no pipeline of diffusers; leave out --call, --image, --control and --lora.":
            gan and any(place.asked.values()),
        "Only a GAN in a file takes --latent, and the model is none; name its file, or leave --latent out.":
            not gan and latent is not None,
        f"The gradient is one of {', '.join(_GRADIENTS)}; got {gradient!r}.":
            gradient is not None and gradient not in _GRADIENTS,
    }  # fmt: skip
    for message, wrong in vain.items():
        if wrong:
            raise PushforwardError(message)


def _open(
    source: str,
    spec: SamplerSpec,
    condition: ConditionOptions,
    place: ModelOptions,
    latent: str | None,
    *,
    quiet: bool,
) -> tuple[Diffusion | Generator, tuple[int, ...]]:
    """What makes images of codes, under no condition yet, and the shape of these images."""
    if is_generator(source):
        if condition.negative:
            raise PushforwardError(f"{source} reads no prompts; leave --negative out.")
        if condition.prompt or condition.guidance not in (None, 1):
            raise PushforwardError("A GAN takes no prompts and no guidance by labels; leave them out.")
        generator = load_generator(source, _shape(latent), device=pick_device(place.device))
        assert generator.image_shape is not None
        return generator, generator.image_shape
    model = open_model(source, place, condition.negative, **place.asked)
    if spec.rounds is not None:
        raise PushforwardError(f"Codes are of given steps; leave rounds={spec.rounds} out of --solver, and say steps.")
    plan = make_plan(model, spec, condition.weight(model), quiet=quiet)
    return Diffusion(model, plan, parallel=spec.method(plan)), image_size(model)


def _given(free: Diffusion | Generator, condition: ConditionOptions, count: int) -> Diffusion | Generator:
    """The map under the labels or prompts that are asked for, and the weight of guidance."""
    if isinstance(free, Diffusion):
        return free.given(condition.labels(free.model, count), condition.weight(free.model))
    return free.given(choose_labels(free, count, condition.label))


def _shape(text: str | None) -> tuple[int, ...] | None:
    """`100x1x1` as numbers."""
    if text is None:
        return None
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise PushforwardError(f"The shape of a code is written as 100 or 100x1x1; got {text!r}.")
    return tuple(map(int, sides))


# -- the work ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a run works with.

    Args:
        pushforward: the map.
        energy: of its images.
        chains: or descents, or images.
        moves: number of moves of each chain or descent.
        schedule: of chains.
        seed: seed of all that is drawn.
        batch: chains at a time.
        out: folder of the results.
        device: for what an earlier run has left.
        made: what the run is made with (`batch.made_of`).
        quiet: show no progress.
    """

    pushforward: Diffusion | Generator
    energy: Energy
    chains: int
    moves: int
    schedule: Schedule | None
    seed: int
    batch: int
    out: Path
    device: str
    made: str
    quiet: bool

    @property
    def asked(self) -> dict[str, Any]:
        """Seed and batch, as the functions of the library take them."""
        return {"seed": self.seed, "batch": self.batch}


def _run(job: _Job, how: Dynamics | Particles | Steering | dict[str, Any]) -> tuple[Guided, float, float]:
    """The samples, the mean energy of what the map draws without guidance, and the seconds of all runs."""
    if isinstance(how, Particles | Steering):
        return _pass(job, how)
    found, seconds = _walk(job, how) if isinstance(how, Dynamics) else _descend(job, how)
    plain = float(found.history[0].energy.mean())
    if isinstance(how, dict) and how.get("candidates", 1) > 1:  # of which the history begins at the best
        plain = _unguided(replace(job, energy=with_prior(job.energy, how["prior"])))
    return found, plain, seconds


def _walk(job: _Job, how: Dynamics) -> tuple[Guided, float]:
    """The samples of chains, and the seconds that all runs have worked on them."""
    schedule, steps = job.schedule, job.out / "steps"
    assert schedule is not None
    every = max(1, -(-schedule.steps // (_FRAMES - 1)))
    with (
        Kept(job.out / "chains.safetensors", load_chains, job.device, job.made) as kept,
        progress("guiding", total=schedule.steps, unit="move", quiet=job.quiet) as bar,
    ):

        def tell(state: Chains) -> None:
            bar.update(state.step - bar.n)
            bar.set_postfix_str(_figures(state.history[-1], adjusted=how.adjusted))
            if state.step % every == 0 or state.step == schedule.steps:
                shown = state.point.images[: min(job.chains, _SHOWN)].float().cpu()
                save_image(sheet(shown, columns=_SHOWN, smallest=0), steps / f"{state.step:05d}.png")
            kept.tell(state)

        found = run(job.pushforward, job.energy, how, schedule, chains=job.chains, resume=kept.before,
                    callback=tell, **job.asked)  # fmt: skip
    pictures = read_inputs([steps], None, None, skip=True)
    for name, _ in pictures.skipped:
        remark(f"{name} cannot be read; chains.png lacks it.")
    columns = min(job.chains, _SHOWN)
    shown = pictures.values.unflatten(3, (columns, -1)).movedim(3, 1).flatten(0, 1)  # moment after moment
    moves = [f"move {int(Path(name).stem)}" for name in pictures.names]
    save_image(sheet(shown, columns=columns, heads=[f"chain {k}" for k in range(columns)], rows=moves),
               job.out / "chains.png")  # fmt: skip
    return found, kept.seconds


def _descend(job: _Job, how: dict[str, Any]) -> tuple[Guided, float]:
    """The best codes of descents, and the seconds that all runs have worked on them."""
    with (
        Kept(job.out / "descents.safetensors", load_descents, job.device, job.made) as kept,
        progress("descending", total=job.moves, unit="move", quiet=job.quiet) as bar,
    ):

        def tell(state: Descents) -> None:
            bar.update(state.step - bar.n)
            bar.set_postfix_str(_figures(state.history[-1], adjusted=False))
            kept.tell(state)

        found = best(job.pushforward, job.energy, steps=job.moves, count=job.chains, resume=kept.before,
                     callback=tell, **how, **job.asked)  # fmt: skip
    return found, kept.seconds


def _pass(job: _Job, how: Particles | Steering) -> tuple[Guided, float, float]:
    """Images of one pass by particles or steered, the mean energy of the plan's own, and the seconds they took."""
    started = time.perf_counter()
    gathers = isinstance(how, Particles)
    work: Any = gather if gathers else steer
    with progress("gathering" if gathers else "steering", unit="call", quiet=job.quiet) as bar:
        found = work(job.pushforward, job.energy, how, chains=job.chains, callback=lambda _: bar.update(), **job.asked)
    return found, _unguided(job), time.perf_counter() - started


def _unguided(job: _Job) -> float:
    """The mean energy of images without guidance."""
    images, code = job.pushforward.sample(job.chains, **job.asked), job.pushforward.draw(job.chains, seed=job.seed)
    return float(total(values_of(job.energy, images, code, job.batch)).mean())


# -- reports -----------------------------------------------------------------------------------------------------------


def _figures(record: Record, *, adjusted: bool) -> str:
    text = f"energy {float(record.energy.mean()):.4g}"
    return text + f", accepted {float(record.acceptance.mean()):.2f}" if adjusted else text


def _write(found: Guided, schedule: Schedule | None, out: Path) -> None:
    chains = len(found.nfe)
    for i, (chain, image) in enumerate(zip(found.chain.tolist(), found.images, strict=True)):
        save_image(sheet(image[None], smallest=0), out / "samples" / f"{chain:03d}-{i // chains:03d}.png")
    save_image(chains_sheet(found.images, found.energy.tolist(), found.chain.tolist()), out / "samples.png")
    if found.history:
        plot(found.history, 0 if schedule is None else schedule.warmed, out / "traces.png")


def _write_codes(
    found: Guided,
    pushforward: Diffusion | Generator,
    source: str,
    spec: SamplerSpec,
    more: Mapping[str, Any],
    out: Path,
) -> None:
    """`codes.safetensors`: of a diffusion, for `pushforward decode`; of anything else, the bare tensors."""
    path = out / "codes.safetensors"
    if isinstance(pushforward, Diffusion):
        of = torch.arange(len(found.nfe)).repeat(len(found.images) // len(found.nfe))  # draw after draw of all chains
        info = header(source, spec, pushforward.some(of), len(of))
        save_codes(path, found.code, {**info, **more})
        return
    tensors = {"start": found.code.start, "noises": found.code.noises}
    save_tensors(path, {name: x for name, x in tensors.items() if x is not None})
