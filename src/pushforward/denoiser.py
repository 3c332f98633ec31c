"""Denoisers: all that an executor needs from a model, the *denoised state* at a node.

`Denoiser` is that interface. A neural network (`model.network.Network`) or a formula (`Function`) implements it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.linear import Process

__all__ = ["Ask", "Denoiser", "Function", "Priced", "Watched", "Wrapper", "at_least_float32", "check_output"]


class Ask(Protocol):
    """A denoiser prepared for a list of times."""

    def __call__(self, k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
        """Return the denoised states `E[u_0 | u_t = u]`, shaped like `u`.

        Args:
            k: index of the time, one for all rows or one per row, `(rows,)`.
            u: states `(rows, k * channels, *field)`.
            of: index of the image that each row belongs to, `(rows,)`, which selects its condition; by default row i
                belongs to image i.
        """


@runtime_checkable
class Denoiser(Protocol):
    """The pointwise part of a diffusion model."""

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """Prepare once for `times (n,)`; see `Ask`.

        Args:
            process: the diffusion that the states follow.
            times: the times, float64, on the CPU.
            like: a state `(batch, k * channels, *field)` with the dtype and device that the states will have.
        """


@dataclass(frozen=True)
class Wrapper(ABC):
    """A denoiser that changes the answers of another, or looks at them; it shows the network in that as its own.

    Args:
        inner: the other.
    """

    inner: Denoiser

    @property
    def module(self) -> Any:
        """The network itself, if there is one."""
        return getattr(self.inner, "module", None)

    @property
    def condition(self) -> Tensor | None:
        """The condition that the network gets."""
        found: Tensor | None = getattr(self.inner, "condition", None)
        return found

    def around(self, inner: Denoiser) -> Self:
        """Return the wrapper that does the same to the answers of `inner`."""
        return replace(self, inner=inner)

    @abstractmethod
    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""


@runtime_checkable
class Priced(Denoiser, Protocol):
    """A denoiser that says what the duration of its calls depends on, so that it is not measured twice."""

    def price(self) -> dict[str, object] | None:
        """Return plain values, the same for denoisers whose calls take equally long, or `None` if unknown."""


@dataclass(frozen=True)
class Watched(Wrapper):
    """A denoiser of which `watch(u, answer, times=times, k=k, of=of)` is told after every call (see `Ask`)."""

    watch: Callable[..., None]

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.inner.at(process, times, like)

        def watched(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            answer = ask(k, u, of)
            self.watch(u, answer, times=times, k=k, of=of)
            return answer

        return watched


@dataclass(frozen=True)
class Function:
    """A denoiser given by a formula `(u, t) -> E[u_0 | u_t = u]`, with `t` a number."""

    denoise: Callable[[Tensor, float], Tensor]

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:  # noqa: ARG002 - the protocol's arguments
        """See `Denoiser`."""

        def ask(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:  # noqa: ARG001
            if not isinstance(k, Tensor):
                return self._checked(u.clone(), float(times[k]))
            k = k.expand(len(u))
            answers, order = [], []
            for one in k.unique().tolist():
                rows = (k == one).nonzero()[:, 0]
                answers.append(self._checked(u[rows], float(times[one])))
                order.append(rows)
            return torch.cat(answers)[torch.cat(order).argsort()]

        return ask

    def _checked(self, u: Tensor, t: float) -> Tensor:
        shape = u.shape
        return check_output("The formula of a denoiser", self.denoise(u, t), shape)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what is worked out beside a network of this dtype: 16 bits are too coarse to add up in."""
    return torch.promote_types(dtype, torch.float32)


def check_output(what: str, output: object, shape: tuple[int, ...], *, learned_variance: bool = False) -> Tensor:
    """Return a network's output, after checking that it is a real tensor of exactly this shape.

    Args:
        what: name of the network, for the message.
        output: what the network returned.
        shape: the shape wanted, `(rows, channels, *field)`.
        learned_variance: whether twice as many channels are allowed.

    Raises:
        PushforwardError: the output is not a real tensor, or has another shape.
    """
    wanted = f"return one real tensor of shape {tuple(shape)}"
    if not isinstance(output, Tensor):
        raise PushforwardError(
            f"{what} returned a {type(output).__name__}; {wanted}, for instance by a function that picks it out."
        )
    double = (shape[0], 2 * shape[1], *shape[2:])
    if tuple(output.shape) not in ((tuple(shape), double) if learned_variance else (tuple(shape),)):
        raise PushforwardError(f"{what} returned shape {tuple(output.shape)} for {many(shape[0], 'state')}; {wanted}.")
    if not output.is_floating_point():
        raise PushforwardError(f"{what} returned {str(output.dtype).removeprefix('torch.')} numbers; {wanted}.")
    return output
