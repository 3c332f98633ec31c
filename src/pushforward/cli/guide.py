"""Guide a model or a GAN by energies of its images.

Examples are in `pushforward guide --help`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import torch
import typer
from torch import Tensor

from pushforward.cli._shared.batch import made_of, open_folder
from pushforward.cli._shared.checks import check_outputs, in_vain, spare
from pushforward.cli._shared.models import choose_labels, image_size, open_model, pick_device, with_negative_prompt
from pushforward.cli._shared.options import (
    DeviceOption,
    DtypeOption,
    FitOption,
    GuidanceOption,
    JsonOption,
    LabelOption,
    NegativeOption,
    PromptOption,
    QuietOption,
    SizeOption,
)
from pushforward.cli._shared.report import progress, write_json
from pushforward.data.files import digest, save_tensors
from pushforward.data.inputs import read_file, read_like
from pushforward.data.pictures import save_image, sheet
from pushforward.data.schema import check
from pushforward.errors import PushforwardError
from pushforward.execute import Exact, Gradient, Implicit, Phantom
from pushforward.guidance.chains import SAMPLERS, Chains, Dynamics, Record, Schedule
from pushforward.guidance.checkpoints import load_chains, load_descents, save_checkpoint
from pushforward.guidance.diagnostics import diagnose, plot
from pushforward.guidance.energies.energy import Energy
from pushforward.guidance.energies.parse import ENERGIES, Setting, energy
from pushforward.guidance.optimisers import OPTIMISERS
from pushforward.guidance.posterior import Descents, Guided, Prior, best
from pushforward.guidance.posterior import guide as run
from pushforward.guidance.steering import STEERINGS, Steering, steered
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.generator import Generator, is_generator, load_generator
from pushforward.maps.labels import Labels
from pushforward.maps.normality import statistics
from pushforward.maps.protocol import Pushforward
from pushforward.maps.spec import parse, words
from pushforward.maps.storage import header, save_codes
from pushforward.model.contents import contents, model_digest

__all__ = ["guide"]

_GRADIENTS: Mapping[str, Callable[[], Gradient]] = {"exact": Exact, "implicit": Implicit, "phantom": Phantom}
_MOVES, _PLAN = 200, "dpm++:steps=10"
_FRAMES = 8  # moments that the sheet of chains shows
_SAVE_EVERY = 20.0  # seconds
_SATURATED = 0.98  # of images: values beyond are black or white
_MOSTLY = 0.5  # part of the codes that a test rejects, from which it is said; of Gaussian ones it rejects 0.05
_SHOWN = 16  # chains on that sheet, at most

_ENERGIES = "; ".join(
    f"{name}{':' * bool(about)}{about}{f' ({own})' * bool(own)}" for name, (about, own, _) in ENERGIES.items()
)


def guide(
    model: Annotated[
        str,
        typer.Argument(
            help="Model: an embedded one, a folder or hub name of `diffusers`; or a GAN, as a DCGAN checkpoint or "
            "TorchScript file."
        ),
    ],
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
            help="Draw codes by langevin, mala or hmc (such as hmc:leaps=5), seek single best codes by adam or l-bfgs, "
            f"or steer each step of the solver by {', '.join(STEERINGS)} (such as mpgd:direct=2)."
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
    draws: Annotated[int, typer.Option(help="Keep this many samples of each chain, evenly spaced.", min=1)] = 1,
    plan: Annotated[
        str | None,
        typer.Option(
            "--solver",
            "--plan",
            help=f"Decode a diffusion's codes with this sampler, for gradients and pictures alike; by default {_PLAN}.",
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
    label: LabelOption = None,
    prompt: PromptOption = None,
    negative: NegativeOption = "",
    guidance: GuidanceOption = 1.0,
    seed: Annotated[int, typer.Option(help="Seed the chains; chain i depends on the seed and i alone.")] = 0,
    batch: Annotated[int, typer.Option(help="Process this many chains at a time.", min=1)] = 64,
    out: Annotated[
        Path, typer.Option(help="Write the results into this folder; the same command continues there.")
    ] = Path("guided"),
    fit: FitOption = "crop",
    size: SizeOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    r"""Guide a model or a GAN by energies of its images.

    Samples p(z) ~ N(z; 0, I) exp(-sum of energies) over the codes z. The folder gets the samples, a sheet of the chains
    over time, their traces, and the codes.

    \b
    pushforward guide fashion-vp --energy classifier:fashion:label=sneaker:weight=5 --sampler hmc --moves 40
    pushforward guide MODEL --energy clip:"a smiling face":weight=500 --sampler langevin --moves 200 --chains 16
    pushforward guide emoji --energy colour:#2060c0 --sampler mala:step-size=0.1 --draws 4
    pushforward guide fashion-vp --energy masked:shirt.png:mask=known.png --sampler tfg --solver ddim:steps=20
    pushforward guide dcgan.pth --energy face:me.png:network=dlib.safetensors:weight=2500 --sampler mala
    pushforward guide MODEL --energy python:mine.py:name=energy --sampler adam:prior=chi --moves 100
    """
    if steps is not None:
        typer.echo("pushforward: --steps of guide is called --moves now.", err=True)
        moves = moves or steps
    how, generator = _method(sampler), is_generator(model)
    vain = {
        "A warm-up, annealing and draws are of chains: langevin, mala or hmc; leave them out.":
            not isinstance(how, Dynamics) and (warm_up, anneal, draws) != (None, 0, 1),
        "Only a diffusion has steps to steer; a GAN's codes are sampled by langevin, mala or hmc.":
            isinstance(how, Steering) and generator,
        f"Steering takes the steps of its solver: give --solver ddim:steps={moves} instead of --moves.":
            isinstance(how, Steering) and moves is not None,
        "Steering takes no gradient through the plan; leave --gradient out.":
            isinstance(how, Steering) and gradient is not None,
        "A GAN has no plan, and its own gradient, precision and size; leave out --solver, --gradient, --dtype, --size.":
            generator and (plan, gradient, dtype, size) != (None, None, "float32", None),
        "The codes of a diffusion have the shape that its plan gives them; leave --latent out.":
            not generator and latent is not None,
    }  # fmt: skip
    for msg, given in vain.items():
        if given:
            raise PushforwardError(msg)
    check_outputs({"--json": json}, {"--out": out})
    in_vain({"negative": "guidance is 1" if guidance == 1 and prompt else None})
    spare(chains, label=label, prompt=prompt)
    moves, plan, gradient = moves or _MOVES, plan or _PLAN, gradient or "exact"
    schedule = Schedule(moves, warm_up, anneal, draws) if isinstance(how, Dynamics) else None
    if gradient not in _GRADIENTS:
        raise PushforwardError(f"The gradient is one of {', '.join(_GRADIENTS)}; got {gradient!r}.")
    where = pick_device(device)
    pushforward, shape = _open(model, plan, where, dtype, size, latent, negative)
    pushforward, labels = _given(pushforward, label, prompt, guidance, chains)
    setting = Setting(lambda path: read_like(path, shape, fit), shape, where)
    first, *others = (energy(text, setting) for text in energies)
    whole = sum(others, first)
    settings: dict[str, Any] = {
        "model": model, "energies": energies, "sampler": sampler, "chains": chains, "seed": seed,
        "labels": label, "prompts": prompt, "negative": negative, "guidance": guidance, "fit": fit,
    }  # fmt: skip
    if not isinstance(how, Steering):
        settings["steps"] = moves  # as folders of earlier versions call them
    if schedule is not None:
        settings |= {"warm_up": schedule.warmed, "anneal": anneal, "draws": draws}
    if not generator:
        how_far = None if isinstance(how, Steering) else gradient
        settings |= {"plan": plan, "dtype": dtype, "size": size, "gradient": how_far}
    elif latent is not None:
        settings["latent"] = latent
    open_folder(out, settings)
    own = model_digest(pushforward.model) if isinstance(pushforward, Diffusion) else digest(contents(pushforward))
    made = made_of(settings, own, contents(setting.used))
    asked: dict[str, Any] = {"seed": seed, "batch": batch}
    if isinstance(pushforward, Diffusion):
        pushforward = pushforward.run_by(gradient=_GRADIENTS[gradient]())
    plain = math.nan
    match how:
        case Dynamics():
            assert schedule is not None
            found, seconds = _walk(pushforward, whole, how, schedule, chains, asked, out, where, made, quiet=quiet)
        case Steering():
            assert isinstance(pushforward, Diffusion)
            started = time.perf_counter()
            found, plain = _steer(pushforward, whole, how, chains, asked, quiet=quiet)
            seconds = time.perf_counter() - started
        case _:
            found, seconds = _descend(pushforward, whole, how, moves, chains, asked, out, where, made, quiet=quiet)
    _write(found, schedule, out)
    if not isinstance(how, Steering):
        _write_codes(
            found, pushforward, model, plan, labels, guidance, {"seed": seed, "dtype": dtype, "size": size}, out
        )
    if found.history:  # chains and descents begin at what the map draws without guidance
        plain = float(found.history[0].energy.mean())
    report = {
        **settings, "asked": energies, **_report(found, schedule), "unguided_energy": plain, "seconds": seconds,
        "out": out,
    }  # fmt: skip
    write_json(report, str(out / "report.json"))
    if not quiet and json != "-":
        typer.echo(_summary(report))
    write_json(report, json)


# -- what the words stand for ------------------------------------------------------------------------------------------


def _open(
    source: str, plan: str, device: str, dtype: str, size: str | None, latent: str | None, negative: str
) -> tuple[Diffusion | Generator, tuple[int, ...]]:
    """What makes images of codes, and the shape of these images."""
    if is_generator(source):
        if negative:
            raise PushforwardError(f"{source} reads no prompts; leave --negative out.")
        generator = load_generator(source, _shape(latent), device=device)
        assert generator.image_shape is not None
        return generator, generator.image_shape
    model = with_negative_prompt(open_model(source, device, dtype, size), negative)
    sampler = parse(plan)
    made = sampler.plan(model)
    return Diffusion(model, made, device=device, parallel=sampler.method(made)), image_size(model)


def _given(
    pushforward: Diffusion | Generator, label: list[str] | None, prompt: list[str] | None, guidance: float, count: int
) -> tuple[Diffusion | Generator, Labels]:
    """The map under the labels or prompts that are asked for, and these."""
    if isinstance(pushforward, Diffusion):
        labels = choose_labels(pushforward.model, label or [], count, prompt or [])
        return pushforward.given(labels, guidance), labels
    if prompt or guidance != 1:
        raise PushforwardError("A GAN takes no prompts and no guidance by labels; leave them out.")
    labels = choose_labels(pushforward, label or [], count)
    return pushforward.given(labels), labels


def _shape(text: str | None) -> tuple[int, ...] | None:
    """`100x1x1` as numbers."""
    if text is None:
        return None
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise PushforwardError(f"The shape of a code is written as 100 or 100x1x1; got {text!r}.")
    return tuple(map(int, sides))


def _method(text: str) -> Dynamics | Steering | dict[str, Any]:
    """What `--sampler` names: how chains move, how a plan's steps are steered, or the settings of a descent."""
    name, settings = words(text, "sampler", "hmc:leaps=5")
    try:
        if name in SAMPLERS:
            return SAMPLERS[name](**_fitting(settings, {"leaps": int, "preconditioned": bool}))
        if name in STEERINGS:
            return replace(STEERINGS[name], **settings)  # type: ignore[arg-type]
        if name in OPTIMISERS:
            unknown = settings.keys() - {"learning_rate", "prior"}
            if unknown:
                raise TypeError(", ".join(unknown))
            prior = settings.pop("prior", "chi")
            if prior not in (*get_args(Prior), "none"):
                raise PushforwardError(
                    f"The prior of a descent is {', '.join(get_args(Prior))} or none; got {prior!r}."
                )
            return {"optimiser": name, "prior": None if prior == "none" else prior, **_fitting(settings, {})}
    except TypeError as error:
        raise PushforwardError(
            f"The sampler {name!r} does not take these settings ({text}): {str(error).splitlines()[0]}."
        ) from error
    raise PushforwardError(f"Unknown sampler {name!r}; known are {', '.join([*SAMPLERS, *OPTIMISERS, *STEERINGS])}.")


