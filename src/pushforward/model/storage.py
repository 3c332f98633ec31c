"""Reading and writing models that this package trained.

A model is one folder: `config.json`, `model.safetensors`, `statistics.safetensors` (mean and spectrum of its data) and
a model card `README.md`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pushforward.data.files import atomic_path, read_tensors, save_tensors
from pushforward.data.schema import check, read
from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Process, process_from_config
from pushforward.model.backbone import Backbone, BackboneConfig
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.prediction import Prediction, is_image
from pushforward.model.trained import trained

__all__ = ["CARD", "CONFIG", "FORMAT", "STATISTICS", "WEIGHTS", "load_model", "read_json", "save_model"]

CONFIG, WEIGHTS, STATISTICS, CARD = "config.json", "model.safetensors", "statistics.safetensors", "README.md"
FORMAT = "pushforward-1"
_FAR = 100.0  # no images or latents have means or mean variances beyond this
_REMEDY = "train or fetch the model again"
_Side = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True)
class Config:
    """The content of `config.json`, without its `format`; see `trained` for the meaning."""

    format: str
    name: str
    process: dict[str, Any]
    shape: Annotated[tuple[_Side, ...], Field(min_length=3, max_length=3)]
    prediction: Prediction
    variance: Annotated[float, Field(gt=0)]
    network: BackboneConfig
    classes: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)


def save_model(model: Model, folder: Path, card: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Write a model of this package as a folder, each file atomically.

    Args:
        model: a model that `trained` made.
        folder: folder to write to; it is created if needed.
        card: text of its README.md.
        dtype: dtype of the weights on disk (they are used in float32).

    Raises:
        PushforwardError: the model was not trained by this package.
    """
    module, network = model.module, model.denoiser
    if not isinstance(module, Backbone) or not isinstance(network, Network):
        raise PushforwardError(f"Model {model.name!r} was not trained by this package, which cannot save its network.")
    config = {
        "format": FORMAT,
        "name": model.name,
        "process": model.process.config(),
        "shape": list(model.shape),
        "prediction": network.prediction,
        "variance": float(model.reference.variance),
        "network": module.config.to_dict(),
        "classes": list(model.classes),
        "info": dict(model.info),
    }
    save_tensors(folder / WEIGHTS, {k: v.to(dtype) for k, v in module.state_dict().items()})
    if model.statistics is not None:
        known = {"mean": model.statistics.mean, "variance": model.statistics.variance, "means": model.means}
        tensors = {k: torch.as_tensor(v, device="cpu").float() for k, v in known.items() if v is not None}
        save_tensors(folder / STATISTICS, tensors)
    if card:
        with atomic_path(folder / CARD) as path:
            path.write_text(card, encoding="utf-8")
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path, name: str | None = None) -> Model:
    """Read a folder that `save_model` wrote.

    Raises:
        PushforwardError: a file is missing, is damaged, or belongs to another network.
    """
    path = folder / CONFIG
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise PushforwardError(f"{path} has format {found.get('format')!r}; expected {FORMAT!r}.")
    config = check(found, Config, str(path), _REMEDY)
    process = process_from_config(config.process)
    _check_network(config, process, path)
    weights, _ = read_tensors(folder / WEIGHTS, "file of weights", _REMEDY)
    with torch.device("meta"):  # check the fit before memory is taken
        _check_weights(_backbone(config.network, path), weights, folder / WEIGHTS)
    module = _backbone(config.network, path).float()  # whatever PyTorch's default is
    module.load_state_dict(weights)
    statistics, means = _load_statistics(folder / STATISTICS, config.shape, len(config.classes))
    return trained(
        module.eval().requires_grad_(False),
        process,
        config.shape,
        name=name or config.name,
        prediction=config.prediction,
        variance=config.variance,
        classes=config.classes,
        info=config.info,
        statistics=statistics,
        means=means,
    )


def _backbone(config: BackboneConfig, path: Path) -> Backbone:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without weights, which will not fit
            return Backbone(config)
    except PushforwardError:
        raise
    except Exception as error:  # of numbers that do not go together, whatever layer finds it out
        raise PushforwardError(
            f"The entry 'network' of {path} describes no valid network ({str(error).splitlines()[0]}); {_REMEDY}."
        ) from error


def _check_network(config: Config, process: Process, path: Path) -> None:
    """Raise unless the network fits the states and classes of the config."""
    network, states = config.network, process.blocks * config.shape[0]
    field = getattr(process, "field", config.shape[1:])
    fits = {
        "shape": tuple(field) == config.shape[1:] and not any(side % network.multiple for side in config.shape[1:]),
        "network.in_channels": network.in_channels == states,
        "network.out_channels": network.out_channels == (config.shape[0] if is_image(config.prediction) else states),
        "network.classes": network.classes == (0 if network.words else len(config.classes)),
    }
    for entry, fitting in fits.items():
        if not fitting:
            raise PushforwardError(f"The entry {entry!r} of {path} does not fit the others; {_REMEDY}.")


def _load_statistics(path: Path, shape: tuple[int, ...], classes: int) -> tuple[Gaussian | None, Tensor | None]:
    if not path.is_file():
        return None, None
    values, _ = read_tensors(path, "file of statistics", _REMEDY)
    expected = {"mean": shape, "variance": shape[1:]}
    if classes and "means" in values:
        expected["means"] = (classes, *shape)
    if {key: tuple(value.shape) for key, value in values.items()} != expected:
        raise PushforwardError(
            f"{path} does not hold the mean and spectrum of images of shape {shape}; fetch the model again."
        )
    for key, value in values.items():  # a NaN fails both
        least = 0.0 if key == "variance" else -_FAR
        size = value.mean() if key == "variance" else value.max()
        if not (bool(value.min() >= least) and bool(size <= _FAR)):
            raise PushforwardError(
                f"{path} holds a {key} that no images have (from {float(value.min()):.3g} to {float(value.max()):.3g}, "
                "for images in [-1, 1]); fetch the model again, or delete this file to do without it."
            )
    return Gaussian(values["variance"].double(), values["mean"].double()), values.get("means")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model's folder.

    Raises:
        PushforwardError: the file is missing, or is not JSON.
    """
    return read(path, dict, _REMEDY)


def _check_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless these are the weights of the module, by names and shapes, all of them finite numbers."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = "has an unknown" if name not in expected else "has another shape of" if name in found else "lacks"
            raise PushforwardError(f"{path} does not fit the network of {CONFIG}: it {what} {name!r}; {_REMEDY}.")
        if not (weights[name].is_floating_point() and bool(weights[name].isfinite().all())):
            raise PushforwardError(f"{path} has values in {name!r} that are not finite numbers; {_REMEDY}.")
