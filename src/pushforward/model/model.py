"""Models: a network with the process it was trained for, the shape of its images, and what they are of.

On disk a model is one folder: `config.json`, `model.safetensors`, `statistics.safetensors` (mean and spectrum of its
data) and a model card `README.md`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pushforward.data.files import atomic_path, save_tensors
from pushforward.data.schema import check, read
from pushforward.denoiser import Denoiser, Wrapper
from pushforward.errors import FarOutside, PushforwardError
from pushforward.linear import POINT, Gaussian, Process, process_from_config
from pushforward.model.backbone import Backbone, BackboneConfig
from pushforward.model.network import Network
from pushforward.model.prediction import Prediction, is_image
from pushforward.model.prompts import Prompted, TextEncoder, prompted
from pushforward.model.tokens import tokens, warn_of_lost_words

CONFIG, WEIGHTS, STATISTICS, CARD = "config.json", "model.safetensors", "statistics.safetensors", "README.md"
FORMAT = "pushforward-1"
_FAR = 100.0  # of statistics: means and mean variances beyond are those of no images, and of no latents either
_REMEDY = "train or fetch the model again"
_Side = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True)
class Config:
    """What `config.json` holds, beside its `format`; see `trained` for what it means."""

    format: str
    name: str
    process: dict[str, Any]
    shape: Annotated[tuple[_Side, ...], Field(min_length=3, max_length=3)]
    prediction: Prediction
    variance: Annotated[float, Field(gt=0)]
    network: BackboneConfig
    classes: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)


FAR = 100.0  # deviations of the data


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusion model.

    Args:
        name: for reports.
        process: the diffusion it was trained for.
        denoiser: the network.
        shape: of what the process diffuses, `(channels, *field)`: images, or the latents of a decoder.
        reference: Gaussian that its data are referenced to (for starts and solvers' coordinates).
        statistics: Gaussian fitted to its data (see `linear.fit`), by which parallel sampling and inversion are
            preconditioned; by default the reference, or a variance of 1/4 if that is a point.
        means: of its classes, `(classes, channels, *field)`, if known.
        text: encodes prompts, for a model that is told in words what to draw.
        negative: the prompt that guidance leads away from, and that stands in where none is given.
        classes: names of its labels.
        decoder: latents `(batch, channels, *field)` to images in [-1, 1]; `None` if the process diffuses images.
        encoder: images in [-1, 1] to latents, the other way; `None` with no decoder, or where it is not known.
        image_shape: of the images, `(channels, height, width)`, if a decoder makes them.
        grid: how its own scheduler places and ends its time steps, where it came with one (see `plan.grid.timesteps`).
        info: what else is known: data, licence, training.
        solvers: settings that solvers have by default for this model, by their names.
    """

    name: str
    process: Process
    denoiser: Denoiser
    shape: tuple[int, ...]
    reference: Gaussian = POINT
    classes: tuple[str, ...] = ()
    decoder: Callable[[Tensor], Tensor] | None = None
    grid: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    statistics: Gaussian | None = None
    means: Tensor | None = None
    text: TextEncoder | None = None
    negative: str = ""
    encoder: Callable[[Tensor], Tensor] | None = None
    image_shape: tuple[int, ...] | None = None
    solvers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_shape is None and self.decoder is None:
            object.__setattr__(self, "image_shape", self.shape)

    def __repr__(self) -> str:
        """Show name, process, sizes, and for how many images it was given conditions; weights fill pages."""
        said = {"process": self.process.name, "images": "x".join(map(str, self.image_shape or ("unknown",)))}
        if self.decoder is not None:
            said["latents"] = "x".join(map(str, self.shape))
        if self.classes:
            said["classes"] = str(len(self.classes))
        said["parameters"] = f"{self.parameters:,}"
        if self.conditions:
            said["conditions"] = str(self.conditions)
        return f"Model({', '.join([self.name, *(f'{key}={value}' for key, value in said.items())])})"

    @property
    def gaussian(self) -> Gaussian:
        """What is known of its data as a Gaussian; with labels given, the mean is that of each image's class."""
        known = self.statistics or self.reference or Gaussian(0.25)
        labels = getattr(self.denoiser, "condition", None)
        if self.means is None or labels is None or labels.dtype != torch.long:
            return known
        return Gaussian(known.variance, self.means[labels.to(self.means.device)])

    @property
    def module(self) -> nn.Module | None:
        """The network's module, if it is one."""
        module = getattr(self.denoiser, "module", None)
        return module if isinstance(module, nn.Module) else None

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(p.numel() for p in self.module.parameters()) if self.module is not None else 0

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of `batch` states, `(batch, k * channels, *field)`."""
        return (batch, self.process.blocks * self.shape[0], *self.shape[1:])

    @property
    def conditions(self) -> int:
        """For how many images it was given conditions; 0: for none. One condition is every image's."""
        network = self.denoiser
        while isinstance(network, Wrapper):
            network = network.inner
        condition = network.condition if isinstance(network, Network) else None
        return 0 if condition is None else len(condition)

    def some(self, images: slice | Tensor) -> Model:
        """This model for some of the images that it was given conditions for."""
        if self.conditions < 2:
            return self
        if isinstance(self.denoiser, Wrapper):
            inner = replace(self, denoiser=self.denoiser.inner).some(images)
            return replace(self, denoiser=self.denoiser.around(inner.denoiser))
        network = self.denoiser
        assert isinstance(network, Network)
        assert network.condition is not None
        return replace(self, denoiser=network.given(network.condition[images], network.guidance))

    def given(
        self, condition: Tensor | Sequence[str] | Sequence[int] | str | int | None, guidance: float | None = None
    ) -> Model:
        """This model under a condition: classes `(batch,)`, by number or name, or as many prompts.

        One condition is every image's. A model that has been given a condition keeps it until it is given another.

        Args:
            condition: classes or prompts; `None` for what it has been given, if anything.
            guidance: weight of classifier-free guidance; 1, by default, is plain. A condition that is kept keeps its.

        Raises:
            PushforwardError: the model takes no condition, or another kind, or labels out of range.
        """
        if isinstance(condition, str | int):
            return self.given([condition], guidance)  # type: ignore[arg-type]
        if isinstance(self.denoiser, Wrapper):
            told = replace(self, denoiser=self.denoiser.inner).given(condition, guidance)
            return replace(told, denoiser=self.denoiser.around(told.denoiser))
        if condition is None and self.conditions:
            network = self.denoiser
            assert isinstance(network, Network)
            return self if guidance is None else replace(self, denoiser=network.given(network.condition, guidance))
        guidance = 1.0 if guidance is None else guidance
        if self.text is not None:
            return self._prompted(condition, guidance)
        if isinstance(condition, Sequence) and self.classes:
            condition = torch.tensor([class_number(self, one) for one in condition])
        if not isinstance(condition, Tensor | None):
            raise PushforwardError(f"Model {self.name!r} has no classes and reads no prompts; leave the label out.")
        unconditional = getattr(self.denoiser, "unconditional", None)
        if guidance != 1 and (condition is None or unconditional is None):
            why = "no label was given" if unconditional is not None else "it has no prediction without labels"
            raise PushforwardError(
                f"Guidance {guidance:g} has no effect on model {self.name!r}: {why}. Leave guidance at 1."
            )
        if condition is None:
            return self
        if not condition.is_floating_point():
            condition = condition.long()
        if not isinstance(self.denoiser, Network) or (not self.classes and condition.dtype == torch.long):
            raise PushforwardError(f"Model {self.name!r} has no classes; leave the label out.")
        if condition.dtype == torch.long and not bool(((condition >= 0) & (condition < len(self.classes))).all()):
            raise PushforwardError(
                f"Labels of model {self.name!r} go from 0 to {len(self.classes) - 1}; got {condition.tolist()}."
            )
        return replace(self, denoiser=self.denoiser.given(condition, guidance))

    def unconditioned(self) -> Model:
        """This model without the condition that it was given."""
        if not self.conditions:
            return self
        if isinstance(self.denoiser, Wrapper):
            inner = replace(self, denoiser=self.denoiser.inner).unconditioned()
            return replace(self, denoiser=self.denoiser.around(inner.denoiser))
        assert isinstance(self.denoiser, Network)
        return replace(self, denoiser=self.denoiser.given(None))

    def _prompted(self, condition: Tensor | Sequence[str] | Sequence[int] | None, guidance: float) -> Model:
        network, text = self.denoiser, self.text
        assert isinstance(network, Network)
        assert isinstance(network.module, nn.Module)
        assert text is not None
        prompts = [one for one in condition if isinstance(one, str)] if condition is not None else []
        if condition is not None and len(prompts) != len(condition):
            raise PushforwardError(f"Model {self.name!r} is told in words what to draw: give prompts, not labels.")
        if condition is None and guidance != 1:
            raise PushforwardError(
                f"Guidance {guidance:g} has no effect on model {self.name!r} without a prompt. Leave guidance at 1."
            )
        bare = network.module.network if isinstance(network.module, Prompted) else network.module
        module, rows = prompted(bare, text, prompts, self.negative)
        told = replace(network, module=module, unconditional=torch.zeros(1, dtype=torch.long))
        return replace(self, denoiser=told.given(None if condition is None else rows, guidance))

    def to(self, device: torch.device | str) -> Model:
        """This model with its network on a device (moved in place)."""
        for part in (self.module, self.decoder, self.encoder, self.text):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def images(self, state: Tensor) -> Tensor:
        """The images in [-1, 1] that a clean state stands for, `(batch, channels, height, width)`.

        Warns, with `FarOutside`, of a state that is no image: see `far_outside`.
        """
        image = self.process.image(state)
        if sentence := far_outside(image, self.gaussian, self.name):
            warnings.warn(sentence, FarOutside, stacklevel=2)
        return image if self.decoder is None else self.decoder(image)

    def latents(self, images: Tensor) -> Tensor:
        """What the process diffuses, of images in [-1, 1]: themselves, or their latents `(batch, *shape)`.

        Raises:
            PushforwardError: images of another shape, or a model of latents without an encoder.
        """
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            raise PushforwardError(
                f"Model {self.name!r} has images of shape {self.image_shape}; got {tuple(images.shape[1:])}."
            )
        if self.decoder is None:
            return images
        if self.encoder is None:
            raise PushforwardError(
                f"Model {self.name!r} decodes latents, but has no encoder that makes latents of images."
            )
        return self.encoder(images)


