"""What all maps of a diffusion model share: the model with its condition, the codes, and the states they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from pushforward.data.memory import check_images
from pushforward.data.words import many
from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.linear import root
from pushforward.maps.code import Code, GaussianStream, batches, numbered, whole_numbers
from pushforward.maps.labels import UNSAID, Condition, Labels, Unsaid, in_turn, listed, take_labels
from pushforward.model import Model
from pushforward.model.labels import class_numbers

__all__ = ["ModelMap"]


@dataclass(frozen=True, eq=False)
class ModelMap(ABC):
    """A map from codes to images that a diffusion model makes, whichever way its states are followed.

    Args:
        model: network and process; one that has been given a condition keeps it.
        dtype: dtype of the states.
        device: device of the states; by default the network's.
        labels: classes `(count,)` or prompts that the map is bound to; see `given`.
        guidance: weight of classifier-free guidance; see `given`.
    """

    model: Model
    _: KW_ONLY
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    labels: Labels | Unsaid = UNSAID
    guidance: float | None = None

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
        """Settings of what finds the states, for reports."""

    def given(self, labels: Condition | Unsaid = UNSAID, guidance: float | None = None) -> Self:
        """The same map under a condition, which it keeps until it is given another.

        A map that was given none samples the model's classes, or the captions that it knows, in turn (see `in_turn`),
        and does all else without a condition.

        Args:
            labels: classes, by name or number, or prompts, one per image or one for all; `None` for none at all, in
                samples neither. By default they stay as they are.
            guidance: weight of classifier-free guidance; 1 is plain. By default it stays as it is, 1 at first.

        Raises:
            PushforwardError: the model takes no condition, or another kind, or has no such class, or guidance has no
                effect on it.
        """
        weight = self.guidance if guidance is None else guidance
        if not isinstance(labels, Unsaid):
            labels = listed(labels)
            if isinstance(labels, Sequence) and self.model.text is None and self.model.classes:
                labels = class_numbers(self.model, labels)
            there = replace(self, labels=labels, guidance=weight)
        else:
            there = replace(self, guidance=weight)
        if there.said:
            _ = there.bound  # what is wrong is said at once
        return there

    @property
    def said(self) -> bool:
        """Whether the map, or the model before it, has been told what images are to be of, be it nothing."""
        return not isinstance(self.labels, Unsaid) or self.model.conditions > 0

    @cached_property
    def bound(self) -> Model:
        """The model under its condition, on its device."""
        model, labels = self.model.to(self._place), self.labels
        if isinstance(labels, Unsaid):
            return model.given(None, self.guidance)
        return (model.unconditioned() if labels is None else model).given(labels, self.guidance)

    def in_turn(self, count: int, first: int = 0) -> Self:
        """The map as it is if its labels were said; else of `count` images, under the model's labels in turn."""
        count, first = whole_numbers("Counts and numbers of images", count, first)
        return self if self.said else self.given(in_turn(self.model, max(0, count), first))

    def model_for(self, count: int) -> Model:
        """The model under its condition, for `count` images.

        Raises:
            PushforwardError: the map is bound to labels or prompts of another number of images.
        """
        if self.bound.conditions not in (0, 1, count):
            raise PushforwardError(
                f"For {many(count, 'image')} give as many labels or prompts, or one; got {self.bound.conditions}."
            )
        return self.bound.to(self._place)

    def some(self, which: slice | Tensor) -> Self:
        """The same map for some of the images, under their conditions; a single condition is every image's."""
        which = which.cpu() if isinstance(which, Tensor) else which
        labels = self.labels if isinstance(self.labels, Unsaid) else take_labels(self.labels, which)
        bound = None if self._known is None else self._known.some(which)
        return self._changed(bound, model=self.model.some(which), labels=labels)

    def around(self, change: Callable[[Denoiser], Denoiser]) -> Self:
        """The same map with other answers of its network, under the same condition."""
        model, bound = (replace(one, denoiser=change(one.denoiser)) for one in (self.model, self.bound))
        return self._changed(bound, model=model)

    @property
    def _known(self) -> Model | None:
        """The model under its condition, if it has been needed yet."""
        return vars(self).get("bound")

    def _changed(self, bound: Model | None, **fields: Any) -> Self:
        """The map with other fields, and with what `bound` makes of them, if that is known: texts are encoded once."""
        there = replace(self, **fields)
        if bound is not None:
            vars(there)["bound"] = bound
        return there

    def draw(self, count: int, *, seed: int = 0, first: int | Sequence[int] = 0) -> Code:
        """The codes of the images of `sample`, `count` of them, where the network is.

        Args:
            count: how many.
            seed: seed of all; image i's code depends on the seed and its number alone.
            first: number of the first image, or the number of each.

        Raises:
            PushforwardError: a count below 1, or other numbers than whole ones, one for each image.
        """
        (count,) = whole_numbers("Counts of images", count)
        if count < 1:
            raise PushforwardError(f"Draw at least 1 code; got {count}.")
        stream = GaussianStream(seed, numbered(first, count), self.model.state_shape(1)[1:])
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
        return self.device or self.model.device

    def _check_code(self, code: Code) -> None:
        if not isinstance(code, Code):
            raise PushforwardError(f"A code is what `draw`, `invert` or `encode` give; got {type(code).__name__}.")
        wanted = self.model.state_shape(len(code))
        shapes = {_shape(x) for x in (code.start, code.end, code.residual) if x is not None}
        shapes |= set() if code.noises is None else {_shape(code.noises)[1:]}
        if shapes != {wanted} or not len(code):
            raise PushforwardError(
                f"Codes of {self.model.name!r} have shape {wanted[1:]} after the count of images, 1 or more; got "
                f"{' and '.join(map(str, shapes))}."
            )
        given = 0 if code.noises is None else len(code.noises)
        if given != self.noises:
            raise PushforwardError(
                f"The plan takes {self.noises} noises, the code has {given}; decode it with the plan that it was made "
                "by."
            )

    def _batches(self, count: int, seed: int, first: int, batch: int) -> Iterator[tuple[Self, Tensor, GaussianStream]]:
        """The map, terminal states and noises of each batch of samples, with all checked before the first."""
        pieces = batches(count, batch)
        check_images(count, self.model.image_shape or self.model.shape)
        there = self.in_turn(count, first)
        there.model_for(count)
        for some in pieces:
            numbers = range(first + some.start, first + some.stop)
            stream = GaussianStream(seed, numbers, self.model.state_shape(1)[1:])
            yield there.some(some), self.start(stream.draw()), stream


def _shape(part: object) -> tuple[Any, ...]:
    return tuple(part.shape) if isinstance(part, Tensor) else (type(part).__name__,)
