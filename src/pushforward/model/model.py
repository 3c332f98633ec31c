"""Models: a network with the process it was trained for, the shape of its images, and what they are of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pushforward.denoiser import Denoiser, Wrapper
from pushforward.errors import FarOutside, PushforwardError
from pushforward.linear import POINT, Gaussian, Process
from pushforward.model.backbone import Backbone
from pushforward.model.network import Network
from pushforward.model.prompts import Prompted, TextEncoder, prompted
from pushforward.model.tokens import tokens, warn_of_lost_words

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
