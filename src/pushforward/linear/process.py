"""Forward processes: linear diffusions `du = F_t u dt + G_t dw` from clean data (t = 0) to noise (t = t_max).

The clean state is the image, with a velocity `v_0 ~ N(0, gamma M)` of its own where the process has one. Everything
else follows from two functions of time,

    transition  Psi(t, s):  E[u_t | u_s] = Psi(t, s) u_s,
    covariance  Sigma_t  :  Cov[u_t | x_0],

and their rates F_t and G_t G_t^T. From them come, for every process alike: the probability-flow ODE, the signal-to-
noise ratio, and the time at which it has a given value.

For instance, flow matching, whose image fades as its noise grows:

    >>> import torch
    >>> alpha, sigma = Flow().alpha_sigma(torch.tensor([0.0, 0.25, 1.0]))
    >>> alpha.tolist(), sigma.tolist()
    ([1.0, 0.75, 0.0], [0.0, 0.25, 1.0])
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, wraps
from operator import index
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pushforward.errors import PushforwardError
from pushforward.linear.basis import IDENTITY, Basis
from pushforward.linear.operator import Operator

_SIDE = 8  # pixels; a process over frequencies is checked for images of this side
_ROUNDING = 1e-9  # a signal-to-noise ratio may seem to rise by this much


def kept(method: Callable[[Any, Tensor], Operator]) -> Callable[[Any, Tensor], Operator]:
    """Keep what a process says about times for as long as their tensor lives: several coefficients are made of it."""
    known = WeakIdKeyDictionary()

    @wraps(method)
    def said(self: Any, t: Tensor) -> Operator:
        if t.requires_grad or t.is_inference():
            return method(self, t)
        about, key = known.setdefault(t, {}), (id(self), t._version)
        if key not in about:
            about[key] = self, method(self, t)
        found: Operator = about[key][1]
        return found

    return said


class Process(ABC):
    """A linear diffusion. Times are float64 tensors of any shape; operators get that shape as their batch.

    Raises:
        PushforwardError: the parameters of a process that is a dataclass give no diffusion from data to noise, see
            `check_process`.
    """

    name: ClassVar[str]
    blocks: ClassVar[int] = 1
    noisy: ClassVar[slice] = slice(None)  # the fields that noise enters, of the image and its velocity
    time_is_noise: ClassVar[bool] = False  # whether the time is the noise level, most of which lies far above the data
    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        check_process(self)

    @property
    def basis(self) -> Basis:
        """The basis in which the coefficients are diagonal."""
        return IDENTITY

    @abstractmethod
    def drift(self, t: Tensor) -> Operator:
        """Return `F_t`."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Operator:
        """Return `G_t G_t^T`."""

    @abstractmethod
    def transition(self, t: Tensor, s: Tensor) -> Operator:
        """Return `Psi(t, s)`, for `t` before or after `s`."""

    @abstractmethod
    def covariance(self, t: Tensor) -> Operator:
        """Return `Sigma_t`, the covariance of `u_t` given the clean image (with an initial velocity's variance)."""

    @property
    def lowest(self) -> Process:
        """A process whose lowest frequency is this one's, with as few others as can be; by default itself."""
        return self

    # -- the same for every process -----------------------------------------------------------------------------

    @kept
    def signal(self, t: Tensor) -> Operator:
        """Return `Psi(t, 0)`: what is left of the clean state at `t`."""
        return self.transition(t, t.new_zeros(()))

    @kept
    def precision(self, t: Tensor) -> Operator:
        """Return `Sigma_t^-1`."""
        return self.covariance(t).inverse()

    def flow(self, t: Tensor) -> tuple[Operator, Operator]:
        """Return `on_state` and `on_answer` of the probability-flow ODE `du/dt = on_state u + on_answer D`.

        `D` is the denoised state `E[u_0 | u_t]`.

        `du/dt = F u - 1/2 G G^T score` and `score = -Sigma^-1 (u - Psi(t, 0) D)` (Tweedie).
        """
        into, seen = self.on_answer(t)
        return self.drift(t) + 0.5 * (into @ self.precision(t).part(rows=self.noisy)), into @ seen

    def on_answer(self, t: Tensor) -> tuple[Operator, Operator]:
        """Return two factors of the flow's `on_answer`, `(k, n)` and `(n, k)`; n is the number of `noisy` fields."""
        seen = self.precision(t).part(rows=self.noisy) @ self.signal(t)
        return self.diffusion(t).part(columns=self.noisy), -0.5 * seen

    def posterior_covariance(self, t: Tensor, s: Tensor) -> Operator:
        """Return `Cov[u_t | u_s, x_0]` for `t < s`."""
        back = self.transition(s, t)
        sigma = self.covariance(t)
        gain = sigma @ back.T @ self.precision(s)
        return sigma - gain @ back @ sigma

    def snr(self, t: Tensor) -> Tensor:
        """Return the image's signal-to-noise ratio `Psi_x^T Sigma^-1 Psi_x` in `u_t`, `(*t.shape, *basis.shape)`."""
        image = self.signal(t).part(columns=slice(1))
        value = (image.T @ self.precision(t) @ image).entry(0, 0)
        return torch.where(self.covariance(t).entry(0, 0) > 0, value, torch.inf)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return half the log of the signal-to-noise ratio (`log(alpha / sigma)`) at the lowest frequency, `t.shape`.

        It is minus infinity where the signal is lost in float64's rounding of the noise.
        """
        snr = self.lowest.snr(t)[(...,) + (0,) * len(self.basis.shape)]
        return 0.5 * torch.where(snr < torch.finfo(torch.float64).eps ** 2, 0.0, snr).log()

    def log_snr_rate(self, t: Tensor) -> Tensor:
        """Return `d log_snr / dt`, from `d snr / dt = -Psi_x^T Sigma^-1 G G^T Sigma^-1 Psi_x`."""
        lowest = self.lowest
        pulled = lowest.precision(t) @ lowest.signal(t)
        rate = -(pulled.T @ lowest.diffusion(t) @ pulled).entry(0, 0) / lowest.snr(t)
        return 0.5 * rate[(...,) + (0,) * len(self.basis.shape)]

    def lift(self, image: Tensor) -> Tensor:
        """Make the clean state of an image `(batch, channels, *field)`; a velocity, if the process has one, is zero."""
        return torch.cat([image] + [torch.zeros_like(image)] * (self.blocks - 1), 1) if self.blocks > 1 else image

    def image(self, state: Tensor) -> Tensor:
        """Return the image in a state `(batch, k * channels, *field)`."""
        return state[:, : state.shape[1] // self.blocks]

    def config(self) -> dict[str, Any]:
        """Return what `process_from_config` needs to make this process again."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


