"""A diffusion model followed with adaptive steps: the reference that needs no plan, and the slowest way to sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import Progress, adaptive
from pushforward.maps.base import ModelMap
from pushforward.maps.code import Code
from pushforward.model import Model

__all__ = ["AdaptiveDiffusion"]


@dataclass(frozen=True, eq=False)
class AdaptiveDiffusion(ModelMap):
    """A diffusion model whose flow is followed to `t_min` with adaptive steps, and the denoised state there.

    It has no gradient, no inverse and no noises, and its steps cannot be taken at once: for those, `Diffusion`, whose
    `plan` and `parallel` are `None` here.

    Args:
        model: network and process.
        tolerance: error allowed in a step, absolute and relative.
        dtype: dtype of the states.
        device: device of the states; by default the network's.
        labels: see `given`.
        guidance: see `given`.
    """

    tolerance: float = 1e-5
    plan: ClassVar[None] = None
    parallel: ClassVar[None] = None

    def __repr__(self) -> str:
        return f"AdaptiveDiffusion({self.model.name}, tolerance={self.tolerance:g})"

    @property
    def times(self) -> Tensor:
        """First and last time, `(2,)`."""
        return torch.tensor([self.model.process.t_max, self.model.process.t_min], dtype=torch.float64, device="cpu")

    @property
    def noises(self) -> int:
        """Noises of a code: none."""
        return 0

    @property
    def settings(self) -> Mapping[str, object]:
        """Its tolerance."""
        return {"tolerance": self.tolerance}

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int = 64,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """`count` images in [-1, 1], `(count, channels, height, width)`, on the CPU; as `Diffusion.sample`."""
        pieces = self._batches(count, seed, first, batch)
        made = (there._followed(there.model_for(len(start)), start, callback) for there, start, _ in pieces)
        return torch.cat([images.float().cpu() for images in made])

    def decode(self, code: Code, *, callback: Callable[[Progress], None] | None = None) -> Tensor:
        """The images behind a code, `(count, channels, height, width)`, where the network is.

        Args:
            code: a start alone.
            callback: told after every network call.

        Raises:
            PushforwardError: a code of more than a start, or one that requires a gradient.
        """
        self._check_code(code)
        if code.end is not None or code.residual is not None:
            raise PushforwardError("Adaptive steps leave nothing on the last state, as this code does; name a solver.")
        if torch.is_grad_enabled() and code.start.requires_grad:
            raise PushforwardError("Adaptive steps have no gradient; name a solver, e.g. ddim.")
        return self._followed(self.model_for(len(code)), self.start(code.start), callback)

    def _followed(self, model: Model, start: Tensor, callback: Callable[[Progress], None] | None) -> Tensor:
        """The images that terminal states flow to."""
        process, last = model.process, self.times[1:]
        state, calls = adaptive(
            process, model.denoiser, start, rtol=self.tolerance, atol=self.tolerance, callback=callback
        )
        answer = model.denoiser.at(process, last, state)(0, state)
        if callback is not None:
            callback(Progress(calls + 1, 0, float(last), state, answer, len(state)))
        return model.images(answer)
