r"""How good a model and its samplers are: distances of generated images to real ones, by sampler and network calls.

Every sampler of a model begins at the same codes and labels, image by image, so rows of the result are *paired*:

- `error`: the relative distance of each image to the *converged* one, which the probability flow leads to from the same
  code (many steps of the solver `auto`). Few images give it precisely. For deterministic samplers only.
- `ratio`: the extrapolated Fréchet distance over that of the converged images, with the error that resampling the
  images of both alike gives.

Generated images are kept in shards of one batch, each written whole: a run that was killed goes on where it stopped,
and several processes (`torchrun`, `accelerate launch`) share the shards. Image i depends on the seed and i alone, so
the figures do not depend on either. Remove the folder of a sampler whose code you have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pushforward.data.datasets import ImageData
from pushforward.data.files import atomic_path, digest
from pushforward.data.memory import check_images, check_memory
from pushforward.data.pictures import to_bytes
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import (
    FEWEST,
    MOST,
    Reference,
    Sample,
    extrapolated,
    neighbourhoods,
    resamples,
    standard_error,
)
from pushforward.evaluation.plots import distance_name
from pushforward.execute import Adaptive, Parallel
from pushforward.execute.distributed import join, same, size
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.contents import model_digest
from pushforward.plan import Plan
from pushforward.vision.features import FeatureNet, features, reference_features

__all__ = [
    "Evaluation", "Generated", "Row", "Run", "check", "compare", "evaluate", "first_images", "generate", "labels_for",
    "prepare", "table", "too_few", "with_error",
]  # fmt: skip

SHARES = 1000  # images below which shares of them are not to be trusted
PRECISIONS: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Done = Callable[[str, int], None]


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate.

    Args:
        count: images of each sampler.
        seed: of codes, labels, subsets and resamples.
        guidance: weight of classifier-free guidance; 1 is plain.
        batch: images at a time, and in a shard.
        converged: network calls of the converged run.
        resamples: of the bootstrap behind the standard errors.
        precision: of the network: `no` (as its weights are), `bf16` or `fp16`.
        compile: run the network through `torch.compile`.
    """

    count: int = 1000
    seed: int = 0
    guidance: float = 1.0
    batch: int = 100
    converged: int = 200
    resamples: int = 50
    precision: str = "no"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "batch", "converged"):
            if getattr(self, name) < 1:
                raise PushforwardError(f"The option {name} must be at least 1; got {getattr(self, name)}.")
        if self.seed < 0:
            raise PushforwardError(f"The seed must not be negative; got {self.seed}.")
        if self.resamples < 2:
            raise PushforwardError(f"Standard errors need at least 2 resamples; got {self.resamples}.")
        if self.precision not in PRECISIONS:
            raise PushforwardError(f"The precision is {', '.join(PRECISIONS)}; got {self.precision!r}.")