class ScaledProcess(Process):
    """`u_t = alpha_t x_0 + sigma_t noise`, per pixel or per frequency: a subclass gives `alpha_sigma` alone.

    F = alpha' / alpha and G G^T = 2 sigma (sigma' - sigma alpha' / alpha); derivatives by automatic differentiation.
    """

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute signal and noise scale at `t`, each `(*t.shape, *basis.shape)`, by differentiable torch functions."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `alpha, sigma, d alpha / dt, d sigma / dt`."""
        values, rates = _with_rate(self.alpha_sigma, t)
        return *values, *rates

    def drift(self, t: Tensor) -> Operator:
        alpha, _, d_alpha, _ = self.rates(t)
        return Operator.scalar(d_alpha / alpha, basis=self.basis)

    def diffusion(self, t: Tensor) -> Operator:
        alpha, sigma, d_alpha, d_sigma = self.rates(t)
        return Operator.scalar(2 * sigma * (d_sigma - sigma * d_alpha / alpha), basis=self.basis)

    def transition(self, t: Tensor, s: Tensor) -> Operator:
        return Operator.scalar(self.alpha_sigma(t)[0] / self.alpha_sigma(s)[0], basis=self.basis)

    def covariance(self, t: Tensor) -> Operator:
        return Operator.scalar(self.alpha_sigma(t)[1].square(), basis=self.basis)

    def flow(self, t: Tensor) -> tuple[Operator, Operator]:
        """Return what `Process.flow` does, written so that it stays finite where `alpha` is zero."""
        alpha, sigma, d_alpha, d_sigma = self.rates(t)
        rate = d_sigma / sigma
        return Operator.scalar(rate, basis=self.basis), Operator.scalar(d_alpha - alpha * rate, basis=self.basis)

    def on_answer(self, t: Tensor) -> tuple[Operator, Operator]:
        return self.flow(t)[1], Operator.scalar(1.0)

    def snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma).square()


