"""What was found for images: codes, and the map that decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pushforward.maps.code import Code
from pushforward.maps.protocol import Pushforward

__all__ = ["Encoding", "Inversion", "Record"]


@dataclass(frozen=True, eq=False)
class Encoding:
    """Codes drawn for images.

    Args:
        code: the codes.
        pushforward: the map that decodes them to the images.
        rounds: batched network calls on the critical path.
        nfe: network evaluations of each image.
    """

    code: Code
    pushforward: Pushforward
    rounds: int
    nfe: int

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The images again, `(count, channels, height, width)`; for gradients, decode by `pushforward`."""
        return self.pushforward.decode(self.code)


@dataclass(frozen=True)
class Record:
    """What is known after a step of optimisation.

    Args:
        step: steps so far; 0 is the beginning.
        loss: loss of each image at the code tried in this step, or, for an image that is done, its least, `(count,)`.
        nfe: network evaluations of each image so far, `(count,)`; a vector-Jacobian product counts as one.
        seconds: so far.
    """

    step: int
    loss: Tensor
    nfe: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class Inversion:
    """Codes found behind images.

    Args:
        code: the codes.
        pushforward: the map that decodes them to the images, or to what is nearest to them.
        rounds: batched network calls on the critical path that found the codes; of optimisation, its decodings.
        decoding: network calls, one after another, of decoding them to see how near they lead.
        nfe: network evaluations of each image, both kinds together, `(count,)`.
        residual: greatest error of each image when its code is decoded step by step, as measured, `(count,)`; of a
            latent diffusion inverted exactly, in its latents; of optimisation, the root of the loss, which is not less.
        loss: of optimised codes, the sum of squares over the values of each image, `(count,)`.
        history: of optimisation, a record a step, the beginning's first.
    """

    code: Code
    pushforward: Pushforward
    rounds: int
    decoding: int
    nfe: Tensor = field(repr=False)
    residual: Tensor = field(repr=False)
    loss: Tensor | None = field(default=None, repr=False)
    history: tuple[Record, ...] = field(default=(), repr=False)

    @staticmethod
    def cat(parts: Sequence[Inversion], pushforward: Pushforward) -> Inversion:
        """Those of several batches as one, of the map that decodes all of them."""
        losses = [one.loss for one in parts if one.loss is not None]
        return Inversion(
            Code.cat([one.code for one in parts]),
            pushforward,
            rounds=sum(one.rounds for one in parts),
            decoding=sum(one.decoding for one in parts),
            nfe=torch.cat([one.nfe.cpu() for one in parts]),
            residual=torch.cat([one.residual.cpu() for one in parts]),
            loss=torch.cat(losses) if losses else None,
        )

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The images again, `(count, channels, height, width)`; for gradients, decode by `pushforward`."""
        return self.pushforward.decode(self.code)
