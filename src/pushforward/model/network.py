"""Networks: callables `(u, t, condition) -> prediction`, turned into denoisers.

An executor needs one thing of a model: the *denoised state* at a node. `Denoiser` is that seam; `Network` fills it
with a neural network, `Function` with a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pushforward.linear import POINT, Gaussian, Operator, Process, apply_coefficients
from pushforward.model.prediction import Prediction, denoising, is_image

Ask = Callable[[int, Tensor], Tensor]


@runtime_checkable
class Denoiser(Protocol):
    """The pointwise part of a diffusion model."""

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """Prepare for `times (n,)` once; the result maps `(k, u)` to `E[u_0 | u_t = u]` at time k.

        Args:
            process: the diffusion that `u` follows.
            times: float64, on the CPU.
            like: a state `(batch, k * channels, *field)` whose dtype and device the states will have.
        """


@dataclass(frozen=True)
class Function:
    """A denoiser given by a formula `(u, t) -> E[u_0 | u_t = u]`, with `t` a number."""

    denoise: Callable[[Tensor, float], Tensor]

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:  # noqa: ARG002 - the protocol's arguments
        """See `Denoiser`."""
        return lambda k, u: self.denoise(u, float(times[k]))


@dataclass(frozen=True)
class Network:
    """A neural network as a denoiser.

    Args:
        module: `(u, t, condition) -> prediction`, with `t (batch,)` already in the network's own units.
        prediction: what comes out.
        time_scale, time_shift: the network's time is `time_scale * t + time_shift`.
        clock: if given, the network's time is `clock(t)` instead, of float64 times `(n,)`.
        reference: of the `residual` prediction.
        input_reference: if given, `u` is divided by the marginal standard deviation of these data (EDM's `c_in`).
        condition: labels `(batch,)` or embeddings `(batch, ...)`, passed on.
        unconditional: the condition that says nothing; needed for guidance.
        guidance: weight of classifier-free guidance, `p_0 + guidance (p - p_0)`; 1 is plain.
        clip: clamp the denoised image to `[-clip, clip]`.
        threshold: dynamic thresholding: clamp to this quantile of the image's absolute values, if above `clip`
            (default 1), and divide by it.
        threshold_max: the quantile counts as no more than this.
        autocast: run the module in this dtype.
        max_batch: split larger batches.

    References:
        Classifier-Free Diffusion Guidance, Ho & Salimans, arXiv 2207.12598, eq. 6;
        dynamic thresholding: Imagen, Saharia et al., arXiv 2205.11487, section 2.3.
    """

    module: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    prediction: Prediction = "epsilon"
    time_scale: float = 1.0
    time_shift: float = 0.0
    clock: Callable[[Tensor], Tensor] | None = None
    reference: Gaussian = POINT
    input_reference: Gaussian | None = None
    condition: Tensor | None = None
    unconditional: Tensor | None = None
    guidance: float = 1.0
    clip: float | None = None
    threshold: float | None = None
    threshold_max: float = math.inf
    autocast: torch.dtype | None = None
    max_batch: int | None = None

    def given(self, condition: Tensor | None, guidance: float = 1.0) -> Network:
        """This network under a condition."""
        return replace(self, condition=condition, guidance=guidance)

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        pair = denoising(process, self.prediction, times, self.reference)
        on_state, on_prediction = (_Prepared(operators, like) for operators in pair)
        scale = None
        if self.input_reference is not None:
            covariance = self.input_reference.covariance(process, times)
            scale = _Prepared(inverse_deviation(covariance), like)
        own = self.time_scale * times + self.time_shift if self.clock is None else self.clock(times)
        clock = own.to(like.device, torch.float32)

        def ask(k: int, u: Tensor) -> Tensor:
            prediction = self._predict(u if scale is None else scale(k, u), clock[k]).to(u.dtype)
            if is_image(self.prediction):
                prediction = process.lift(prediction)
            denoised = on_state(k, u) + on_prediction(k, prediction)
            return denoised if self.clip is None and self.threshold is None else self._bounded(process, denoised)

        return ask

    def _predict(self, u: Tensor, t: Tensor) -> Tensor:
        with self._precision(u):
            pieces = u.split(self.max_batch or len(u))
            conditions = _split(self.condition, len(u), self.max_batch)
            return torch.cat([self._guided(p, t, c) for p, c in zip(pieces, conditions, strict=True)])

    def _guided(self, u: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if self.guidance == 1 or condition is None or self.unconditional is None:
            return self.module(u, t.expand(len(u)), condition)
        nothing = self.unconditional.to(condition).expand_as(condition)
        both = self.module(torch.cat([u, u]), t.expand(2 * len(u)), torch.cat([nothing, condition]))
        plain, conditional = both.chunk(2)
        return torch.lerp(plain, conditional, self.guidance)

    def _precision(self, u: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(u.device.type, self.autocast)

    def _bounded(self, process: Process, denoised: Tensor) -> Tensor:
        image = process.image(denoised)
        rest = denoised[:, image.shape[1] :]
        bound = self.clip if self.clip is not None else 1.0
        if self.threshold is None:
            image = image.clamp(-bound, bound)
        else:
            values = image.flatten(1).abs().to(torch.promote_types(image.dtype, torch.float32))
            s = torch.quantile(values, self.threshold, 1).clamp(bound, self.threshold_max)
            s = s.to(image).view(-1, *[1] * (image.ndim - 1))
            image = bound * torch.minimum(torch.maximum(image, -s), s) / s
        return torch.cat([image, rest], 1) if rest.shape[1] else image


class _Prepared:
    """A batch of operators cast once, applied one at a time to states in pixels."""

    def __init__(self, operators: Operator, like: Tensor):
        self.basis = operators.basis
        self.single = operators.blocks == 1 and not operators.basis.shape
        self.numbers = operators.coefficients[..., 0, 0].tolist() if self.single else []
        self.coefficients = operators.coefficients.to(like.device, like.dtype)

    def __call__(self, k: int, u: Tensor) -> Tensor:
        if self.single:
            return self.numbers[k] * u
        frequencies = len(self.basis.shape)
        return self.basis.inverse(apply_coefficients(self.coefficients[k], self.basis.forward(u), frequencies))


def inverse_deviation(covariance: Operator) -> Operator:
    """`diag(Sigma)^-1/2`, each field divided by a deviation of its own (averaged over frequencies)."""
    variances = covariance.coefficients.diagonal(dim1=-2, dim2=-1)
    for _ in covariance.basis.shape:
        variances = variances.mean(-2)
    return Operator(torch.diag_embed(variances.rsqrt()))


def _split(condition: Tensor | None, batch: int, size: int | None) -> list[Tensor | None]:
    if condition is None:
        return [None] * len(torch.empty(batch).split(size or batch))
    return list(condition.split(size or batch))
