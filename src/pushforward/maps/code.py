"""Codes: the Gaussian variables behind images, and the streams that they are drawn from.

>>> code = Code(torch.zeros(2, 1, 4, 4), noises=torch.zeros(3, 2, 1, 4, 4))  # two images by three noisy steps
>>> code.variables().shape
torch.Size([2, 64])
>>> code[:1]
Code(1 of start 1x4x4, 3 noises)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index as whole

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.data.words import many
from pushforward.denoiser import at_least_float32
from pushforward.errors import PushforwardError

__all__ = ["Code", "GaussianStream", "batches", "derive_seed", "numbered", "whole_numbers"]

_STREAM = 5200  # bytes of a random stream


@dataclass(frozen=True)
class Code:
    """The Gaussian variables behind a batch of images.

    Args:
        start: start of the terminal state, `(count, k * channels, *field)`.
        noises: noises of a stochastic plan, `(noises, count, k * channels, *field)`.
        end: noise on the last state of a plan that ends above time 0, `(count, k * channels, *field)`; `None`: none.
        residual: what the clean image has more than the last state of a plan whose last step takes no noise, in the
            units of the image, `(count, k * channels, *field)`; `None`: nothing.
    """

    start: Tensor
    noises: Tensor | None = None
    end: Tensor | None = None
    residual: Tensor | None = None

    def __len__(self) -> int:
        return len(self.start)

    def __repr__(self) -> str:
        """Show how many codes there are, of what shape, and what they have besides the start."""
        noises = [] if self.noises is None else [f"{len(self.noises)} noises"]
        left = [name for name in ("end", "residual") if getattr(self, name) is not None]
        start = f"start {'x'.join(map(str, self.start.shape[1:]))}"
        return f"Code({len(self)} of {', '.join([start, *noises, *left])})"

    def __getitem__(self, some: slice | Tensor | list[int]) -> Code:
        """The codes of some of the images."""
        noises = None if self.noises is None else self.noises[:, some]
        start, end, residual = (None if x is None else x[some] for x in (self.start, self.end, self.residual))
        assert start is not None
        return Code(start, noises, end, residual)

    def to(self, like: Tensor) -> Code:
        """The code on the device and in the dtype of a tensor."""
        parts = (None if x is None else x.to(like) for x in (self.start, self.noises, self.end, self.residual))
        return Code(*parts)  # type: ignore[arg-type]

    def replay(self, like: Tensor) -> Callable[[int], Tensor]:
        """The noises one after another, as executors ask for them, where `like` is and in its dtype."""
        noises = iter(() if self.noises is None else self.noises)
        return lambda _: next(noises).to(like)

    def variables(self) -> Tensor:
        """The Gaussian variables that the image is made of, `(count, numbers)`: the start's, then the noises'."""
        parts = [self.start.flatten(1)]
        if self.noises is not None:
            parts.append(self.noises.movedim(1, 0).flatten(1))
        return torch.cat(parts, 1)

    def with_variables(self, x: Tensor) -> Code:
        """The code with other variables `x (count, numbers)`, as `variables` gives them; the rest stays."""
        size, shape = self.start[0].numel(), self.start.shape
        start, noises = x[:, :size].reshape(shape), None
        if self.noises is not None:
            noises = x[:, size:].reshape(shape[0], len(self.noises), *shape[1:]).movedim(0, 1)
        return replace(self, start=start, noises=noises)

    @staticmethod
    def cat(codes: Sequence[Code]) -> Code:
        """The codes of several batches as one, on the CPU."""

        def together(name: str, along: int = 0) -> Tensor | None:
            parts = [value.cpu() for code in codes if (value := getattr(code, name)) is not None]
            return torch.cat(parts, along) if parts else None

        start = together("start")
        assert start is not None
        return Code(start, together("noises", 1), together("end"), together("residual"))


class GaussianStream:
    """Gaussian variables of a batch of images, drawn when asked for.

    Every image has a random stream of its own, made from the seed and the image's index, so that image i is the same
    whatever the batch it is drawn in.

    Args:
        seed: seed of all.
        indices: indices of the images, any numbers.
        shape: of one variable, `(k * channels, *field)`.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]):
        check_memory(len(indices) * (_STREAM + 4 * math.prod(shape)), f"The codes of {len(indices):,} images")
        self._streams = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]
        self._shape = shape

    def draw(self, some: Sequence[int] | None = None) -> Tensor:
        """The next variable of every image, `(images, *shape)`: the terminal state's, then the noises' in order.

        Args:
            some: places of the images that are drawn for; all by default. The others' streams stand still.
        """
        streams = self._streams if some is None else [self._streams[k] for k in some]
        return torch.stack([
            torch.randn(self._shape, generator=g, dtype=torch.float32, device="cpu") for g in streams
        ])  # fmt: skip

    def code(self, noises: int, like: Tensor) -> Code:
        """The next variables as codes of a start and so many noises, where `like` is and in its dtype or better."""
        dtype = at_least_float32(like.dtype)
        start, *rest = (self.draw().to(like.device, dtype) for _ in range(1 + noises))
        return Code(start, torch.stack(rest) if rest else None)

    def noise(self, node: int) -> Tensor:  # noqa: ARG002 - executors ask node after node
        """The next variable, as executors ask for it."""
        return self.draw()


def numbered(first: int | Sequence[int], count: int) -> Sequence[int]:
    """The number of each image."""
    if not isinstance(first, Sequence) or isinstance(first, str):
        (first,) = whole_numbers("Numbers of images", first)
    numbers = range(first, first + count) if isinstance(first, int) else first
    if len(numbers) != count:
        raise PushforwardError(f"For {many(count, 'image')} give as many numbers; got {len(numbers)}.")
    return numbers


def batches(count: int, batch: int) -> Iterator[slice]:
    """The images of each batch.

    Raises:
        PushforwardError: no image, or none at a time.
    """
    count, batch = whole_numbers("Counts of images and batches", count, batch)
    if count < 1 or batch < 1:
        raise PushforwardError(f"There must be an image or code, and a batch of at least 1; got {count} and {batch}.")
    return (slice(begin, min(begin + batch, count)) for begin in range(0, count, batch))


def whole_numbers(what: str, *values: object) -> list[int]:
    """Whole numbers of any library as Python's.

    Args:
        what: they are, for the message.
        values: the numbers.

    Raises:
        PushforwardError: one of them is no whole number.
    """
    try:
        return [whole(value) for value in values]  # type: ignore[arg-type]
    except TypeError:
        raise PushforwardError(f"{what} are whole numbers; got {' and '.join(map(repr, values))}.") from None


def derive_seed(seed: int, index: int) -> int:
    """One 63-bit seed from two numbers (the finaliser of SplitMix64).

    Raises:
        PushforwardError: one of them is no whole number.
    """
    seed, index = whole_numbers("Seeds and numbers of images", seed, index)
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
