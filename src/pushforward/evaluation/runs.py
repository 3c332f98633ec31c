"""The images that samplers make, in files of one batch each.

Every file (shard) is written whole: a run that was killed goes on where it stopped, and several processes (`torchrun`,
`accelerate launch`) share the shards. Image i depends on the seed and i alone, so the images do not depend on either.
Remove the folder of a sampler whose code you have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.files import atomic_path, digest, read_tensors
from pushforward.data.pictures import from_bytes, to_bytes
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import FEWEST
from pushforward.execute.distributed import same, size
from pushforward.execute.system import relative_errors
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.code import batches
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.drawing import draw
from pushforward.maps.labels import weight_in_effect
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model, Network
from pushforward.model.contents import model_digest

__all__ = ["Done", "Evaluation", "Generated", "Run", "first_images", "generate", "make_runs"]

PRECISIONS: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Done = Callable[[str, int], None]


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate.

    Args:
        count: images per sampler.
        seed: seed of codes, labels, subsets and resamples.
        guidance: weight of classifier-free guidance; 1 is plain. By default each model's as it is, see `Model.given`.
        batch: images at a time, and in a shard.
        converged: network calls of the converged run.
        resamples: number of resamples of the bootstrap behind the standard errors.
        precision: precision of the network: `no` (as its weights are), `bf16` or `fp16`.
        compile: run the network through `torch.compile`.
    """

    count: int = 1000
    seed: int = 0
    guidance: float | None = None
    batch: int = 100
    converged: int = 200
    resamples: int = 50
    precision: str = "no"
    compile: bool = False

    def __post_init__(self) -> None:
        schema.check_fields(self)
        for name in ("count", "batch", "converged"):
            if getattr(self, name) < 1:
                raise PushforwardError(f"The option {name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise PushforwardError(f"The seed must not be negative, and have less than 64 bits; got {self.seed}.")
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


@dataclass(frozen=True, eq=False)
class Run:
    """One sampler's images, in shards.

    Args:
        model: model to sample from.
        sampler: sampler to run, or `None` for the converged run.
        settings: how to evaluate.
        folder: folder of the model's runs.
        labels: labels of the images, or `None`.
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
    def diffusion(self) -> Diffusion | AdaptiveDiffusion:
        """The map that is sampled."""
        sampler = self.sampler or SamplerSpec("auto", self.settings.converged)
        return sampler.diffusion(self.model, self.settings.guidance)

    def shard(self, images: range, device: str) -> Diffusion | AdaptiveDiffusion:
        """Return the map for the images of a shard, on a device."""
        labels = None if self.labels is None else self.labels[images.start : images.stop]
        return replace(self.diffusion, device=device).given(labels, self.settings.guidance)

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        count = self.settings.count
        return [range(count)[some] for some in batches(count, self.settings.batch)]

    @cached_property
    def place(self) -> Path:
        """The folder of its shards, named after the sampler, its times and the library's version."""
        plan = self.diffusion.plan
        settings = {} if plan is None else {key: str(value) for key, value in plan.settings.items()}
        told = [self.name, self.diffusion.times.tolist(), settings, version("pushforward")]
        return self.folder / f"{_safe(self.name)}-{digest(told)[:8]}"

    def path(self, shard: range) -> Path:
        """Return the file of a shard."""
        return self.place / f"{shard.start:06d}-{shard.stop:06d}.safetensors"

    def read(self) -> Generated:
        """Return all images.

        Raises:
            PushforwardError: a shard is damaged.
        """
        parts = [_read(self.path(shard), len(shard)) for shard in self.shards]
        counts = torch.tensor([len(shard) for shard in self.shards], dtype=torch.float64, device="cpu")
        figures = torch.stack([part["nfe"] for part in parts])
        errors = torch.cat([part["errors"] for part in parts]) if "errors" in parts[0] else None
        nfe = float((figures[:, 0] * counts).sum() / counts.sum())
        return Generated(torch.cat([part["images"] for part in parts]), nfe, int(figures[:, 1].max()), errors)


def make_runs(
    model: Model,
    samplers: Sequence[SamplerSpec],
    folder: Path,
    settings: Evaluation,
    labels: Tensor | None,
    *,
    device: str = "cpu",
) -> list[Run]:
    """Return the converged run and one of each sampler.

    Raises:
        PushforwardError: no such plan, or guidance or a precision that the model does not take.
    """
    fast = _fast(model.to(device), settings)
    fast.given(labels, settings.guidance)
    home = folder / f"{_safe(model.name)}-{_digest(model, labels, settings)[:12]}"
    runs = [Run(fast, chosen, settings, home, labels) for chosen in (None, *samplers)]
    for run in runs:
        run.path(run.shards[0])  # makes its plan
    return runs


def generate(runs: Sequence[Run], *, device: str = "cpu", callback: Done | None = None) -> None:
    """Write the shards of runs that are not there yet.

    Several processes share a run's missing shards, or, where all steps are taken at once, the rows of every network
    call; all have ended a run before the next begins.

    Args:
        runs: runs of one model, the converged one first.
        device: device of the network.
        callback: function to call after each shard with the run's name and the number of images done.

    Raises:
        PushforwardError: a sampler failed; the message names it.
    """
    for run in runs:
        ranks, together = size(), run.diffusion.parallel is not None
        missing = same([shard for shard in run.shards if not run.path(shard).exists()])
        rank = 0 if ranks == 1 or together else torch.distributed.get_rank()
        if callback is not None:
            callback(run.name, sum(len(shard) for shard in run.shards if shard not in missing))
        for k, shard in enumerate(missing):
            if together or k % ranks == rank:
                tensors = _made(run, runs[0], run.shard(shard, device), shard)
                with atomic_path(run.path(shard)) as temporary:
                    temporary.write_bytes(safetensors.torch.save(tensors))
            if callback is not None:
                callback(run.name, len(shard))
        same(None)


def first_images(run: Run, count: int) -> Tensor:
    """Return the first images of a run in [-1, 1], `(count, channels, height, width)`, or as many as there are."""
    pieces: list[Tensor] = []
    for shard in run.shards:
        if sum(map(len, pieces)) < count:
            pieces.append(_read(run.path(shard), len(shard))["images"])
    return from_bytes(torch.cat(pieces)[:count])


def _made(run: Run, converged: Run, diffusion: Diffusion | AdaptiveDiffusion, shard: range) -> dict[str, Tensor]:
    """Return a shard: images, what they cost, and how far they are from the converged ones."""
    try:
        drawn = draw(diffusion, len(shard), seed=run.settings.seed, first=shard.start, batch=len(shard))
    except PushforwardError as error:
        raise PushforwardError(f"{run.name}, model {run.model.name!r}: {error}") from error
    figures = torch.tensor([drawn.nfe, drawn.rounds], dtype=torch.float64, device="cpu")
    tensors = {"images": to_bytes(drawn.images), "nfe": figures}
    if run.sampler is None:
        tensors["values"] = drawn.images
    elif not diffusion.noises:
        exact = _read(converged.path(shard), len(shard))["values"]
        tensors["errors"] = relative_errors(drawn.images, exact)
    return tensors


def _fast(model: Model, settings: Evaluation) -> Model:
    """Return the model with no more than a batch in one call of its network, in another precision, or compiled."""
    network = model.denoiser
    if not isinstance(network, Network):
        if settings.precision != "no" or settings.compile:
            raise PushforwardError(f"Model {model.name!r} has no network to run in another precision or to compile.")
        return model
    rows = settings.batch * (1 if weight_in_effect(model, settings.guidance) == 1 else 2)  # guidance asks twice
    module = torch.compile(network.module, dynamic=False) if settings.compile else network.module
    precision = PRECISIONS[settings.precision] or network.autocast
    return replace(
        model,
        denoiser=replace(network, module=module, autocast=precision, max_batch=min(rows, network.max_batch or rows)),
    )


def _digest(model: Model, labels: Tensor | None, settings: Evaluation) -> str:
    """Return what generated images depend on, besides the sampler and their number."""
    asked = ("seed", "converged", "precision", "compile", "batch")
    told = {**{name: getattr(settings, name) for name in asked}, "guidance": weight_in_effect(model, settings.guidance)}
    return digest(model_digest(model), model.negative, None if labels is None else labels[:FEWEST], told)


def _safe(name: str) -> str:
    """Keep of a name the characters that a file's name may have."""
    return "".join(c if c.isalnum() or c in "-+=.," else "_" for c in name).lstrip(".") or "_"


def _read(path: Path, count: int) -> dict[str, Tensor]:
    """Return a shard.

    Raises:
        PushforwardError: it is not there, or damaged.
    """
    tensors, _ = read_tensors(path, "file of generated images", "remove it to have them made again")
    images, nfe = tensors.get("images"), tensors.get("nfe")
    fits = images is not None and images.dtype == torch.uint8 and images.ndim == 4 and len(images) == count
    fits = fits and nfe is not None and nfe.shape == (2,)
    others = [value for name, value in tensors.items() if name != "images"]
    fits = fits and all(value.is_floating_point() and bool(value.isfinite().all()) for value in others)
    if not fits or len(tensors.get("errors", range(count))) != count:
        raise PushforwardError(f"The generated images {path} are damaged; remove the file to have them made again.")
    return tensors
