"""How good a model and its samplers are."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pushforward.data.datasets import ImageData, load_images
from pushforward.errors import PushforwardError
from pushforward.evaluation import samplers
from pushforward.evaluation.report import Row
from pushforward.evaluation.runs import Evaluation
from pushforward.execute.host import undisturbed
from pushforward.execute.likelihood import STAGES, log_density
from pushforward.maps.adaptive import AdaptiveDiffusion
from pushforward.maps.code import GaussianStream, batches, numbered
from pushforward.maps.labels import UNSAID
from pushforward.maps.likelihood import BIN, Likelihood
from pushforward.maps.spec import parse
from pushforward.model import Model
from pushforward.verbs.samplers import Given, as_batch
from pushforward.vision.features import feature_net

__all__ = ["evaluate", "log_likelihood"]

_EVALUATION = Evaluation()


@undisturbed
def evaluate(
    model: Model,
    data: ImageData | str | os.PathLike[str],
    solvers: str | Sequence[str] = "auto",
    *,
    features: str | Sequence[str] = "effnet",
    settings: Evaluation = _EVALUATION,
    out: str | os.PathLike[str] = "evaluation",
    device: str = "cpu",
    callback: Callable[[str, int], None] | None = None,
) -> list[Row]:
    """Measure how far generated images are from real ones, for each sampler.

        rows = model.evaluate("fashion.npz", ["auto", "ddim:steps=50"], features="fashion")
        print(pushforward.evaluation.report.table(rows))

    Args:
        model: the model to evaluate.
        data: real images of the model's size, as in `train`.
        solvers: one or several, in words as in `sample`.
        features: networks to measure by, one or several: `effnet`, `fashion`, `inception` or TorchScript files.
        settings: how many images, their seed, guidance and all else.
        out: folder in which the images are kept; the same call goes on with an interrupted evaluation.
        device: where the networks run.
        callback: told what was done, and on how many images.

    Returns:
        The converged run, then a row for each solver.

    Raises:
        PushforwardError: data or features that do not fit the model, or no such solver.
    """
    images = data if isinstance(data, ImageData) else load_images(data)
    specs = [parse(text) for text in ([solvers] if isinstance(solvers, str) else solvers)]
    nets = [feature_net(name) for name in ([features] if isinstance(features, str) else features)]
    return samplers.evaluate(model, specs, images, nets, Path(out), settings, device=device, callback=callback)


@undisturbed
def log_likelihood(
    model: Model,
    images: Tensor,
    *,
    steps: int = 40,
    draws: int = 2,
    exact: bool = False,
    dequantise: bool = False,
    end: float | None = None,
    labels: Given = UNSAID,
    guidance: float | None = None,
    seed: int = 0,
    first: int | Sequence[int] = 0,
    batch: int = 64,
    callback: Callable[[int], None] | None = None,
) -> Likelihood:
    """Find how probable images are: the logarithm of the model's density, along its probability flow.

        found = model.log_likelihood(images, dequantise=True)
        print(found.bits.mean(), found.bits_error)  # bits per dimension

    The density is that of continuous images with the noise of `t_min`, to which networks are trained. Images of 8 bits
    have a probability instead. The bits per dimension of images that are dequantised, by uniform noise as wide as a
    level, bound it: on average they are at least what a code of the images by this model takes. So they do for
    Langevin's diffusions without it, whose velocities are drawn. See `execute.likelihood`.

    Args:
        model: a model of images, not of latents.
        images: in [-1, 1], `(count, channels, height, width)`, or a single one without `count`; their dtype is
            that of states.
        steps: number of steps, even; each takes six network calls, with those of half as many steps.
        draws: how often what is random is drawn: probes of the trace, noise of dequantisation, velocities.
        exact: sum the trace over all numbers of an image: for small ones.
        dequantise: whether images are of 8 bits, and noise as wide as a level is added to them.
        end: time of the images, by default `t_min`; below it, networks are asked what they were not trained for.
        labels: what the images show, as in `sample`; by default what the model was given, or nothing.
        guidance: weight of classifier-free guidance, by default 1, or a pipeline's own.
        seed: seeds the draws; those of image i depend on the seed and its number alone.
        first: number of the first image, or the number of each.
        batch: images at a time.
        callback: told after every network call how many states it saw.

    Returns:
        The log-likelihood of each image in nats and bits, its standard error, and what half the steps change.

    Raises:
        PushforwardError: a model of latents, images that do not fit the model, or no such class, time or steps.
    """
    images = as_batch(images, model)
    if model.decoder is not None:
        raise PushforwardError(
            f"Model {model.name!r} diffuses latents, whose density is not that of images; take a model of images."
        )
    if draws < 1:
        raise PushforwardError(f"A likelihood takes at least 1 draw; got {draws}.")
    random = dequantise or not exact or model.process.blocks > 1
    there = AdaptiveDiffusion(model).given(labels, guidance)
    there.model_for(len(images))
    numbers, parts = numbered(first, len(images)), []
    for some in batches(len(images), batch):
        x, bound = images[some].to(model.device), there.some(some).model_for(len(images[some]))
        known = bound.gaussian.tempered(0.0)  # white
        stream = GaussianStream(seed, numbers[some], tuple(x.shape[1:]))
        found = []
        for _ in range(draws if random else 1):
            moved = x + BIN * (torch.special.ndtr(stream.draw()) - 0.5).to(x) if dequantise else x
            found.append(
                log_density(model.process, bound.denoiser, moved, reference=known, start=model.reference,
                            steps=steps, draw=stream.draw, exact=exact, end=end, callback=callback)
            )  # fmt: skip
        fine, coarse = (torch.stack(values) for values in zip(*found, strict=True))
        mean = fine.mean(0)
        spread = (fine - mean).square().sum(0) / (len(fine) - 1) if len(fine) > 1 else mean * math.nan
        error = (spread / len(fine)).sqrt() if random else torch.zeros_like(mean)
        products = x[0].numel() if exact else 1
        nfe = len(fine) * STAGES * steps * (1 + products)
        parts.append(Likelihood(mean, error, (mean - coarse.mean(0)).abs(), x[0].numel(), nfe))
    return Likelihood.cat(parts)
