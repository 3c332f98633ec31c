"""How good a model and its samplers are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pushforward.data.datasets import ImageData, load_images
from pushforward.evaluation import samplers
from pushforward.evaluation.report import Row
from pushforward.evaluation.runs import Evaluation
from pushforward.maps.spec import parse
from pushforward.model import Model
from pushforward.vision.features import feature_net

__all__ = ["evaluate"]

_EVALUATION = Evaluation()


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
