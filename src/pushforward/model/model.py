"""Models: a network with the process it was trained for, the shape of its images, and what they show."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, Self

import torch
from torch import Tensor, nn

from pushforward.denoiser import Denoiser, Wrapper
from pushforward.errors import FarOutside, PushforwardError
from pushforward.linear import POINT, WHITE, Flow, Gaussian, Process, ScaledProcess
from pushforward.model.flow import AsFlow, flow_of
from pushforward.model.labels import Condition, class_numbers, listed
from pushforward.model.network import Network, device_of, execution_device
from pushforward.model.prompts import Guided, Prompted, TextEncoder, prompted

FAR = 100.0  # deviations of the data


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusion model.

    Args:
        name: name for reports.
        process: the diffusion that the network was trained for.
        denoiser: the network.
        shape: shape of what the process diffuses, `(channels, *field)`: images, or the latents of a decoder.
        reference: Gaussian that its data are referenced to (for starts and solvers' coordinates).
        statistics: Gaussian fitted to its data (see `linear.fit`), which preconditions parallel sampling and inversion;
            by default the reference, or a variance of 1/4 if that is a point.
        means: mean image of each class, `(classes, channels, *field)`, if known.
        text: encoder of prompts, for a model that reads them.
        negative: the prompt that guidance leads away from, and that is used where no prompt is given.
        classes: names of its labels.
        decoder: function from latents `(batch, channels, *field)` to images in [-1, 1]; `None` if the process diffuses
            images.
        encoder: function from images in [-1, 1] to latents; `None` without a decoder, or if it is not known.
        image_shape: shape of the images, `(channels, height, width)`, if a decoder makes them.
        grid: how its own scheduler, if it came with one, places and ends its time steps (see `plan.grid.timesteps`).
        info: what else is known: data, licence, training, why there is no `encoder`.
        solvers: default settings of solvers for this model, by solver name.
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
        _check_parts(self.process, self.denoiser)
        if self.image_shape is None and self.decoder is None:
            object.__setattr__(self, "image_shape", self.shape)
        for name in ("shape", "image_shape"):
            if (shape := getattr(self, name)) is not None:
                object.__setattr__(self, name, sizes("The shape of what a model makes", shape))

    def __repr__(self) -> str:
        """Show name, process, sizes, and the number of images that it was given conditions for, but no weights."""
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
        """What is known of its data as a Gaussian; if labels are given, the mean is that of each image's class."""
        known = self.statistics or self.reference or WHITE
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

    @property
    def device(self) -> torch.device:
        """Where its network works."""
        if isinstance(self.module, Guided):
            return self.module.device
        return device_of(self.module)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of `batch` states, `(batch, k * channels, *field)`."""
        return (batch, self.process.blocks * self.shape[0], *self.shape[1:])

    @property
    def conditions(self) -> int:
        """The number of images that it was given conditions for, or 0. One condition serves every image."""
        network = self._network
        return 0 if network is None or network.condition is None else len(network.condition)

    @property
    def guidance(self) -> float:
        """The weight of the guidance that its answers are under; 1 without any."""
        network = self._network
        if network is None:
            return 1.0
        return network.module.guidance if isinstance(network.module, Guided) else network.guidance

    @property
    def _network(self) -> Network | None:
        """The network within, if it is one."""
        inner = self.denoiser
        while isinstance(inner, Wrapper):
            inner = inner.inner
        return inner if isinstance(inner, Network) else None

    def some(self, images: slice | Tensor) -> Self:
        """Return this model for some of the images that it was given conditions for."""
        if self.conditions < 2:
            return self

        def chosen(network: Network) -> Network:
            assert network.condition is not None
            return network.given(network.condition[images], network.guidance)

        return replace(self, denoiser=_inside(self.denoiser, chosen))

    def given(self, condition: Condition, guidance: float | None = None) -> Self:
        """Return this model under a condition: classes `(batch,)`, by number or name, or as many prompts.

        One condition serves every image. A model that has been given a condition keeps it until it is given another.

        Args:
            condition: classes or prompts; `None` keeps the condition given before, if any.
            guidance: weight of classifier-free guidance, by default 1, which is plain, or a pipeline's own. A condition
                that is kept keeps its guidance.

        Raises:
            PushforwardError: the model takes no condition, or another kind, or the labels are out of range; or the
                weight is no number of float32.
        """
        try:
            finite = guidance is None or abs(guidance) + 0.0 <= torch.finfo(torch.float32).max
        except TypeError:
            finite = False
        if not finite:
            raise PushforwardError(f"The weight of guidance is a finite number of 32 bits; got {guidance}.")
        condition = listed(condition)
        if isinstance(self.denoiser, Wrapper):
            told = replace(self, denoiser=self.denoiser.inner).given(condition, guidance)
            return replace(told, denoiser=self.denoiser.around(told.denoiser))
        if condition is None and self.conditions:
            network = self.denoiser
            assert isinstance(network, Network)
            if guidance is None:
                return self
            if isinstance(network.module, Guided):
                return replace(self, denoiser=replace(network, module=network.module.guided(guidance, self.negative)))
            return replace(self, denoiser=network.given(network.condition, guidance))
        if isinstance(self.denoiser, Network) and isinstance(self.denoiser.module, Guided):
            own = self.denoiser.module.guided(guidance, self.negative if self.text is not None else "")
            return replace(self, denoiser=replace(self.denoiser, module=own))._conditioned(condition, 1.0)
        return self._conditioned(condition, 1.0 if guidance is None else guidance)

    def _conditioned(self, condition: Tensor | Sequence[str] | Sequence[int] | None, guidance: float) -> Self:
        """Return this model under a condition, if one is given, with this weight of guidance."""
        if self.text is not None:
            return self._prompted(condition, guidance)
        if isinstance(condition, Sequence) and self.classes:
            condition = class_numbers(self, condition)
        if not isinstance(condition, Tensor | None):
            raise PushforwardError(f"Model {self.name!r} has no classes and reads no prompts; leave out the label.")
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
        elif unconditional is not None and not unconditional.is_floating_point():
            raise PushforwardError(f"Labels of model {self.name!r} are whole numbers; got {condition.dtype} ones.")
        if not isinstance(self.denoiser, Network) or (not self.classes and condition.dtype == torch.long):
            raise PushforwardError(f"Model {self.name!r} has no classes; leave out the label.")
        if condition.dtype == torch.long:
            condition = class_numbers(self, condition)
        return replace(self, denoiser=self.denoiser.given(condition, guidance))

    def unconditioned(self) -> Self:
        """Return this model without the condition that it was given."""
        if not self.conditions:
            return self
        return replace(self, denoiser=_inside(self.denoiser, lambda network: network.given(None)))

    def _prompted(self, condition: Tensor | Sequence[str] | Sequence[int] | None, guidance: float) -> Self:
        network, text = self.denoiser, self.text
        assert isinstance(network, Network)
        assert isinstance(network.module, nn.Module)
        assert text is not None
        prompts = [one for one in condition if isinstance(one, str)] if condition is not None else []
        if condition is not None and len(prompts) != len(condition):
            raise PushforwardError(f"Model {self.name!r} reads prompts: give prompts, not labels.")
        if condition is None and guidance != 1:
            raise PushforwardError(
                f"Guidance {guidance:g} has no effect on model {self.name!r} without a prompt. Leave guidance at 1."
            )
        if isinstance(network.module, Guided):
            if condition is None:
                return self
            own, numbers = network.module.told(prompts)
            return replace(self, denoiser=replace(network, module=own).given(numbers))
        bare = network.module.network if isinstance(network.module, Prompted) else network.module
        module, rows = prompted(bare, text, prompts, self.negative)
        told = replace(network, module=module, unconditional=torch.zeros(1, dtype=torch.long, device="cpu"))
        return replace(self, denoiser=told.given(None if condition is None else rows, guidance))

    def as_flow(self) -> Self:
        """Return this model as one of flow matching, `(1 - t) x + t noise`: the same network, and the same images.

        Times are mapped by equal signal-to-noise ratio and states are rescaled, which is exact (see `model.flow`). Its
        scheduler's own grid, which counts the times of its own process, is left out.

        Raises:
            PushforwardError: the process is not scalar.
        """
        if isinstance(self.process, Flow):
            return self
        process = flow_of(self.process)
        assert isinstance(self.process, ScaledProcess)
        return replace(self, process=process, denoiser=AsFlow(self.denoiser, self.process), grid={})

    def to(self, device: torch.device | str) -> Self:
        """Return this model with its network on a device (moved in place); what `accelerate` offloads stays with it."""
        for part in (self.module, self.decoder, self.encoder, self.text):
            if isinstance(part, nn.Module) and execution_device(part) is None:
                part.to(device)
        return self

    def images(self, state: Tensor) -> Tensor:
        """Return the images in [-1, 1] that a clean state stands for, `(batch, channels, height, width)`.

        Warns with `FarOutside` if the state is no image: see `far_outside`.
        """
        image = self.process.image(state)
        if sentence := far_outside(image, self.gaussian, self.name):
            warnings.warn(sentence, FarOutside, stacklevel=2)
        return image if self.decoder is None else self.decoder(image)

    def check_images(self, images: Any) -> None:
        """Raise unless these are images for this model.

        Warns with `FarOutside` if they are as far outside the range of data as `far_outside` says.

        Raises:
            PushforwardError: they are no floating-point numbers, have another shape, are none, or are not finite.
        """
        if not isinstance(images, Tensor) or images.is_meta:
            kind = "one without data" if isinstance(images, Tensor) else type(images).__name__
            raise PushforwardError(f"Images are a tensor in [-1, 1], (count, channels, height, width); got {kind}.")
        if not images.is_floating_point():
            raise PushforwardError(
                f"Images are floating-point numbers in [-1, 1]; got {images.dtype}: divide bytes by 127.5, less 1."
            )
        self._check_shape(images)
        if not len(images):
            raise PushforwardError("There is no image here; give one or more.")
        bad = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise PushforwardError(
                f"Images must be of finite numbers; {len(bad)} of {len(images)} are not, the first at place {bad[0]}."
            )
        if reach := _reach(images, self.gaussian if self.decoder is None else WHITE):
            warnings.warn(
                f"Images given to {self.name!r} {reach}: they are no images in [-1, 1]. Divide values up to 255 by "
                "127.5, less 1.",
                FarOutside,
                stacklevel=1,  # one place for all, so that it is told once
            )

    def _check_shape(self, images: Tensor) -> None:
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            raise PushforwardError(
                f"Model {self.name!r} has images of shape {self.image_shape}; got {tuple(images.shape[1:])}."
            )

    def latents(self, images: Tensor) -> Tensor:
        """Turn images in [-1, 1] into what the process diffuses: themselves, or latents `(batch, *shape)`.

        Raises:
            PushforwardError: the images have another shape, or the model diffuses latents and has no encoder.
        """
        self._check_shape(images)
        if self.decoder is None:
            return images
        if self.encoder is None:
            why = self.info.get("encoder", "")
            raise PushforwardError(
                f"Model {self.name!r} diffuses latents, but has no encoder to turn images into them. {why}".strip()
            )
        return self.encoder(images)


def _check_parts(process: object, denoiser: object) -> None:
    if not isinstance(process, Process) or not isinstance(denoiser, Denoiser):
        raise PushforwardError(
            "A model is of a process, as pushforward.VP(), and a denoiser, as pushforward.Network(module); got "
            f"{process!r} and a {type(denoiser).__name__}."
        )


def sizes(what: str, shape: Any) -> tuple[int, ...]:
    """A shape of any library as whole numbers.

    Args:
        what: it is, for the message.
        shape: the shape.

    Raises:
        PushforwardError: it is none, or has a side without length.
    """
    try:
        found = tuple(map(index, shape))
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise PushforwardError(f"{what} is a sequence of positive whole numbers; got {shape!r}.")
    return found


def _inside(denoiser: Denoiser, change: Callable[[Network], Network]) -> Denoiser:
    """Return a denoiser whose network is changed, whatever is wrapped around it."""
    if isinstance(denoiser, Wrapper):
        return denoiser.around(_inside(denoiser.inner, change))
    assert isinstance(denoiser, Network)
    return change(denoiser)


def far_outside(images: Tensor, data: Gaussian, name: str) -> str | None:
    """Return a warning if a value is farther from 0 than a hundred times the size of the data, mean and deviation.

    Images in [-1, 1] have a deviation near 1/2, so the limit is 50 there; latents of unit variance rarely exceed 10,
    with strong guidance 30. Samples of few steps may be several deviations too large, and stay far below it. Beyond it,
    an error grew by division by a signal that was almost gone, or by an unstable step.

    Args:
        images: images or latents, `(batch, channels, *field)`.
        data: Gaussian N(m, C) of the data.
        name: name of the model.
    """
    if not (reach := _reach(images, data)):
        return None
    return (
        f"Samples of {name!r} {reach}: they are no images. "
        "Use more steps, another solver or grid, or less guidance, or check the network."
    )


def _reach(images: Tensor, data: Gaussian) -> str | None:
    """How far images reach, if that is too far."""
    scale = data.variance.mean().sqrt() + data.mean.abs().max()
    largest, limit = float(images.detach().abs().max()), FAR * float(scale)
    return f"reach {largest:.1e}, but its data only {float(scale):.1g}" if largest > limit else None