class Labelled(Protocol):
    """What has classes: a model, or a generator."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


def class_number(model: Labelled, label: str | int) -> int:
    """The number of a class of a model, by its name or number.

    Raises:
        PushforwardError: it has no such class.
    """
    if isinstance(label, str) and label in model.classes:
        return model.classes.index(label)
    number = int(label) if isinstance(label, int) or label.isdecimal() else -1
    if 0 <= number < len(model.classes):
        return number
    raise PushforwardError(f"Model {model.name!r} has no class {label!r}; it has {', '.join(model.classes)}.")


def far_outside(images: Tensor, data: Gaussian, name: str) -> str | None:
    """A sentence where a value is farther from 0 than a hundred times the size of the data, mean and deviation.

    Images in [-1, 1] have a deviation near 1/2, so the limit is 50 there; latents of unit variance rarely exceed 10,
    with strong guidance 30. Samples of few steps may be several deviations too large, and stay far below it. Beyond it,
    an error was multiplied by what divides by the signal where there is almost none, or by a step that is unstable.

    Args:
        images: or latents, `(batch, channels, *field)`.
        data: N(m, C).
        name: of the model.
    """
    scale = data.variance.mean().sqrt() + data.mean.abs().max()
    largest, limit = float(images.detach().abs().max()), FAR * float(scale)
    if not largest > limit:
        return None
    return (
        f"Samples of {name!r} reach {largest:.1e} and its data {float(scale):.1g}: they are no images. "
        "Use more steps, another solver or grid, or less guidance, or check the network."
    )


def trained(
    module: Backbone,
    process: Process,
    shape: tuple[int, ...],
    *,
    name: str = "model",
    prediction: str = "residual",
    variance: float = 0.25,
    classes: tuple[str, ...] = (),
    info: Mapping[str, Any] | None = None,
    statistics: Gaussian | None = None,
    means: Tensor | None = None,
) -> Model:
    """The model around a network of ours: how its time and its input are scaled is decided here and nowhere else.

    Args:
        module: the network.
        process: its diffusion.
        shape: of its images, `(channels, height, width)`.
        name: for reports.
        prediction: what the network gives (see `model.prediction`).
        variance: of the data, per value, about zero; images are in [-1, 1].
        classes: names of its labels; label `len(classes)` says nothing.
        info: what else is known.
        statistics: Gaussian fitted to its data.
        means: of its classes.
    """
    reference = Gaussian(variance)
    scale = 1.0 if module.config.time_angle else 1000.0 / process.t_max
    network = Network(
        module,
        prediction=prediction,  # type: ignore[arg-type]
        time_scale=scale,
        reference=reference,
        input_reference=reference,
        unconditional=torch.tensor([len(classes)]) if classes else None,
    )
    words = module.config.words
    return Model(
        name,
        process,
        network,
        shape,
        reference,
        classes,
        info=dict(info or {}),
        statistics=statistics,
        means=means,
        text=partial(_words, rows=words) if words else None,
    )


def _words(texts: Sequence[str], rows: int) -> tuple[Tensor]:
    for text in texts:
        warn_of_lost_words(text)
    return (tokens(texts, rows),)


def save_model(model: Model, folder: Path, card: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Write a model of ours as a folder; each file appears whole or not at all.

    Args:
        model: made by `trained`.
        folder: made if need be.
        card: text of its README.md.
        dtype: of the weights on disk (they are used in float32).
    """
    module, network = model.module, model.denoiser
    if not isinstance(module, Backbone) or not isinstance(network, Network):
        raise PushforwardError(f"Model {model.name!r} is not made of a network of ours, so it cannot be saved as one.")
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
        tensors = {k: torch.as_tensor(v).float() for k, v in known.items() if v is not None}
        save_tensors(folder / STATISTICS, tensors)
    if card:
        with atomic_path(folder / CARD) as path:
            path.write_text(card, encoding="utf-8")
    with atomic_path(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path, name: str | None = None) -> Model:
    """Read a folder that `save_model` wrote.

    Raises:
        PushforwardError: a file is missing, damaged, or of another network.
    """
    path = folder / CONFIG
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise PushforwardError(f"{path} has format {found.get('format')!r}; expected {FORMAT!r}.")
    config = check(found, Config, str(path), _REMEDY)
    process = process_from_config(config.process)
    _check_network(config, process, path)
    weights = read_tensors(folder / WEIGHTS)
    with torch.device("meta"):  # what does not fit is said before memory is taken for it
        _check_weights(_backbone(config.network, path), weights, folder / WEIGHTS)
    module = _backbone(config.network, path)
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
            f"The entry 'network' of {path} describes no network ({str(error).splitlines()[0]}); {_REMEDY}."
        ) from error


def _check_network(config: Config, process: Process, path: Path) -> None:
    """Raise unless the network is one for the states and classes of the config."""
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
    values = read_tensors(path)
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
                "where images are in [-1, 1]); fetch the model again, or delete this file to do without."
            )
    return Gaussian(values["variance"].double(), values["mean"].double()), values.get("means")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder.

    Raises:
        PushforwardError: it is not there, or not JSON.
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
            raise PushforwardError(f"{path} has values in {name!r} that are no finite numbers; {_REMEDY}.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file of a model's folder.

    Raises:
        PushforwardError: the file is missing or damaged.
    """
    if not path.is_file():
        raise PushforwardError(f"{path} is missing; a model folder needs it.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PushforwardError(f"{path} is damaged or no safetensors file ({error}); fetch the model again.") from None