@dataclass(frozen=True, eq=False)
class Generated:
    """What a sampler made.

    Args:
        images: uint8, `(count, channels, height, width)`.
        nfe: network evaluations of each image, on average.
        rounds: batched network calls on the critical path of a batch, at most.
        errors: relative distance of each image to the converged one, `(count,)`, or `None` for a stochastic sampler.
    """

    images: Tensor
    nfe: float
    rounds: int
    errors: Tensor | None


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Args:
        model: its name.
        process: its process's.
        sampler: in words; "converged" for the run that others are compared with.
        steps: of the solver.
        nfe: network evaluations of each image, on average.
        rounds: batched network calls on the critical path.
        count: images.
        error: `median`, `mean` and `worst` relative distance to the converged image; `None` if stochastic.
        measures: by feature network: `frechet`, `frechet_error` (standard error), `extrapolated`,
            `extrapolated_error`, `ratio`, `ratio_error`, `kernel`, `kernel_error`, `precision`, `recall`, `density`,
            `coverage`; what cannot be said is left out.
    """

    model: str
    process: str
    sampler: str
    steps: int | None
    nfe: float
    rounds: int
    count: int
    error: dict[str, float] | None
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)


# -- the whole -------------------------------------------------------------------------------------------------------


def evaluate(
    model: Model,
    samplers: Sequence[SamplerSpec],
    data: ImageData,
    nets: Sequence[FeatureNet],
    folder: Path,
    settings: Evaluation = Evaluation(),
    *,
    published: Mapping[str, Reference] | None = None,
    device: str = "cpu",
    callback: Done | None = None,
) -> list[Row]:
    """Generate with every sampler, and compare with the data; the converged run is the first row.

    Args:
        model: to evaluate.
        samplers: to compare.
        data: real images of the model's shape.
        nets: feature networks.
        folder: for the generated images.
        settings: how.
        published: statistics of reference images by feature network's name, in the place of the data's.
        device: of the networks.
        callback: told what was done, and on how many images.

    Returns:
        The rows, on the first of several processes; nothing on the others.

    Raises:
        PushforwardError: what does not fit together, before anything is generated; a damaged file in `folder`.
    """
    runs = prepare(model, samplers, data, nets, folder, settings, published=published, device=device)
    generate(runs, device=device, callback=callback)
    if not join(device):
        return []
    return compare(runs, data, nets, published=published, device=device, callback=callback)


def prepare(
    model: Model,
    samplers: Sequence[SamplerSpec],
    data: ImageData,
    nets: Sequence[FeatureNet],
    folder: Path,
    settings: Evaluation,
    *,
    published: Mapping[str, Reference] | None = None,
    device: str = "cpu",
) -> list[Run]:
    """The converged run and one of each sampler, with everything checked that can be before images are made.

    Raises:
        PushforwardError: images of other sizes, too few, features or statistics that do not fit, no such plan, or
            guidance or a precision that the model does not take.
    """
    check(model, data, settings)
    for net in nets:
        width = features(net, data.images[:1], device=device).shape[1]
        known = (published or {}).get(net.name)
        if known is not None and len(known.mean) != width:
            raise PushforwardError(
                f"The published statistics are of {len(known.mean)} numbers, {net.name} has {width} features."
            )
    labels, _ = labels_for(model, data, settings)
    fast = _fast(model.to(device), settings)
    fast.given(labels, settings.guidance)
    home = folder / f"{_safe(model.name)}-{_digest(model, labels, settings)[:12]}"
    runs = [Run(fast, chosen, settings, home, labels) for chosen in (None, *samplers)]
    for run in runs:
        run.path(run.shards[0])  # makes its plan
    return runs


def check(model: Model, data: ImageData, settings: Evaluation) -> None:
    """Raise unless the model's images can be compared with the data.

    Raises:
        PushforwardError: images of other sizes, or too few.
    """
    shape, own = tuple(data.images.shape[1:]), model.shape
    if model.decoder is not None:
        with torch.no_grad():
            own = tuple(model.images(torch.zeros(model.state_shape(1))).shape[1:])
    if shape != own:
        raise PushforwardError(
            f"Model {model.name!r} makes images of {_size(own)}, the data are {_size(shape)}; read the data in the "
            "size and channels that the model was trained on."
        )
    check_images(settings.count, shape)
    check_memory(8 * settings.count * settings.resamples, f"{settings.resamples:,} resamples of all images")
    if min(settings.count, len(data)) < FEWEST:
        raise PushforwardError(
            f"Distances need at least {FEWEST} images of each kind; {settings.count} are to be generated and "
            f"the data have {len(data)}."
        )


def labels_for(model: Model, data: ImageData, settings: Evaluation) -> tuple[Tensor | None, str]:
    """A class for each image, `(count,)`, and whence: `data` where classes come as often as there, or `uniform`.

    Image i's does not depend on the count. `None` for a model without classes. The data's classes are the model's if
    their names are, or if they are bare numbers in the range of the model's.
    """
    if not model.classes:
        return None, "none"
    number = {name: k for k, name in enumerate(model.classes)}
    if all(name.isdecimal() for name in data.classes):
        number |= {str(k): k for k in range(len(model.classes))}
    if data.labels is None or not data.classes or any(name not in number for name in data.classes):
        pool, whence = np.arange(len(model.classes)), "uniform"
    else:
        pool, whence = np.array([number[name] for name in data.classes])[data.labels.numpy()], "data"
    draws = np.random.default_rng(settings.seed).random(settings.count)
    return torch.from_numpy(pool[(draws * len(pool)).astype(np.int64)]), whence


# -- generating ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """One sampler's images, in shards.

    Args:
        model: to sample from.
        sampler: or `None` for the converged run.
        settings: how.
        folder: of the model's runs.
        labels: of the images, or `None`.
    """

    model: Model
    sampler: SamplerSpec | None
    settings: Evaluation
    folder: Path
    labels: Tensor | None

    @property
    def name(self) -> str:
        """In words."""
        return "converged" if self.sampler is None else self.sampler.label

    @cached_property
    def plan(self) -> Plan | Adaptive:
        """The plan."""
        return (self.sampler or SamplerSpec("auto", self.settings.converged)).plan(self.model)

    @property
    def method(self) -> Parallel | None:
        """How all steps are taken at once, if they are."""
        return None if self.sampler is None else self.sampler.method(self.plan)

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        count, batch = self.settings.count, self.settings.batch
        return [range(first, min(first + batch, count)) for first in range(0, count, batch)]

    @cached_property
    def place(self) -> Path:
        """The folder of its shards, named after the sampler, its times and the library's version."""
        own = dict(self.plan.settings) if isinstance(self.plan, Plan) else {}
        settings = {key: str(value) for key, value in own.items()}
        told = [self.name, self.plan.times.tolist(), settings, version("pushforward")]
        return self.folder / f"{_safe(self.name)}-{digest(told)[:8]}"

    def path(self, shard: range) -> Path:
        """The file of a shard."""
        return self.place / f"{shard.start:06d}-{shard.stop:06d}.safetensors"

    def read(self) -> Generated:
        """All images.

        Raises:
            PushforwardError: a shard is damaged.
        """
        parts = [_read(self.path(shard), len(shard)) for shard in self.shards]
        counts = torch.tensor([len(shard) for shard in self.shards], dtype=torch.float64)
        figures = torch.stack([part["nfe"] for part in parts])
        errors = torch.cat([part["errors"] for part in parts]) if "errors" in parts[0] else None
        nfe = float((figures[:, 0] * counts).sum() / counts.sum())
        return Generated(torch.cat([part["images"] for part in parts]), nfe, int(figures[:, 1].max()), errors)


