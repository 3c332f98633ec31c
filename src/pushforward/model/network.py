"""Networks: callables `(u, t, condition) -> prediction`, turned into denoisers.

`Network` is the `Denoiser` (see `denoiser`) that a neural network makes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pushforward.denoiser import Ask, at_least_float32, check_output
from pushforward.errors import PushforwardError
from pushforward.linear import IDENTITY, POINT, Discrete, Gaussian, Operator, Process, apply_coefficients
from pushforward.model.prediction import Prediction, denoising, is_image

_NOTICED: WeakSet[nn.Module] = WeakSet()  # modules whose units of time have been checked
_TRAINED: WeakSet[nn.Module] = WeakSet()  # modules that have been looked at for parts in training mode
LOST = torch.finfo(torch.float32).eps ** 2  # signal-to-noise ratio at which float32 holds the noise alone


@dataclass(frozen=True)
class Network:
    """A neural network as a denoiser.

    Args:
        module: the network `(u, t, condition) -> prediction`, with `t (batch,)` in the network's own units, of the
            states' dtype, float32 at least.
        prediction: what the network predicts.
        time_scale, time_shift: the network's time is `time_scale * t + time_shift`.
        clock: if given, the network's time is `clock(t)` instead, for float64 times `(n,)`.
        reference: reference Gaussian of the `residual` prediction.
        input_reference: if given, `u` is divided by the marginal standard deviation of these data (EDM's `c_in`).
        condition: labels `(batch,)` or embeddings `(batch, ...)` to pass to the module.
        unconditional: the condition that stands for none; needed for guidance.
        guidance: weight of classifier-free guidance, `p_0 + guidance (p - p_0)`; 1 is plain.
        clip: clamp the denoised image to `[-clip, clip]`.
        threshold: dynamic thresholding: clamp to this quantile of the image's absolute values, if above `clip`
            (default 1), and divide by it.
        threshold_max: upper bound of that quantile.
        autocast: run the module in this dtype.
        max_batch: most rows per network call; larger batches are split, and guidance counts twice.

    The module gets copies, so it may change what it is given. Its output has the shape of the state, or of the image
    for the predictions `sample` and `residual`. If it has twice the channels, the second half is a learned variance,
    which is ignored (Improved DDPM; `learn_sigma` of guided-diffusion).

    References:
        Classifier-Free Diffusion Guidance, Ho & Salimans, arXiv 2207.12598, eq. 6;
        learned variances: Improved DDPM, Nichol & Dhariwal, arXiv 2102.09672, section 3.1;
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

    def __repr__(self) -> str:
        """Show the module's name and size, what it predicts, and the number of images with conditions."""
        name = getattr(self.module, "__name__", type(self.module).__name__)
        said: dict[str, str] = {"prediction": self.prediction}
        if isinstance(self.module, nn.Module):
            said["parameters"] = f"{sum(p.numel() for p in self.module.parameters()):,}"
        if self.condition is not None:
            said |= {"conditions": str(len(self.condition)), "guidance": f"{self.guidance:g}"}
        return f"Network({', '.join([name, *(f'{key}={value}' for key, value in said.items())])})"

    def given(self, condition: Tensor | None, guidance: float = 1.0) -> Network:
        """Return this network under a condition."""
        return replace(self, condition=condition, guidance=guidance)

    def price(self) -> dict[str, object] | None:
        """Return what the duration of a call depends on; only for PyTorch modules."""
        if not isinstance(self.module, nn.Module):
            return None
        parameters = list(self.module.parameters())
        return {
            "network": f"{type(self.module).__module__}.{type(self.module).__qualname__}",
            "parameters": sum(p.numel() for p in parameters),
            "weights": sorted({str(p.dtype) for p in parameters}),
            "autocast": str(self.autocast),
            "guided": self.guidance != 1,
            "condition": None if self.condition is None else list(self.condition.shape[1:]),
            "max_batch": self.max_batch,
        }

    def at(self, process: Process, times: Tensor, like: Tensor) -> Ask:
        """See `Denoiser`."""
        on_state, on_prediction = denoising(process, self.prediction, times, self.reference)
        if is_silent(process, self.prediction, times) or not (on_state.is_finite() and on_prediction.is_finite()):
            raise PushforwardError(
                f"The prediction {self.prediction!r} says nothing about the image where process {process.name!r} has "
                "no signal; start the grid below t_max, or use a network that predicts v, velocity or the sample."
            )
        self._notice_training()
        self._notice_timeless(process, like)
        combine = _combination(on_state, on_prediction, like)
        scale = None
        if self.input_reference is not None:
            scale = inverse_deviation(self.input_reference.covariance(process, times)).coefficients.to(like)
        own = self.time_scale * times + self.time_shift if self.clock is None else self.clock(times)
        clock = own.to(like.device, at_least_float32(like.dtype))
        every = None if self.condition is None else self.condition.to(like.device)
        without = self.unconditional if self.guidance != 1 else None

        def ask(k: int | Tensor, u: Tensor, of: Tensor | None = None) -> Tensor:
            condition = None if every is None else _rows(every, len(u), of)
            nothing = None
            if condition is not None and without is not None:
                nothing = without.to(condition).expand_as(condition)
            seen = u.clone() if scale is None else apply_coefficients(scale[k], u, 0)
            prediction = self._predict(process, seen, clock[k].expand(len(u)).clone(), condition, nothing)
            if is_image(self.prediction):
                prediction = process.lift(prediction)
            denoised = combine(k, u, prediction)
            return denoised if self.clip is None and self.threshold is None else self._bounded(process, denoised)

        return ask

    def _notice_training(self) -> None:
        """Warn once per module if parts of it would draw numbers, or look at the whole batch, as in training."""
        module = self.module
        if not isinstance(module, nn.Module) or module in _TRAINED:
            return
        _TRAINED.add(module)
        if any(part.training and _restless(part) for part in module.modules()):
            warnings.warn(
                "The network is in training mode: its dropout or batch normalisation makes images depend on chance and "
                "on the batch; call its eval()",
                stacklevel=5,
            )

    def _notice_timeless(self, process: Process, like: Tensor) -> None:
        """Warn once per module if times seem to be in other units than its own.

        That is the case if it gets the times 0 to 1 of a table of timesteps unscaled, or if it has weights, gets times
        unscaled, and answers the same at two different ones.
        """
        module = self.module
        as_they_are = (self.time_scale, self.time_shift) == (1, 0) and self.clock is None
        if not (as_they_are and isinstance(module, nn.Module)) or module in _NOTICED:
            return
        _NOTICED.add(module)
        advice = "; if it counts timesteps, use pushforward.Network(..., time_scale=1000, time_shift=-1)"
        if isinstance(process, Discrete):
            count = process.timesteps
            msg = f"The network is told times from 0 to 1, but its process is a table of {count} timesteps"
            warnings.warn(msg + advice.replace("1000", str(count)), stacklevel=5)
        elif next(module.parameters(), None) is not None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(like.shape[1:], generator=generator, dtype=torch.float32, device="cpu").to(like)
            condition = None if self.condition is None else self.condition[[0, 0]].to(like.device)
            times = process.t_max * torch.tensor([0.25, 0.75], dtype=at_least_float32(like.dtype), device=like.device)
            with torch.no_grad(), self._precision(like):
                answers = module(torch.stack([noise, noise]), times, condition)
            if isinstance(answers, Tensor) and len(answers) == 2:
                first, second = answers.double()
                if float((second - first).norm()) <= 1e-6 * float(first.norm()):
                    seen = " and ".join(f"{t:g}" for t in times.tolist())
                    warnings.warn(f"The network answers the same at times {seen}{advice}", stacklevel=5)

    def _predict(
        self, process: Process, u: Tensor, t: Tensor, condition: Tensor | None, nothing: Tensor | None
    ) -> Tensor:
        """Predict in `u`'s dtype, in pieces of at most `max_batch` rows, including guidance's second rows."""
        shape = process.image(u).shape[1:] if is_image(self.prediction) else u.shape[1:]
        size = len(u) if self.max_batch is None else max(1, self.max_batch // (1 if nothing is None else 2))
        pieces = []
        with self._precision(u):
            for i in range(0, len(u), size):
                rows = slice(i, i + size)
                given = None if condition is None else condition[rows]
                without = None if nothing is None else nothing[rows]
                pieces.append(self._guided(u[rows], t[rows], given, without, shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _guided(
        self, u: Tensor, t: Tensor, condition: Tensor | None, nothing: Tensor | None, shape: torch.Size
    ) -> Tensor:
        if nothing is None or condition is None:
            return self._called(u, t, condition, shape)
        both = self._called(torch.cat([u, u]), torch.cat([t, t]), torch.cat([nothing, condition]), shape)
        plain, conditional = both.chunk(2)
        return torch.lerp(plain, conditional, self.guidance)

    def _called(self, u: Tensor, t: Tensor, condition: Tensor | None, shape: torch.Size) -> Tensor:
        """Call the module; return its prediction, `(rows, *shape)`, in the dtype of `u`."""
        rows, dtype = len(u), u.dtype
        output = check_output("The network", self.module(u, t, condition), (rows, *shape), learned_variance=True)
        return output[:, : shape[0]].to(dtype)

    def _precision(self, u: Tensor) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(u.device.type, self.autocast)

    def _bounded(self, process: Process, denoised: Tensor) -> Tensor:
        image = process.image(denoised)
        rest = denoised[:, image.shape[1] :]
        bound = self.clip if self.clip is not None else 1.0
        if self.threshold is None:
            image = image.clamp(-bound, bound)
        else:
            values = image.flatten(1).abs().to(at_least_float32(image.dtype))
            s = torch.quantile(values, self.threshold, 1).clamp(bound, self.threshold_max)
            s = s.to(image).view(-1, *[1] * (image.ndim - 1))
            image = bound * torch.minimum(torch.maximum(image, -s), s) / s
        return torch.cat([image, rest], 1) if rest.shape[1] else image


def is_silent(process: Process, prediction: Prediction, times: Tensor) -> bool:
    """Whether the noise is predicted at a time without signal, where it says nothing about the image."""
    return prediction in ("epsilon", "score") and bool((process.snr(times) < LOST).reshape(len(times), -1).all(1).any())


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where `accelerate` executes a module whose weights it brings there call by call; `None` for any other."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return None


def device_of(module: nn.Module | None) -> torch.device:
    """Return where a module works: where it is executed, or else where its weights are; the CPU if it has none."""
    if module is None:
        return torch.device("cpu")
    own = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return execution_device(module) or own


def _restless(part: nn.Module) -> bool:
    """Whether a layer does something else in training mode."""
    return isinstance(part, _BatchNorm) or (isinstance(part, _DropoutNd) and part.p > 0)


def _rows(condition: Tensor, rows: int, of: Tensor | None) -> Tensor:
    """Return each row's condition, from one for all, one per row, or one per image that rows belong to.

    Raises:
        PushforwardError: the number of conditions fits none of these.
    """
    if len(condition) == 1:
        return condition.expand(rows, *condition.shape[1:]).clone()
    if of is not None:
        return condition[of]
    if len(condition) != rows:
        raise PushforwardError(
            f"The model was given conditions for {len(condition)} images, but there are {rows}; give one per image."
        )
    return condition.clone()


def _combination(
    on_state: Operator, on_prediction: Operator, like: Tensor
) -> Callable[[int | Tensor, Tensor, Tensor], Tensor]:
    """`(k, u, p) -> on_state[k] u + on_prediction[k] p` in pixels, with the coefficients cast once."""
    basis = on_state.basis if on_state.basis != IDENTITY else on_prediction.basis
    pair = on_state.lift(basis).coefficients, on_prediction.lift(basis).coefficients
    plain = on_state.blocks == 1 and basis == IDENTITY
    first, second = (c[..., 0, 0].tolist() if plain else [] for c in pair)
    a, b = (c.to(like) for c in pair)
    frequencies = len(basis.shape)

    def combine(k: int | Tensor, u: Tensor, p: Tensor) -> Tensor:
        if plain and not isinstance(k, Tensor):
            return torch.add(first[k] * u, p, alpha=second[k])
        moved = apply_coefficients(a[k], basis.forward(u), frequencies)
        return basis.inverse(moved + apply_coefficients(b[k], basis.forward(p), frequencies))

    return combine


def inverse_deviation(covariance: Operator) -> Operator:
    """Return `diag(Sigma)^-1/2`, which divides each field by its own deviation (averaged over frequencies)."""
    variances = covariance.coefficients.diagonal(dim1=-2, dim2=-1)
    for _ in covariance.basis.shape:
        variances = variances.mean(-2)
    return Operator(torch.diag_embed(variances.rsqrt()))