@dataclass(frozen=True)
class VP(ScaledProcess):
    """Variance preserving, `du = -1/2 beta u dt + sqrt(beta) dw` with `beta_t = beta_min + t (beta_max - beta_min)`.

    References:
        Score-Based Generative Modeling through SDEs, Song et al., arXiv 2011.13456, eq. 11 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "vp"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


@dataclass(frozen=True)
class Cosine(ScaledProcess):
    """Variance preserving, `alpha_t = cos(pi/2 t (1 + s) / (1 + 2 s))`: the offset s keeps some signal at the end.

    The sources write `(t + s) / (1 + 2 s)`, which leaves noise of 0.6% at t = 0; here t = 0 is clean.

    References:
        Blurring Diffusion Models, Hoogeboom & Salimans, arXiv 2209.05557, appendix A;
        after Improved Denoising Diffusion Probabilistic Models, Nichol & Dhariwal, arXiv 2102.09672, eq. 17.
    """

    offset: float = 0.004
    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "cosine"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _cosine_scales(t, self.offset)


@dataclass(frozen=True)
class VE(ScaledProcess):
    """Variance exploding with the noise level as time: `u_t = x_0 + t noise`.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al., arXiv 2206.00364, table 1.
    """

    t_min: float = 2e-3
    t_max: float = 80.0
    name: ClassVar[str] = "ve"
    time_is_noise: ClassVar[bool] = True

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t * 1.0


@dataclass(frozen=True)
class Flow(ScaledProcess):
    """Flow matching on straight lines: `u_t = (1 - t) x_0 + t noise`.

    References:
        Flow Matching for Generative Modeling, Lipman et al., arXiv 2210.02747, section 4.1;
        Flow Straight and Fast, Liu et al., arXiv 2209.03003.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "flow"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t * 1.0