def generate(runs: Sequence[Run], *, device: str = "cpu", callback: Done | None = None) -> None:
    """Write the shards of runs that are not there yet.

    Several processes share a run's missing shards, or, where all steps are taken at once, the rows of every network
    call; all have ended a run before the next begins.

    Args:
        runs: of one model, the converged one first.
        device: of the network.
        callback: told a run's name and the images done, shard by shard.

    Raises:
        PushforwardError: a sampler failed; its name is said.
    """
    for run in runs:
        diffusion, method, ranks = Diffusion(run.model, run.plan, device=device), run.method, size()
        missing = same([shard for shard in run.shards if not run.path(shard).exists()])
        rank = 0 if ranks == 1 or method is not None else torch.distributed.get_rank()
        if callback is not None:
            callback(run.name, sum(len(shard) for shard in run.shards if shard not in missing))
        for k, shard in enumerate(missing):
            if method is not None or k % ranks == rank:
                tensors = _made(run, runs[0], diffusion, method, shard)
                with atomic_path(run.path(shard)) as temporary:
                    temporary.write_bytes(safetensors.torch.save(tensors))
            if callback is not None:
                callback(run.name, len(shard))
        same(None)


def _made(run: Run, converged: Run, diffusion: Diffusion, method: Parallel | None, shard: range) -> dict[str, Tensor]:
    """A shard: images, what they cost, and how far they are from the converged ones."""
    calls: list[int] = []
    asked: dict[str, Any] = {
        "seed": run.settings.seed,
        "first": shard.start,
        "labels": None if run.labels is None else run.labels[shard.start : shard.stop],
        "guidance": run.settings.guidance,
        "batch": len(shard),
        "callback": lambda step: calls.append(step.nfe),
    }
    try:
        if method is None:
            images = diffusion.sample(len(shard), **asked)
            nfe = sum(calls) / len(shard)
        else:
            ((images, solution),) = diffusion.solved(len(shard), method, **asked)
            nfe = float(solution.nfe.double().mean())
    except PushforwardError as error:
        raise PushforwardError(f"{run.name}, model {run.model.name!r}: {error}") from error
    tensors = {"images": to_bytes(images), "nfe": torch.tensor([nfe, len(calls)], dtype=torch.float64)}
    if run.sampler is None:
        tensors["values"] = images
    elif isinstance(run.plan, Adaptive) or not run.plan.noises:
        exact = _read(converged.path(shard), len(shard))["values"]
        tensors["errors"] = (images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return tensors


def _fast(model: Model, settings: Evaluation) -> Model:
    """The model with no more than a batch in one call of its network, in another precision, or compiled."""
    network = model.denoiser
    if not isinstance(network, Network):
        if settings.precision != "no" or settings.compile:
            raise PushforwardError(f"Model {model.name!r} has no network to run in another precision or to compile.")
        return model
    rows = settings.batch * (1 if settings.guidance == 1 else 2)  # guidance asks twice
    module = torch.compile(network.module, dynamic=False) if settings.compile else network.module
    precision = PRECISIONS[settings.precision] or network.autocast
    return replace(
        model,
        denoiser=replace(network, module=module, autocast=precision, max_batch=min(rows, network.max_batch or rows)),
    )


def _digest(model: Model, labels: Tensor | None, settings: Evaluation) -> str:
    """What generated images depend on, besides the sampler and their number."""
    asked = ("seed", "guidance", "converged", "precision", "compile", "batch")
    told = {name: getattr(settings, name) for name in asked}
    return digest(model_digest(model), model.negative, None if labels is None else labels[:FEWEST], told)


def _safe(name: str) -> str:
    """Of a name, what a file's may have."""
    return "".join(c if c.isalnum() or c in "-+=.," else "_" for c in name).lstrip(".") or "_"


def _read(path: Path, count: int) -> dict[str, Tensor]:
    """A shard.

    Raises:
        PushforwardError: it is not there, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise PushforwardError(
            f"The generated images {path} cannot be read ({error}); remove the file to have them made again."
        ) from None
    images, nfe = tensors.get("images"), tensors.get("nfe")
    fits = images is not None and images.dtype == torch.uint8 and images.ndim == 4 and len(images) == count
    fits = fits and nfe is not None and nfe.shape == (2,)
    others = [value for name, value in tensors.items() if name != "images"]
    fits = fits and all(value.is_floating_point() and bool(value.isfinite().all()) for value in others)
    if not fits or len(tensors.get("errors", range(count))) != count:
        raise PushforwardError(f"The generated images {path} are damaged; remove the file to have them made again.")
    return tensors


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(
    runs: Sequence[Run],
    data: ImageData,
    nets: Sequence[FeatureNet],
    *,
    published: Mapping[str, Reference] | None = None,
    device: str = "cpu",
    callback: Done | None = None,
) -> list[Row]:
    """The distances of runs' images to the data; the first run is the converged one.

    Raises:
        PushforwardError: a shard or a file of kept features is damaged.
    """
    made = [run.read() for run in runs]
    measures: list[dict[str, dict[str, float | None]]] = [{} for _ in runs]
    for net in nets:
        known = (published or {}).get(net.name)
        reference = known or Reference.of(reference_features(net, data.images, device=device))
        settings = runs[0].settings
        rows = resamples(settings.count, settings.resamples, settings.seed)
        base: list[float] = []
        for run, own, images in zip(runs, measures, (found.images for found in made), strict=True):
            sample = Sample(reference_features(net, images, folder=run.folder / "features", device=device), reference)
            own[net.name], values = _measured(sample, rows, settings.seed, base)
            base = base or values
            if callback is not None:
                callback(f"distances by {net.name}", len(images))
    return [_row(*each) for each in zip(runs, made, measures, strict=True)]


def _measured(
    sample: Sample, rows: list[Tensor], seed: int, base: list[float]
) -> tuple[dict[str, float | None], list[float]]:
    """The measures, and the extrapolated distance of all images and of each resample (empty if there is none)."""
    measures: dict[str, float | None] = {
        "frechet": sample.frechet(),
        "frechet_error": standard_error([sample.frechet(draw) for draw in rows]),
    }
    limit = extrapolated(sample, seed=seed)
    values: list[float] = []
    if limit is not None:
        values = [limit, *(extrapolated(sample, seed=seed, draws=2, rows=draw) or math.nan for draw in rows)]
        ratios = [a / b for a, b in zip(values, base or values, strict=True)]
        measures |= {
            "extrapolated": limit,
            "extrapolated_error": standard_error(values[1:]),
            "ratio": ratios[0],
            "ratio_error": standard_error(ratios[1:]),
        }
    if sample.reference.features is not None:
        some = Sample(sample.features[:MOST], sample.reference)  # pairs of all would not fit
        draws = rows if len(some) == len(sample) else resamples(len(some), len(rows), seed)
        measures |= {
            "kernel": some.kernel(),
            "kernel_error": standard_error([some.kernel(draw) for draw in draws]),
            **neighbourhoods(sample),
        }
    return measures, values


def _row(run: Run, made: Generated, measures: dict[str, dict[str, float | None]]) -> Row:
    error = None
    if made.errors is not None:
        values = made.errors.double()
        error = {"median": float(values.median()), "mean": float(values.mean()), "worst": float(values.max())}
    return Row(
        model=run.model.name,
        process=run.model.process.name,
        sampler=run.name,
        steps=len(run.plan.steps) - 1 if isinstance(run.plan, Plan) else None,
        nfe=made.nfe,
        rounds=made.rounds,
        count=len(made.images),
        error=error,
        measures=measures,
    )


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


# -- showing ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns aligned; distances with their standard errors.

    `FD-NAME inf` is the extrapolated Fréchet distance, `ratio` that over the converged run's, `KD` the kernel distance
    times 1000, `P R D C` precision, recall, density and coverage.
    """
    nets = list(dict.fromkeys(net for row in rows for net in row.measures))
    head = ["model", "sampler", "NFE", "rounds", "images", "error", "worst"]
    for net in nets:
        name = distance_name(net)
        head += [name, f"{name} inf", "ratio", f"KD-{net} x1000", "P", "R", "D", "C"]
    lines = [head]
    for row in rows:
        error = row.error or {}
        line = [row.model, row.sampler, f"{row.nfe:.4g}", str(row.rounds), str(row.count),
                _number(error.get("median")), _number(error.get("worst"))]  # fmt: skip
        for net in nets:
            line += _cells(row.measures[net])
        lines.append(line)
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cells(measures: Mapping[str, float | None]) -> list[str]:
    def known(name: str, scale: float = 1.0) -> str:
        value, error = measures.get(name), measures.get(f"{name}_error")
        return "-" if value is None else with_error(scale * value, None if error is None else scale * error)

    shares = ("precision", "recall", "density", "coverage")
    return [*(known(name) for name in ("frechet", "extrapolated", "ratio")), known("kernel", 1000.0),
            *(_number(measures.get(name)) for name in shares)]  # fmt: skip


def too_few(rows: Sequence[Row]) -> list[str]:
    """What the number of images is too small for, a sentence each."""
    said = []
    count = min(row.count for row in rows)
    if any(measures.get("extrapolated") is None for row in rows for measures in row.measures.values()):
        said.append(
            f"{count} images are too few for a Fréchet distance without bias: it is too large, by about as much for "
            "all samplers; an extrapolated one needs eight times as many images as there are features (--count)"
        )
    if count < SHARES:
        said.append(f"of {count} images, precision, recall, density and coverage say little: take {SHARES} or more")
    return said


def first_images(run: Run, count: int) -> Tensor:
    """The first images of a run in [-1, 1], `(count, channels, height, width)`, or as many as there are."""
    pieces: list[Tensor] = []
    for shard in run.shards:
        if sum(map(len, pieces)) < count:
            pieces.append(_read(run.path(shard), len(shard))["images"])
    return torch.cat(pieces)[:count].float() / 127.5 - 1


def with_error(value: float, error: float | None) -> str:
    """A figure and its standard error."""
    if not error:
        return f"{value:.3g}"
    return f"{value:.3g} ± {error:.1g}" if error < 9.5 else f"{value:.0f} ± {error:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