def _fitting(settings: Mapping[str, object], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The settings, if each is of its kind; numbers, where nothing is said.

    Raises:
        TypeError: one is not.
    """
    for name, value in settings.items():
        kind = kinds.get(name, float)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{name} is {value!r}, no {kind.__name__}")
    return dict(settings)


# -- the work ----------------------------------------------------------------------------------------------------------


def _walk(
    pushforward: Pushforward, whole: Energy, how: Dynamics, schedule: Schedule, chains: int, asked: dict[str, Any],
    out: Path, device: str, made: str, *, quiet: bool,
) -> tuple[Guided, float]:  # fmt: skip
    """The samples of chains, and the seconds that all runs have worked on them."""
    every = max(1, -(-schedule.steps // (_FRAMES - 1)))
    with (
        _Kept(out / "chains.safetensors", load_chains, device, made) as kept,
        progress("guiding", total=schedule.steps, unit="step", quiet=quiet) as bar,
    ):

        def tell(state: Chains) -> None:
            bar.update(state.step - bar.n)
            bar.set_postfix_str(_figures(state.history[-1], adjusted=how.adjusted))
            if state.step % every == 0 or state.step == schedule.steps:
                save_image(sheet(state.point.images[:_SHOWN].float().cpu(), columns=_SHOWN, smallest=0),
                           out / "steps" / f"{state.step:05d}.png")  # fmt: skip
            kept.tell(state)

        found = run(pushforward, whole, how, schedule, chains=chains, resume=kept.before, callback=tell, **asked)
    pictures = [read_file(file, None, None, Counter()) for file in sorted((out / "steps").glob("*.png"))]
    columns = min(chains, _SHOWN)
    shown = torch.stack(pictures).unflatten(3, (columns, -1)).movedim(3, 1).flatten(0, 1)  # moment after moment
    save_image(sheet(shown.float() / 127.5 - 1, columns=columns), out / "chains.png")
    return found, kept.seconds


def _descend(
    pushforward: Pushforward, whole: Energy, how: dict[str, Any], steps: int, chains: int, asked: dict[str, Any],
    out: Path, device: str, made: str, *, quiet: bool,
) -> tuple[Guided, float]:  # fmt: skip
    """The best codes of descents, and the seconds that all runs have worked on them."""
    with (
        _Kept(out / "descents.safetensors", load_descents, device, made) as kept,
        progress("descending", total=steps, unit="step", quiet=quiet) as bar,
    ):

        def tell(state: Descents) -> None:
            bar.update(state.step - bar.n)
            bar.set_postfix_str(_figures(state.history[-1], adjusted=False))
            kept.tell(state)

        found = best(pushforward, whole, steps=steps, count=chains, resume=kept.before, callback=tell, **how, **asked)
    return found, kept.seconds


@dataclass(frozen=True)
class _Info:
    seconds: float
    made: str | None = None


class _Kept:
    """What chains or descents have come to, in a file: written now and then, and when the run ends or breaks off.

    Args:
        path: of the file.
        load: reads it.
        device: for the tensors.
        made: what the run is made with (`batch.made_of`). A file that was made with something else is put aside.

    Attributes:
        before: what an earlier run has left, if any.
        seconds: of work, of all runs, once it is over.
    """

    def __init__(
        self, path: Path, load: Callable[[Path, str], tuple[Any, dict[str, Any]]], device: str, made: str
    ) -> None:
        self._path, self._made, self.seconds = path, made, 0.0
        self.before: Any = None
        self._last: Chains | Descents | None = None
        if path.is_file():
            before, info = load(path, device)
            header = check(info, _Info, f"The header of {path}", "remove it to begin anew")
            if header.made == made:
                self.before, self.seconds = before, header.seconds
            else:
                aside = path.with_stem(f"{path.stem}-{digest(path)[:8]}")
                path.replace(aside)
                told = f"pushforward: {path} was made with other weights or energies; it is {aside.name} now."
                typer.echo(f"{told} The run begins anew.", err=True)
        self._saved = self._began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def tell(self, state: Chains | Descents) -> None:
        """That the work has come so far."""
        if self.before is None or state.step > self.before.step:
            self._last = state
            if time.perf_counter() - self._saved > _SAVE_EVERY:
                self._save()

    def _save(self) -> None:
        assert self._last is not None
        self._saved = time.perf_counter()
        save_checkpoint(
            self._path, self._last, {"seconds": self.seconds + self._saved - self._began, "made": self._made}
        )

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._save()
            self.seconds += self._saved - self._began


def _steer(
    diffusion: Diffusion, whole: Energy, how: Steering, chains: int, asked: dict[str, Any], *, quiet: bool
) -> tuple[Guided, float]:
    """Images of a plan whose every step is steered, with their energies, and the mean energy of the plan's own."""
    there = replace(diffusion, model=steered(diffusion.model, whole, how))
    with progress("steering", unit="call", quiet=quiet) as bar:

        def tell(_: Any) -> None:
            bar.update()

        if there.parallel is None:
            images, nfe = there.sample(chains, callback=tell, **asked), torch.full((chains,), there.plan.nfe)
        else:
            solved = list(there.solved(chains, callback=tell, **asked))
            images = torch.cat([some for some, _ in solved])
            nfe = torch.cat([solution.nfe.cpu() for _, solution in solved])
    code = diffusion.draw(chains, seed=asked["seed"])

    def measured(images: Tensor) -> dict[str, Tensor]:
        parts = []
        for some in torch.arange(chains).split(asked["batch"]):
            with torch.enable_grad():  # which energies may take themselves
                found = whole.parts(images[some].to(code.start.device).requires_grad_(), code[some])
            parts.append({name: value.detach().double().cpu() for name, value in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    plain = torch.stack([*measured(diffusion.sample(chains, **asked)).values()]).sum(0).mean()
    nfe = nfe * (2 if how.through else 1)  # each answer has a derivative
    weights, energies = torch.full((chains,), 1 / chains), measured(images)
    return Guided(code, images, energies, weights, torch.arange(chains), nfe, ()), float(plain)


# -- reports -----------------------------------------------------------------------------------------------------------


def _figures(record: Record, *, adjusted: bool) -> str:
    text = f"energy {float(record.energy.mean()):.4g}"
    return text + f", accepted {float(record.acceptance.mean()):.2f}" if adjusted else text


def _write(found: Guided, schedule: Schedule | None, out: Path) -> None:
    chains = len(found.nfe)
    for i, (chain, image) in enumerate(zip(found.chain.tolist(), found.images, strict=True)):
        save_image(sheet(image[None], smallest=0), out / "samples" / f"{chain:03d}-{i // chains:03d}.png")
    save_image(sheet(found.images), out / "samples.png")
    if found.history:
        plot(found.history, 0 if schedule is None else schedule.warmed, out / "traces.png")


def _write_codes(
    found: Guided, pushforward: Pushforward, source: str, plan: str, labels: Labels, guidance: float,
    more: Mapping[str, Any], out: Path,
) -> None:  # fmt: skip
    """`codes.safetensors`: of a diffusion, for `pushforward decode`; of anything else, the bare tensors."""
    path = out / "codes.safetensors"
    if isinstance(pushforward, Diffusion):
        sampler, times = parse(plan), pushforward.times
        told = _repeated(labels, len(found.images) // len(found.nfe))
        info = header(
            source, pushforward.model, sampler.solver, sampler.settings, times, labels=told, guidance=guidance
        )
        save_codes(path, found.code, {**info, **more})
        return
    tensors = {"start": found.code.start, "noises": found.code.noises}
    save_tensors(path, {name: x for name, x in tensors.items() if x is not None})


def _report(found: Guided, schedule: Schedule | None) -> dict[str, Any]:
    """Energies of the samples, and what chains tell of themselves."""
    rows = [
        {
            "chain": chain,
            "weight": weight,
            "energy": total,
            "energies": {k: float(v[i]) for k, v in found.energies.items()},
        }
        for i, (chain, weight, total) in enumerate(
            zip(found.chain.tolist(), found.weights.tolist(), found.energy.tolist(), strict=True)
        )
    ]
    report: dict[str, Any] = {
        "count": len(rows), "energy": float((found.weights * found.energy).sum()),
        "energies": {name: float((found.weights * value).sum()) for name, value in found.energies.items()},
        "nfe": float(found.nfe.double().mean()),
    }  # fmt: skip
    if found.history:
        report["traces"] = {
            "energy": [float(record.energy.mean()) for record in found.history],
            "prior": [float(record.prior.mean()) for record in found.history],
        }
    if schedule is not None:
        said = diagnose(found.history, schedule.warmed)
        if schedule.anneal:
            weights = found.weights[-len(found.nfe) :]  # of one draw a chain
            report["effective_chains"] = float(weights.sum().square() / weights.square().sum())
        report |= {"acceptance": said.acceptance, "rhat": said.rhat, "ess": said.ess, "verdict": said.verdict,
                   "step": float(found.history[-1].step.mean())}  # fmt: skip
    elif found.history:
        codes = statistics(found.code.variables())
        report["codes"] = {name: codes[name] for name in ("mean", "std", "p_value", "rejected")}
        report["saturated"] = float((found.images.abs() > _SATURATED).double().mean())
    return {**report, "samples": rows}


def _summary(report: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {value:.4g}" for name, value in report["energies"].items())
    text = f"{report['out']}: {report['count']} samples, mean energy {report['energy']:.4g}"
    text += f" ({report['unguided_energy']:.4g} without guidance)"
    text += f" ({parts})" * (len(report["energies"]) > 1)
    text += f", {report['nfe']:.0f} network evaluations each, {report['seconds']:.1f} s"
    if "rhat" in report:
        known = {name: value for name, value in report["rhat"].items() if value is not None}
        if report["acceptance"] < 1:
            text += f"; accepted {report['acceptance']:.2f}"
        if known:
            text += "; R-hat " + ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        text += f"; {report['verdict']}"
    if "codes" in report and report["codes"]["rejected"] > _MOSTLY:
        text += (
            f"; {report['codes']['rejected']:.0%} of the codes are no longer Gaussian, and their images may be unlike "
            f"the model's ({report['saturated']:.0%} of the values are black or white): take fewer steps, a smaller "
            "weight, or chains (--sampler mala)"
        )
    return text


def _repeated(labels: Labels, times: int) -> Labels:
    return labels.repeat(times) if isinstance(labels, Tensor) else None if labels is None else [*labels] * times
