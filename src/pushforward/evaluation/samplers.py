"""How good a model and its samplers are: distances of generated images to real ones, by sampler and network calls.

Every sampler of a model begins at the same codes and labels, image by image, so rows of the result are *paired*:

- `error`: the relative distance of each image to the *converged* one, which the probability flow leads to from the same
  code (many steps of the solver `auto`). Few images give it precisely. For deterministic samplers only.
- `ratio`: the extrapolated Fréchet distance over that of the converged images, with the error that resampling the
  images of both alike gives.

The images are generated and kept by `runs`; the rows are shown by `report` and `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pushforward.data.datasets import ImageData
from pushforward.data.memory import check_images, check_memory
from pushforward.errors import PushforwardError
from pushforward.evaluation.distances import (
    FEWEST,
    Reference,
    Sample,
    distances,
    extrapolated,
    neighbourhoods,
    resamples,
    standard_error,
)
from pushforward.evaluation.report import Row
from pushforward.evaluation.runs import Done, Evaluation, Generated, Run, generate, make_runs
from pushforward.execute.distributed import join
from pushforward.maps.spec import SamplerSpec
from pushforward.model import Model
from pushforward.vision.features import FeatureNet, features, reference_features

__all__ = ["check", "compare", "evaluate", "labels_for", "prepare"]

_DEFAULT = Evaluation()


def evaluate(
    model: Model,
    samplers: Sequence[SamplerSpec],
    data: ImageData,
    nets: Sequence[FeatureNet],
    folder: Path,
    settings: Evaluation = _DEFAULT,
    *,
    device: str = "cpu",
    callback: Done | None = None,
) -> list[Row]:
    """Generate with every sampler, and compare with the data; the converged run is the first row.

    Args:
        model: model to evaluate.
        samplers: samplers to compare.
        data: real images of the model's shape.
        nets: feature networks.
        folder: folder for the generated images.
        settings: how to evaluate.
        device: device of the networks.
        callback: function to call with what was done and the number of images done.

    Returns:
        The rows, on the first of several processes; nothing on the others.

    Raises:
        PushforwardError: what does not fit together, before anything is generated; a damaged file in `folder`.
    """
    runs = prepare(model, samplers, data, nets, folder, settings, device=device)
    generate(runs, device=device, callback=callback)
    if not join(device):
        return []
    return compare(runs, data, nets, device=device, callback=callback)


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
    """Return the converged run and one of each sampler, with everything checked that can be before images are made.

    `published` has statistics of reference images by feature network's name, to use instead of the data's.

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
                f"The published statistics are of {len(known.mean)} numbers, but {net.name} has {width} features."
            )
    labels, _ = labels_for(model, data, settings)
    return make_runs(model, samplers, folder, settings, labels, device=device)


def check(model: Model, data: ImageData, settings: Evaluation) -> None:
    """Raise unless the model's images can be compared with the data.

    Raises:
        PushforwardError: images of other sizes, or too few.
    """
    shape, own = tuple(data.images.shape[1:]), model.shape
    if model.decoder is not None:
        with torch.no_grad():
            own = tuple(model.images(torch.zeros(model.state_shape(1), device="cpu")).shape[1:])
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
    """Return a class for each image, `(count,)`, and whence: `data` where classes come as often as there, or `uniform`.

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


def compare(
    runs: Sequence[Run],
    data: ImageData,
    nets: Sequence[FeatureNet],
    *,
    published: Mapping[str, Reference] | None = None,
    device: str = "cpu",
    callback: Done | None = None,
) -> list[Row]:
    """Return the distances of runs' images to the data; the first run is the converged one.

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
    """Return the measures, and the extrapolated distance of all images and of each resample (empty without one)."""
    measures: dict[str, float | None] = {**distances(sample, rows, seed)}
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
        measures |= neighbourhoods(sample)
    return measures, values


def _row(run: Run, made: Generated, measures: dict[str, dict[str, float | None]]) -> Row:
    plan, error = run.diffusion.plan, None
    if made.errors is not None:
        values = made.errors.double()
        error = {"median": float(values.quantile(0.5)), "mean": float(values.mean()), "worst": float(values.max())}
    return Row(
        model=run.model.name,
        process=run.model.process.name,
        sampler=run.name,
        steps=None if plan is None else len(plan.steps) - 1,
        nfe=made.nfe,
        rounds=made.rounds,
        count=len(made.images),
        error=error,
        measures=measures,
    )


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
