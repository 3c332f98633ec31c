"""Decoding again and again, with gradients, under the conditions of each image, network evaluations counted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute import Exact, Gradient, Implicit, Parallel, Phantom
from pushforward.linear import Process
from pushforward.maps.code import Code
from pushforward.maps.diffusion import Diffusion
from pushforward.maps.labels import Labels, listed, take_labels
from pushforward.maps.protocol import Pushforward
from pushforward.model import Model

__all__ = ["Decoding"]

_EXACT = Exact()


@dataclass(frozen=True)
class _Counted:
    """A denoiser that adds the rows it is asked about to those of the images `some` in `nfe`.

    A gradient's vector-Jacobian product asks once, and so counts as one.
    """

    denoiser: Denoiser
    nfe: Tensor
    some: Tensor

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        ask = self.denoiser.at(process, times, like)

        def counted(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            rows = self.some if of is None else self.some[of]
            self.nfe.index_add_(0, rows, torch.ones_like(rows))
            return ask(k, u, of)

        return counted


@dataclass(frozen=True, eq=False)
class Decoding:
    """What makes images of codes, image by image under its own label.

    Args:
        pushforward: a diffusion, or another map.
        labels: classes or prompts of all images, `None` for none.
        guidance: weight of classifier-free guidance, of a diffusion.
        gradient: how a diffusion is differentiated (see `execute.adjoint`).
        parallel: run all steps of a diffusion at once, so.
        nfe: network evaluations of each image so far, `(count,)`, added to in place; a vector-Jacobian product counts
            as one, and a decoding of what is no diffusion as one, whether differentiated or not.
    """

    pushforward: Pushforward
    labels: Labels
    guidance: float
    gradient: Gradient
    parallel: Parallel | None
    nfe: Tensor
    _told: dict[tuple[int, ...], Model] = field(default_factory=dict, repr=False)

    @classmethod
    def make(
        cls,
        pushforward: Pushforward,
        count: int,
        labels: Labels = None,
        guidance: float = 1.0,
        gradient: Gradient = _EXACT,
        parallel: Parallel | None = None,
    ) -> Decoding:
        """The decoding of `count` images, on the network's device.

        Raises:
            PushforwardError: another number of labels, or guidance of what takes none.
        """
        labels = listed(labels)
        if labels is not None and len(labels) not in (1, count):
            raise PushforwardError(f"{count} images need as many labels; got {len(labels)}.")
        device = torch.device("cpu")
        if isinstance(pushforward, Diffusion):
            model = pushforward.model
            device = pushforward.start(torch.zeros(model.state_shape(1))).device
            pushforward = replace(pushforward, model=model.to(device), device=device)
            if isinstance(gradient, Implicit | Phantom) and gradient.reference is None:
                # The same one every time, so that its linear system is made once.
                gradient = replace(gradient, reference=model.gaussian.tempered())
        elif guidance != 1 or parallel is not None:
            raise PushforwardError("Guidance by labels and parallel steps are for diffusion models; leave them out.")
        else:
            device = pushforward.draw(1).start.device
        nfe = torch.zeros(count, dtype=torch.long, device=device)
        return cls(pushforward, labels, guidance, gradient, parallel, nfe)

    @property
    def device(self) -> torch.device:
        """Where the codes and images are."""
        return self.nfe.device

    def of(self, some: Tensor) -> Diffusion:
        """The diffusion under the labels of images `some (n,)`, its network evaluations counted for them."""
        assert isinstance(self.pushforward, Diffusion)
        if isinstance(self.labels, Tensor):
            model = self.pushforward.model.given(take_labels(self.labels, some.cpu()), self.guidance)
        else:  # prompts, the negative one too, are encoded once a batch
            own = self.labels is not None or self.pushforward.model.conditions > 1
            key = tuple(some.tolist()) if own else ()
            if key not in self._told:
                while self._told and sum(map(len, self._told)) + len(key) > 2 * len(self.nfe):
                    self._told.pop(next(iter(self._told)))  # of images that are done
                told = take_labels(self.labels, some.cpu())
                self._told[key] = self.pushforward.model.some(some.cpu()).given(told, self.guidance)
            model = self._told[key]
        counted = replace(model, denoiser=_Counted(model.denoiser, self.nfe, some), text=None)  # it has been told
        return replace(self.pushforward, model=counted)

    def __call__(self, code: Code, some: Tensor) -> Tensor:
        """The images numbered `some (n,)`, whose codes these are, `(n, channels, height, width)`."""
        if isinstance(self.pushforward, Diffusion):
            return self.of(some).decode(code, gradient=self.gradient, parallel=self.parallel)
        self.nfe.index_add_(0, some, torch.ones_like(some))
        return self.pushforward.decode(code, None if self.labels is None else take_labels(self.labels, some.cpu()))
