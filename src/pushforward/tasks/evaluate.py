r"""How good a model and its samplers are: distances of generated images to real ones, by sampler and network calls.

Every sampler of a model begins at the same codes and labels, image by image, so rows of the result are *paired*:

- `error`: the relative distance of each image to the *converged* one, which the probability flow leads to from the same
  code (many steps of the solver `auto`). Few images give it precisely. For deterministic samplers only.
- `ratio`: the extrapolated Fréchet distance over that of the converged images, with the error that resampling the
  images of both alike gives.

Generated images are kept in shards of one batch, each written whole: a run that was killed goes on where it stopped,
and several processes (`torchrun`, `accelerate launch`) share the shards. Image i depends on the seed and i alone, so
the figures do not depend on either.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pushforward.data import ImageData
from pushforward.errors import PushforwardError
from pushforward.execute import Adaptive, Parallel
from pushforward.execute.across import join, same, size
from pushforward.files import atomic_path
from pushforward.images import to_bytes
from pushforward.model import Model, Network
from pushforward.plan import Plan
from pushforward.pushforward import Diffusion
from pushforward.sampler import Sampler
from pushforward.tasks.distances import (
    FEWEST,
    MOST,
    Reference,
    Sample,
    extrapolated,
    neighbourhoods,
    resamples,
    standard_error,
)
from pushforward.tasks.features import FeatureNet, reference_features
from pushforward.tasks.illustrate import distance_name

__all__ = ["Evaluation", "Generated", "Row", "Run", "check", "compare", "evaluate", "generate", "labels_for", "table"]

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
                msg = f"The option {name} must be at least 1; got {getattr(self, name)}."
                raise PushforwardError(msg)
        if self.resamples < 2:
            msg = f"Standard errors need at least 2 resamples; got {self.resamples}."
            raise PushforwardError(msg)
        if self.precision not in PRECISIONS:
            msg = f"The precision is {', '.join(PRECISIONS)}; got {self.precision!r}."
            raise PushforwardError(msg)


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
            `coverage`; what cannot be said is `None`.
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
    samplers: Sequence[Sampler],
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
    check(model, data, settings)
    labels = labels_for(model, data, settings)
    fast = _faster(model.to(device), settings)
    home = folder / f"{model.name}-{_digest(model, labels, settings)[:12]}"
    runs = [Run(fast, chosen, settings, home) for chosen in (None, *samplers)]
    for run in runs:
        generate(run, labels, device=device, callback=callback)
        same(None)  # no process goes far ahead
    if not join(device):
        return []
    made = [run.read() for run in runs]
    measures = compare(made, data, nets, settings, published=published, device=device, callback=callback)
    return [_row(*each) for each in zip(runs, made, measures, strict=True)]


def check(model: Model, data: ImageData, settings: Evaluation) -> None:
    """Raise unless the model's images can be compared with the data.

    Raises:
        PushforwardError: images of other sizes, or too few.
    """
    shape = tuple(data.images.shape[1:])
    own = model.shape if model.decoder is None else None
    if own is not None and shape != own:
        msg = (
            f"Model {model.name!r} makes images of {_size(own)}, the data are {_size(shape)}; "
            "resizing would change the distance, so bring the data to that size first."
        )
        raise PushforwardError(msg)
    if min(settings.count, len(data)) < FEWEST:
        msg = (
            f"Distances need at least {FEWEST} images of each kind; {settings.count} are to be generated and "
            f"the data have {len(data)}."
        )
        raise PushforwardError(msg)


def labels_for(model: Model, data: ImageData, settings: Evaluation) -> Tensor | None:
    """A class for each image, `(count,)`, as often as the data have it; `None` for a model without classes.

    Image i's does not depend on the count. Without labels in the data, all classes are as likely.
    """
    if not model.classes:
        return None
    own = data.labels if data.labels is not None and data.classes == model.classes else None
    pool = np.arange(len(model.classes)) if own is None else own.numpy()
    draws = np.random.default_rng(settings.seed).random(settings.count)
    return torch.from_numpy(pool[(draws * len(pool)).astype(np.int64)])


# -- generating ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """One sampler's images, in shards.

    Args:
        model: to sample from.
        sampler: or `None` for the converged run.
        settings: how.
        folder: of the model's runs.
    """

    model: Model
    sampler: Sampler | None
    settings: Evaluation
    folder: Path

    @property
    def name(self) -> str:
        """In words."""
        return "converged" if self.sampler is None else self.sampler.label

    @cached_property
    def plan(self) -> Plan | Adaptive:
        """The plan."""
        return (self.sampler or Sampler("auto", self.settings.converged)).plan(self.model)

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        count, batch = self.settings.count, self.settings.batch
        return [range(first, min(first + batch, count)) for first in range(0, count, batch)]

    def path(self, shard: range) -> Path:
        """The file of a shard."""
        safe = "".join(c if c.isalnum() or c in "-+=.," else "_" for c in self.name)
        steps = self.settings.converged if self.sampler is None else self.sampler.steps
        return self.folder / f"{safe}-{steps}" / f"{shard.start:06d}-{shard.stop:06d}.safetensors"

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


def generate(run: Run, labels: Tensor | None, *, device: str = "cpu", callback: Done | None = None) -> None:
    """Write the shards of a run that are not there yet; the converged run comes before others.

    Several processes share the shards, or, where all steps are taken at once, the rows of every network call.

    Args:
        run: which.
        labels: of all its images, or `None`.
        device: of the network.
        callback: told the run's name and the images done, shard by shard.
    """
    diffusion = Diffusion(run.model, run.plan, device=device)
    method = None if run.sampler is None else run.sampler.method(run.plan)
    ranks = size()
    rank = 0 if ranks == 1 or method is not None else torch.distributed.get_rank()
    for shard in run.shards if method is not None else run.shards[rank::ranks]:
        there = run.path(shard).exists()
        if not (there if method is None else same(there)):
            tensors = _made(run, diffusion, method, shard, labels)
            with atomic_path(run.path(shard)) as temporary:
                save_file(tensors, temporary)
        if callback is not None:
            callback(run.name, len(shard))


def _made(
    run: Run, diffusion: Diffusion, method: Parallel | None, shard: range, labels: Tensor | None
) -> dict[str, Tensor]:
    """A shard: images, what they cost, and how far they are from the converged ones."""
    calls: list[Any] = []
    asked: dict[str, Any] = {
        "seed": run.settings.seed,
        "first": shard.start,
        "labels": None if labels is None else labels[shard.start : shard.stop],
        "guidance": run.settings.guidance,
        "batch": len(shard),
        "callback": lambda _: calls.append(None),
    }
    if method is None:
        images = diffusion.sample(len(shard), **asked)
        nfe = float(len(calls))
    else:
        ((images, solution),) = diffusion.solved(len(shard), method, **asked)
        nfe = float(solution.nfe.double().mean())
    tensors = {"images": to_bytes(images), "nfe": torch.tensor([nfe, len(calls)], dtype=torch.float64)}
    if run.sampler is None:
        tensors["values"] = images
    elif isinstance(run.plan, Adaptive) or not run.plan.noises:
        exact = _read(replace(run, sampler=None).path(shard), len(shard))["values"]
        tensors["errors"] = (images - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return tensors


def _faster(model: Model, settings: Evaluation) -> Model:
    """The model with its network in another precision, or compiled."""
    if settings.precision == "no" and not settings.compile:
        return model
    network = model.denoiser
    if not isinstance(network, Network):
        msg = f"Model {model.name!r} has no network to run in another precision or to compile."
        raise PushforwardError(msg)
    module = torch.compile(network.module, dynamic=False) if settings.compile else network.module
    return replace(model, denoiser=replace(network, module=module, autocast=PRECISIONS[settings.precision]))


def _digest(model: Model, labels: Tensor | None, settings: Evaluation) -> str:
    """What generated images depend on, besides the sampler and their number."""
    told = {
        "process": model.process.config(),
        "labels": None if labels is None else labels[:FEWEST].tolist(),
        **{name: getattr(settings, name) for name in ("seed", "guidance", "converged", "precision", "batch")},
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for tensor in () if model.module is None else model.module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, count: int) -> dict[str, Tensor]:
    """A shard.

    Raises:
        PushforwardError: it is not there, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        msg = f"The generated images {path} cannot be read ({error}); remove the file to have them made again."
        raise PushforwardError(msg) from None
    if not {"images", "nfe"} <= set(tensors) or len(tensors["images"]) != count:
        msg = f"The generated images {path} are damaged; remove the file to have them made again."
        raise PushforwardError(msg)
    return tensors


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(
    runs: Sequence[Generated],
    data: ImageData,
    nets: Sequence[FeatureNet],
    settings: Evaluation,
    *,
    published: Mapping[str, Reference] | None = None,
    device: str = "cpu",
    callback: Done | None = None,
) -> list[dict[str, dict[str, float | None]]]:
    """For each run, by feature network, its distances to the data; the first run is the converged one."""
    result: list[dict[str, dict[str, float | None]]] = [{} for _ in runs]
    for net in nets if runs else ():
        known = (published or {}).get(net.name)
        reference = known or Reference.of(reference_features(net, data.images, device=device))
        rows = resamples(settings.count, settings.resamples, settings.seed)
        base: list[float] = []
        for run, own in zip(runs, result, strict=True):
            sample = Sample(reference_features(net, run.images, device=device), reference)
            own[net.name], values = _measured(sample, rows, settings.seed, base)
            base = base or values
            if callback is not None:
                callback(f"distances by {net.name}", len(run.images))
    return result


def _measured(
    sample: Sample, rows: list[Tensor], seed: int, base: list[float]
) -> tuple[dict[str, float | None], list[float]]:
    """The measures, and the extrapolated distance of all images and of each resample (empty if there is none)."""
    measures: dict[str, float | None] = {"frechet": sample.frechet()}
    limit = extrapolated(sample, seed=seed)
    values: list[float] = []
    if limit is not None:
        values = [limit, *(extrapolated(sample, seed=seed, draws=2, rows=draw) or math.nan for draw in rows)]
        ratios = [a / b for a, b in zip(values, base or values, strict=True)]
        measures |= {
            "frechet_error": standard_error([sample.frechet(draw) for draw in rows]),
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
        if value is None:
            return "-"
        return f"{scale * value:.3g}" if error is None else f"{scale * value:.3g} ± {scale * error:.1g}"

    shares = ("precision", "recall", "density", "coverage")
    return [*(known(name) for name in ("frechet", "extrapolated", "ratio")), known("kernel", 1000.0),
            *(_number(measures.get(name)) for name in shares)]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
