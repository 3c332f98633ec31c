"""A denoiser that changes the answers of another, which are all that a plan sees of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.execute.host import undisturbed
from pushforward.linear import Process
from pushforward.model.network import Around

__all__ = ["Altered", "Change"]

# (the network's own answer to some states; which times; states; which images) -> the answer instead
Change = Callable[[Callable[[Tensor], Tensor], int | Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Altered(Around):
    """A denoiser that changes the answers of another.

    Args:
        inner: the denoiser whose answers are changed.
        change: function `(process, times, like, trained) -> Change`, called once for a list of times, as `Denoiser.at`
            is; `trained` says whether gradients may be wanted in the network's weights or its condition.
    """

    inner: Denoiser
    change: Callable[[Process, Tensor, Tensor, bool], Change]

    def around(self, inner: Denoiser) -> Altered:
        """Return the denoiser that makes the same change to the answers of `inner`."""
        return replace(self, inner=inner)

    @undisturbed
    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.inner.at(process, times, like)
        weights = [] if self.module is None else [*self.module.parameters()]
        told = [] if self.condition is None else [self.condition]
        change = self.change(process, times, like, any(x.requires_grad for x in [*weights, *told]))

        @undisturbed  # changes take gradients
        def altered(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            return change(lambda states: ask(k, states, of), k, u, of)

        return altered