class _Field(Process):
    """A process with a coefficient for each DCT frequency of images of one size, `field`."""

    field: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the image size, then the process: at few frequencies, as they go as far for a small image."""
        try:
            field = tuple(index(n) for n in self.field)
        except TypeError:
            field = ()
        if not field or min(field) < 1:
            raise PushforwardError(
                f"A blurring process needs the image size as field=(height, width); got {self.field!r}."
            )
        object.__setattr__(self, "field", field)
        small = tuple(min(n, _SIDE) for n in field)
        if small == field:
            check_process(self)
        else:
            replace(self, field=small)  # type: ignore[type-var]

    @property
    def basis(self) -> Basis:
        return Basis(self.field)

    @cached_property
    def lowest(self) -> Process:
        smallest: Process = replace(self, field=(1,) * len(self.field))  # type: ignore[type-var]
        return smallest


@dataclass(frozen=True)
class Blurring(_Field, ScaledProcess):
    """Noise and heat dissipation together: DCT frequency k decays as `alpha_t d_k(t)`, noise is white with `sigma_t`.

    `d_k = (1 - m) exp(-lambda_k tau_t) + m`, dissipation time `tau_t = blur_t^2 / 2`,
    `blur_t = blur_max sin^2(pi t / 2)` pixels, `lambda_k = pi^2 (i^2 / H^2 + j^2 / W^2)`, cosine `alpha_t`.

    Args:
        field: height and width of the images, in pixels.
        blur_max: greatest blur, in pixels.
        min_scale: fraction `m` of each frequency that blurring leaves.
        offset: the offset s of `Cosine`.
        t_min: earliest time that the network is asked about.
        t_max: time of the noisiest state.

    References:
        Blurring Diffusion Models, Hoogeboom & Salimans, arXiv 2209.05557, section 3 and appendix A.
    """

    field: tuple[int, ...]
    blur_max: float = 10.0
    min_scale: float = 1e-3
    offset: float = 0.004
    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "blurring"

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (x[(...,) + (None,) * len(self.field)] for x in _cosine_scales(t, self.offset))
        decay = torch.exp(-dissipation(t, self.blur_max, self.basis))
        return alpha * ((1 - self.min_scale) * decay + self.min_scale), sigma * torch.ones_like(decay)


@dataclass(frozen=True)
class Langevin(Process):
    """Critically damped Langevin diffusion: noise enters the image through a velocity.

    In the clock `B_t = int beta`, with inverse mass `m`, critical friction `Gamma = 2 / sqrt(m)` and `a = 2 sqrt(m)`:

        F = beta [[0, m], [-1, -Gamma m]],   G G^T = beta diag(0, 2 Gamma),   v_0 ~ N(0, gamma / m),
        Psi = exp(-a B / 2) [[1 + a B / 2, m B], [-B, 1 - a B / 2]],
        Cov[u_t | u_s] = [[P_3, x^2 e^-x / a], [., (2 x e^-x + P_3) / m]],   x = a (B_t - B_s),

    P_3 the regularised incomplete gamma function P(3, x), which has no cancellation however short the step.

    References:
        Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, Dockhorn et al., arXiv 2112.07068;
        gDDIM, Zhang et al., arXiv 2206.05564 (settings).
    """

    beta: float = 4.0
    inverse_mass: float = 4.0
    gamma: float = 0.04
    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "langevin"
    blocks: ClassVar[int] = 2
    noisy: ClassVar[slice] = slice(1, None)

    def clock(self, t: Tensor) -> Tensor:
        """Return `B_t = int_0^t beta`, `(*t.shape, *basis.shape)`."""
        return self.beta * t

    def _rate(self, t: Tensor) -> Tensor:
        rate: Tensor = _with_rate(self.clock, t)[1]
        return rate

    def drift(self, t: Tensor) -> Operator:
        beta, m = self._rate(t), self.inverse_mass
        return Operator.block([[0 * beta, m * beta], [-beta, -2 * math.sqrt(m) * beta]], self.basis)

    def diffusion(self, t: Tensor) -> Operator:
        beta = self._rate(t)
        return Operator.block([[0 * beta, 0 * beta], [0 * beta, 4 / math.sqrt(self.inverse_mass) * beta]], self.basis)

    def transition(self, t: Tensor, s: Tensor) -> Operator:
        b, m = self.clock(t) - self.clock(s), self.inverse_mass
        root = math.sqrt(m)
        decay = torch.exp(-root * b)
        return Operator.block(
            [[decay * (1 + root * b), decay * m * b], [-decay * b, decay * (1 - root * b)]], self.basis
        )

    @kept
    def covariance(self, t: Tensor) -> Operator:
        m, root, x = self.inverse_mass, math.sqrt(self.inverse_mass), 2 * math.sqrt(self.inverse_mass) * self.clock(t)
        decay, rest = (-x).exp(), 1 - 0.5 * x
        third = _incomplete_gamma(x, decay)
        image = third + 0.25 * self.gamma * x.square() * decay  # with what the initial velocity becomes
        cross = 0.5 / root * decay * x * (x + self.gamma * rest)
        velocity = (third + decay * (2 * x + self.gamma * rest.square())) / m
        return Operator.block([[image, cross], [cross, velocity]], self.basis)


@dataclass(frozen=True)
class BlurringLangevin(_Field, Langevin):
    """Langevin diffusion whose clock runs faster at high frequencies: `B_k(t) = beta t + strength lambda_k tau_t`.

    It shows that the algebra composes: each DCT frequency has a 2 x 2 block, and nothing else needs writing.
    """

    field: tuple[int, ...] = ()
    blur_max: float = 10.0
    strength: float = 0.01
    name: ClassVar[str] = "blurring-langevin"

    def clock(self, t: Tensor) -> Tensor:
        plain = self.beta * t[(...,) + (None,) * len(self.field)]
        return plain + self.strength * dissipation(t, self.blur_max, self.basis)


def check_process(process: Process) -> None:
    """Check at many times from `t_min` to `t_max` that a process leads from data to noise.

    The times must be finite and positive, there must be a signal before `t_max`, the noise must have a covariance, and
    the signal-to-noise ratio must fall, so that noise is added and never removed.

    Raises:
        PushforwardError: the process fails the check.
    """
    try:
        if 0 < process.t_min < process.t_max < math.inf:
            fault = _fault(process)
        else:
            fault = "t_min must be above 0 and t_max above t_min"
    except PushforwardError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        fault = str(error)
    if fault is not None:
        given = ", ".join(f"{k}={v!r}" for k, v in process.config().items() if k not in ("name", "field"))
        raise PushforwardError(f"Process {process.name!r} with {given} is no diffusion from data to noise: {fault}.")


def _fault(process: Process) -> str | None:
    """Say what keeps a process from being a diffusion, if anything; its times are in order."""
    low, high = process.t_min, process.t_max
    even = torch.linspace(0, 1, 33, dtype=torch.float64, device="cpu")
    t = torch.cat([low + (high - low) * even, low * (high / low) ** even, high - (high - low) * 0.5 ** (20 * even)])
    t = t.clamp(low, high).unique()  # sorted
    before = t[:-1]  # the signal may end at t_max
    psi, noise, snr = process.signal(before), process.covariance(t), process.snr(t)
    if not all(bool(value.isfinite().all()) for value in (psi.coefficients, noise.coefficients, snr)):
        return "some coefficients are not finite, as with a negative variance or too large a number"
    size = noise.entry(0, 0) if noise.blocks == 1 else torch.linalg.det(noise.coefficients)
    if not bool((size > 0).all() & (noise.entry(0, 0) > 0).all()):
        return "its noise has no positive variance at some times"
    if not bool((snr[:-1] > 0).all()):
        return f"its signal is lost before t_max = {high:g}"
    if bool((snr.diff(dim=0) > _ROUNDING * snr[:-1]).any() | (snr[-1] >= snr[0]).any()):
        return "its signal-to-noise ratio does not fall at all times"
    return None


def dissipation(t: Tensor, blur_max: float, basis: Basis) -> Tensor:
    """Return `lambda_k tau_t` of the blurring schedule, `(*t.shape, *basis.shape)`."""
    blur = blur_max * torch.sin(0.5 * math.pi * t).square()
    return 0.5 * blur.square()[(...,) + (None,) * len(basis.shape)] * basis.eigenvalues()


def _incomplete_gamma(x: Tensor, decay: Tensor) -> Tensor:
    """Return `P(3, x) = e^-x sum_{n > 2} x^n / n!` with `decay = e^-x`, the sum by what it lacks of `e^x` above 1.

    A tenth of the rounding of `torch.special.gammainc`, and a quarter of its time.
    """
    small = x.clamp_max(1.0)
    total = torch.full_like(small, 1 / math.factorial(19))
    for n in range(18, 2, -1):
        total = torch.addcmul(total.new_tensor(1 / math.factorial(n)), total, small)
    return torch.where(x < 1, total * small**3 * decay, 1 - decay * (1 + x * (1 + 0.5 * x)))


def _cosine_scales(t: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of the angle, the first as the sine of what is left of pi/2: exactly 0 where nothing is."""
    part = t * (1 + offset) / (1 + 2 * offset)
    return (0.5 * math.pi * (1 - part)).sin(), (0.5 * math.pi * part).sin()


def _with_rate(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Return a function of time, a tensor or a tuple of them, and its derivative.

    What a backward pass gives is linear in the cotangents, and its derivative by them is a forward pass. PyTorch's own
    forward differentiation takes two seconds to import, and its check of cotangents that are handed to it half a
    second, so they are multiplied in.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        values = function(t)
        several = values if isinstance(values, tuple) else (values,)
        moving = [value for value in several if value.requires_grad]
        cotangents = [torch.zeros_like(value, requires_grad=True) for value in moving]
        product = torch.stack([(value * other).sum() for value, other in zip(moving, cotangents, strict=True)]).sum()
        (pulled,) = torch.autograd.grad(product, t, create_graph=True)
        found = iter(torch.autograd.grad(pulled.sum(), cotangents))
    rates = tuple(next(found) if value.requires_grad else torch.zeros_like(value) for value in several)
    several = tuple(value.detach() for value in several)
    return (several, rates) if isinstance(values, tuple) else (several[0], rates[0])
