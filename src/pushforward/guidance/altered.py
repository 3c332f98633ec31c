"""A denoiser that changes the answers of another, which are all that a plan sees of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from pushforward.denoiser import Ask, Wrapper
from pushforward.execute.host import undisturbed
from pushforward.linear import Process

__all__ = ["Altered", "Change"]

# (the network's own answer to some states; which times; states; which images) -> the answer instead
Change = Callable[[Callable[[Tensor], Tensor], int | Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Altered(Wrapper):
    """A denoiser that changes the answers of another.

    Args:
        inner: the denoiser whose answers are changed.
        change: function `(process, times, like, trained) -> Change`, called once for a list of times, as `Denoiser.at`
            is; `trained` says whether gradients may be wanted in the network's weights or its condition.
    """

    change: Callable[[Process, Tensor, Tensor, bool], Change]

    @undisturbed
    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.inner.at(process, times, like)
        weights = [*self.module.parameters()] if isinstance(self.module, nn.Module) else []
        told = [] if self.condition is None else [self.condition]
        change = self.change(process, times, like, any(x.requires_grad for x in [*weights, *told]))

        @undisturbed  # changes take gradients
        def altered(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            return change(lambda states: ask(k, states, of), k, u, of)

        return altered
