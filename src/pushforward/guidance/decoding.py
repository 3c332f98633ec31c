"""Decoding again and again, with gradients, the network evaluations of each image counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.execute import Exact
from pushforward.linear import Process
from pushforward.maps.base import ModelMap
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.generator import Generator
from pushforward.maps.protocol import Pushforward

__all__ = ["Counted"]


@dataclass(frozen=True, eq=False)
class Counted:
    """A map, and how often its network was asked about each image.

    A diffusion for which no way of differentiating was chosen takes `Exact`, with the memory of one network call.

    Args:
        pushforward: the map.
        nfe: network evaluations of each image so far, `(count,)`, added to in place; a vector-Jacobian product counts
            as one, and a decoding of what is no diffusion as one, whether differentiated or not.
    """

    pushforward: Pushforward
    nfe: Tensor

    @classmethod
    def of(cls, pushforward: Pushforward, count: int) -> Counted:
        """None so far, of `count` images.

        Raises:
            PushforwardError: the map is bound to labels of another number of images.
        """
        place = pushforward.draw(1).start.device
        if isinstance(pushforward, ModelMap | Generator):
            pushforward.told(count)
        if isinstance(pushforward, Diffusion) and pushforward.gradient is None:
            pushforward = pushforward.run_by(gradient=Exact())
        return cls(pushforward, torch.zeros(count, dtype=torch.long, device=place))

    def some(self, which: Tensor) -> Pushforward:
        """The map of images `which (n,)`, whose evaluations are counted as long as it is a diffusion."""
        there = self.pushforward.some(which)
        if not isinstance(there, Diffusion):
            return there
        return there.around(lambda denoiser: _Denoiser(denoiser, self.nfe, which))

    def decode(self, code: Code, which: Tensor) -> Tensor:
        """The images numbered `which (n,)`, whose codes these are, `(n, channels, height, width)`."""
        there = self.some(which)
        if not isinstance(there, Diffusion):
            self.nfe.index_add_(0, which, torch.ones_like(which))
        return there.decode(code)


@dataclass(frozen=True)
class _Denoiser:
    """A denoiser that adds the rows it is asked about to those of the images `some` in `nfe`."""

    inner: Denoiser
    nfe: Tensor
    some: Tensor

    def around(self, inner: Denoiser) -> _Denoiser:
        """The same count of another denoiser's rows."""
        return replace(self, inner=inner)

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.inner.at(process, times, like)

        def counted(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            rows = self.some if of is None else self.some[of]
            self.nfe.index_add_(0, rows, torch.ones_like(rows))
            return ask(k, u, of)

        return counted
