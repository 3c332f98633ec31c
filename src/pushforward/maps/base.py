"""What all maps of a diffusion model share: the model with its condition, the codes, and the states they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.linear import root
from pushforward.maps.code import Code, GaussianStream
from pushforward.maps.labels import UNSAID, Labels, Unsaid, in_turn, listed
from pushforward.model import Model

__all__ = ["ModelMap"]


@dataclass(frozen=True)
class ModelMap(ABC):
    """A map from codes to images that a diffusion model makes, whichever way its states are followed.

    Args:
        model: network and process; one that has been given a condition keeps it.
        dtype: of the states.
        device: of the states; by default the network's.
        guidance: weight of classifier-free guidance of labels that the map is not bound to yet; see `given`.
        bound: whether the model is under the condition that it shall have, be it none; see `given`.
    """

    model: Model
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    guidance: float = 1.0
    bound: bool = False

    @property
    @abstractmethod
    def times(self) -> Tensor:
        """Times of the states, decreasing, float64."""

    @property
    @abstractmethod
    def noises(self) -> int:
        """Noises of a code, besides its start."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, object]:
        """Of what finds the states, for reports."""

    def given(self, labels: Labels | int | Unsaid = UNSAID, guidance: float | None = None) -> Self:
        """The same map under a condition, which it keeps until it is given another.

        A map that was given none samples the model's classes, or the captions that it knows, in turn (see `in_turn`),
        and does all else without a condition.

        Args:
            labels: classes, by name or number, or prompts, one an image or one for all; `None` for none at all, in
                samples neither. By default they stay as they are.
            guidance: weight of classifier-free guidance; 1 is plain. By default it stays as it is, 1 at first.

        Raises:
            PushforwardError: the model takes no condition, or another kind, or has no such class, or guidance has no
                effect on it.
        """
        weight = self.guidance if guidance is None else guidance
        if not isinstance(labels, Unsaid):
            model = self.model.to(self._place)
            model = model.unconditioned() if labels is None else model
            return replace(self, model=model.given(listed(labels), weight), guidance=weight, bound=True)
        if guidance is None or not (self.bound or self.model.conditions):
            return replace(self, guidance=weight)
        return replace(self, model=self.model.given(None, weight), guidance=weight)

    def some(self, which: slice | Tensor) -> Self:
        """The same map for some of the images, under their conditions; a single condition is every image's."""
        return replace(self, model=self.model.some(which.cpu() if isinstance(which, Tensor) else which))

    def draw(self, count: int, *, seed: int = 0, first: int = 0) -> Code:
        """The codes of the images of `sample`, `count` of them, where the network is.

        Raises:
            PushforwardError: a count below 1.
        """
        if count < 1:
            raise PushforwardError(f"Draw at least 1 code; got {count}.")
        stream = GaussianStream(seed, range(first, first + count), self.model.state_shape(1)[1:])
        return stream.code(self.noises, torch.empty(0, dtype=self.dtype, device=self._place))

    def start(self, z: Tensor) -> Tensor:
        """The terminal state whose code is `z (batch, k * channels, *field)`: `Psi m + R z`."""
        z = z.to(device=self._place, dtype=self.dtype)
        return root(self.model.process, self.times[:1], self.model.reference)[0](z) + self._mean(z)

    def code(self, start: Tensor) -> Tensor:
        """The other way: z of a terminal state."""
        inverse = root(self.model.process, self.times[:1], self.model.reference)[0].inverse()
        return inverse(start - self._mean(start))

    def _mean(self, like: Tensor) -> Tensor | float:
        """Mean of the terminal state for data of the reference."""
        reference, process, time = self.model.reference, self.model.process, self.times[:1]
        mean = reference.mean_state(process, like)
        return 0.0 if mean is None else process.signal(time)[0](mean)

    @property
    def _place(self) -> torch.device | str:
        parameters = () if self.model.module is None else self.model.module.parameters()
        return self.device or next((p.device for p in parameters), torch.device("cpu"))

    def told(self, count: int) -> Model:
        """The model on its device, for `count` images."""
        given = self.model.conditions
        if given not in (0, 1, count):
            raise PushforwardError(f"{count} images need as many labels or prompts; got {given}.")
        model = self.model.to(self._place)
        return model if self.bound or given else model.given(None, self.guidance)

    def _check_code(self, code: Code) -> None:
        given = 0 if code.noises is None else len(code.noises)
        if given != self.noises:
            raise PushforwardError(
                f"The plan takes {self.noises} noises, the code has {given}; decode it with the plan that it was made "
                "by."
            )

    def _batches(self, count: int, seed: int, first: int, batch: int) -> Iterator[tuple[Self, Tensor, GaussianStream]]:
        """The map, terminal states and noises of each batch of samples, with all checked before the first."""
        if count < 1 or batch < 1:
            raise PushforwardError(f"Sampling needs a count and a batch of at least 1; got {count} and {batch}.")
        check_images(count, self.model.image_shape or self.model.shape)
        drawn = self.bound or self.model.conditions
        there = self if drawn else self.given(in_turn(self.model, count, first))
        there.told(count)
        for begin in range(0, count, batch):
            end = min(begin + batch, count)
            stream = GaussianStream(seed, range(first + begin, first + end), self.model.state_shape(1)[1:])
            yield there.some(slice(begin, end)), self.start(stream.draw()), stream
