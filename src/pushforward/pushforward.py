"""Maps from Gaussian codes to images.

A `Pushforward` decodes codes of standard normal variables into images. `Diffusion` is a model with a plan: its code is
the terminal state, in units of the marginal's root, and the noises of a stochastic plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Adaptive, Progress, run
from pushforward.linear import root
from pushforward.model import Model
from pushforward.plan import Plan


@runtime_checkable
class Pushforward(Protocol):
    """A map from Gaussian codes to images in [-1, 1]."""

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """`count` images `(count, channels, height, width)`."""


class Code:
    """The Gaussian variables behind a batch of images, drawn when asked for.

    Every image has a random stream of its own, made from the seed and the image's index, so that image i is the same
    whatever the batch it is drawn in.

    Args:
        seed: of all.
        indices: of the images.
        shape: of one variable, `(k * channels, *field)`.
    """

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...]):
        self._streams = [torch.Generator().manual_seed(_mixed(seed, i)) for i in indices]
        self._shape = shape

    def draw(self) -> Tensor:
        """The next variable of every image, `(images, *shape)`: the terminal state's, then the noises' in order."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._streams])


@dataclass(frozen=True)
class Diffusion:
    """A diffusion model with the plan it is sampled by.

    Args:
        model: network and process.
        plan: any solver's, or `Adaptive` steps.
        dtype: of the states.
        device: of the states; by default the network's.
    """

    model: Model
    plan: Plan | Adaptive
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.plan.process != self.model.process:
            msg = (
                f"The plan is for process {self.plan.process.name!r}, model {self.model.name!r} for another: "
                f"{self.model.process.name!r}, or the same with other parameters."
            )
            raise PushforwardError(msg)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        batch: int = 64,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """`count` images in [-1, 1], `(count, channels, height, width)`, on the CPU.

        Args:
            count: how many.
            seed: of the codes; image i depends on the seed and i alone.
            labels: classes, `(count,)`, for a model that has them.
            guidance: weight of classifier-free guidance; 1 is plain.
            batch: images at a time.
            callback: told after every network call.
        """
        return torch.cat(list(self.batches(count, seed, labels, guidance, batch, callback)))

    @torch.no_grad()
    def batches(
        self,
        count: int,
        seed: int = 0,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        batch: int = 64,
        callback: Callable[[Progress], None] | None = None,
    ) -> Iterator[Tensor]:
        """As `sample`, batch after batch."""
        if count < 1 or batch < 1:
            msg = f"Sampling needs a count and a batch of at least 1; got {count} and {batch}."
            raise PushforwardError(msg)
        labels = None if labels is None else torch.as_tensor(labels)
        self.model.to(self._device).given(labels, guidance)  # refused before any work is done
        if labels is not None and len(labels) != count:
            msg = f"{count} images need as many labels; got {len(labels)}."
            raise PushforwardError(msg)
        for first in range(0, count, batch):
            indices = range(first, min(first + batch, count))
            chosen = None if labels is None else labels[indices.start : indices.stop]
            code = Code(seed, indices, self.model.state_shape(1)[1:])
            yield self.decode(code, self.model.given(chosen, guidance), callback).float().cpu()

    def decode(
        self, code: Code, model: Model | None = None, callback: Callable[[Progress], None] | None = None
    ) -> Tensor:
        """The images behind a code."""
        model = model or self.model
        start = self.start(code.draw())
        if isinstance(self.plan, Adaptive):
            return model.images(self.plan.run(model.denoiser, start, callback))
        final = run(self.plan, model.denoiser, start, noise=lambda _: code.draw().to(start), callback=callback)
        return model.images(final)

    @property
    def _device(self) -> torch.device | str:
        parameters = () if self.model.module is None else self.model.module.parameters()
        return self.device or next((p.device for p in parameters), torch.device("cpu"))

    def start(self, z: Tensor) -> Tensor:
        """The terminal state whose code is `z (batch, k * channels, *field)`: `Psi m + R z`."""
        time = self.plan.times[:1]
        reference, process = self.model.reference, self.model.process
        z = z.to(device=self._device, dtype=self.dtype)
        state = root(process, time, reference)[0](z)
        if isinstance(reference.mean, Tensor) or reference.mean:
            image = torch.as_tensor(reference.mean).to(z) + torch.zeros_like(process.image(z))
            state = state + process.transition(time, torch.zeros_like(time))[0](process.lift(image))
        return state


def _mixed(seed: int, index: int) -> int:
    """One 63-bit seed from two numbers (the finaliser of SplitMix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
