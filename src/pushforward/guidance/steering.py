r"""Steering: changing, at every step of the solver, the denoised state that the network answers.

A plan knows a model by its answers `D = E[u_0 | u_t = u]` alone. So what changes the answers steers every solver,
process and executor. With `u = Psi u_0 + N(0, Sigma)`, the law of u_0 given u is an exponential family whose natural
parameter is `Psi^T Sigma^-1 u` and whose mean is D. The derivative of the mean is the covariance,

    J = dD/du = Cov[u_0 | u] Psi^T Sigma^-1,      so      Cov[u_0 | u] = Psi^-1 Sigma J^T.

**An energy of images.** Data tilted by `exp(-E(image))` have the denoised state, to first order in E,

    D' = D - Cov[u_0 | u] grad_D E(image(D)) = D - Psi^-1 Sigma grad_u E(image(D(u))),

for `d/dw E_w[u_0 | u] = -Cov[u_0, E | u]` at w = 0, and E is taken as linear about D. This is steering *through* the
network; *direct* steering leaves the network alone and moves D along `-grad_D E`.

**An energy of noisy states**, such as `E_t(u) = -log p(y | u)` of a classifier that has learned from noisy images, is
exact to all orders, by Tweedie's formula `Psi D = u + Sigma score(u)` for the data and the tilted data alike:

    D' = D - Psi^-1 Sigma grad_u E_t(u).

Psi and Sigma are the operators of any linear process: numbers, one number per frequency, or 2 x 2 blocks. Where there
is almost no signal, `Psi^-1` would amplify the errors of the network's Jacobian; with a `floor` f on the
signal-to-noise ratio it becomes `Psi^T (Psi Psi^T + f Sigma)^-1`, which is finite at every time.

References:
    Tweedie's formula, Efron, JASA 106 (2011); classifier guidance, Dhariwal & Nichol, arXiv 2105.05233, algorithm 2;
    DPS, Chung et al., arXiv 2209.14687, algorithm 1; LGD, Song et al., ICML 2023; MPGD, He et al.,
    arXiv 2311.16424, algorithm 1; FreeDoM, Yu et al., arXiv 2303.09833, algorithm 1; Universal Guidance (UGD), Bansal
    et al., arXiv 2302.07121, algorithm 1; TFG, Ye et al., arXiv 2409.15761, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pushforward.data import schema
from pushforward.data.memory import check_memory
from pushforward.denoiser import at_least_float32
from pushforward.errors import PushforwardError
from pushforward.guidance.altered import Altered, Change
from pushforward.guidance.energies.energy import Energy, Function, check_finite, of, total, values_of
from pushforward.guidance.posterior import Guided
from pushforward.linear import Operator, Process
from pushforward.maps.code import Code, derive_seed
from pushforward.maps.diffusion import Diffusion
from pushforward.model import Model

__all__ = ["STEERINGS", "Steering", "classified", "guide", "steered"]

_KEPT = 64  # number of times whose noise is kept

_Model = TypeVar("_Model", bound=Model)
_Schedule = Literal["constant", "increase", "decrease"]
_Normalise = Literal["residual", "size"]


@dataclass(frozen=True)
class Steering:
    """How answers follow an energy.

    Args:
        through: strength of steering through the network, TFG's rho; 1 is the first-order step of Bayes' rule.
        direct: strength of steering past the network, TFG's mu: each step is `D <- D - direct * grad_D E`.
        inner: direct steps per answer, TFG's N_iter.
        spread: deviation of the noise about D over which E is averaged, as a multiple of `1 / sqrt(1 + snr)`, the
            posterior deviation of data of variance 1; TFG's gamma. The average is `-log mean exp(-E)`.
        samples: number of samples of that noise. They depend on the seed and the time alone, and serve all images.
        schedule: how both strengths change: `constant`; `increase`, in proportion to the signal's share
            `snr / (1 + snr)`, which is alpha_t^2 for a variance-preserving diffusion; `decrease`, in proportion to the
            noise's share `1 / (1 + snr)`.
        normalise: `residual` divides gradients by the root of the image's energy, so that a sum of squares pulls as its
            root does; `size` gives what is added to an image the root mean square 1, times the strength.
        floor: signal-to-noise ratio below which steering through the network fades out. 0 is Bayes' rule for an exact
            network; below .1, strong energies pushed trained networks out of [-1, 1] (docs/steering.md).
        seed: seed of the noise.

    Raises:
        PushforwardError: a number is out of range, or there are several samples without spread.
    """

    through: float = 0.0
    direct: float = 0.0
    inner: int = 1
    spread: float = 0.0
    samples: int = 1
    schedule: _Schedule = "constant"
    normalise: _Normalise | None = None
    floor: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        schema.check_fields(self)
        for name, least in (("inner", 1), ("spread", 0), ("samples", 1), ("floor", 0)):
            if not getattr(self, name) >= least:
                raise PushforwardError(f"Steering's {name} must be at least {least}; got {getattr(self, name)}.")
        if self.samples > 1 and not self.spread:
            raise PushforwardError(f"Steering with {self.samples} samples of noise needs a spread above 0.")


# Published methods in this form. The energy's weight sets the strength. They differ from the papers: DPS, LGD,
# FreeDoM and TFG add their gradient in u to the *next state*, as large as their setting says; here it enters D, and the
# solver gives it its own coefficient for D (times Psi^-1 Sigma, DDPM's is about beta_t, the first-order step of Bayes'
# rule), so that what is added does not depend on the number of steps. UGD is as published: its changes of the noise
# prediction are these changes of D. LGD's deviation is as published; its noise is the same for all images. MPGD is as
# published, without its projection by an autoencoder. The papers' floor is 0, and their strengths are tuned by task.
# Repeats (FreeDoM, UGD, TFG: N_recur) are the plan's: see `plan.recurrence`.
STEERINGS: dict[str, Steering] = {
    "dps": Steering(through=1.0, normalise="residual"),
    "lgd": Steering(through=1.0, spread=1.0, samples=4),
    "mpgd": Steering(direct=1.0),
    "freedom": Steering(through=1.0, schedule="increase"),
    "ugd": Steering(through=1.0, direct=1.0, inner=4),
    "tfg": Steering(through=1.0, direct=0.25, inner=4, spread=0.1, samples=4, schedule="increase"),
}


def steered(model: _Model, energy: Energy | Function, steering: Steering = STEERINGS["dps"]) -> _Model:
    """Make a model whose answers follow an energy of images, as the module's docstring says.

    All executors run it, also under `torch.no_grad`; gradients pass through it, including second derivatives of network
    and energy. They also pass through the network's classifier-free guidance, and through its clipping: no gradient
    passes where an answer is clipped, so only `direct` steers a network whose answers are all clipped at high noise. An
    answer costs one call of the network, and its derivative unless `through` is 0; energies are evaluated `samples`
    times at D and at each direct step after the first.

    Args:
        model: a model of images, or of latents with a decoder that PyTorch differentiates.
        energy: energy of images; the `start` of its code is the noisy state.
        steering: how to steer; see `STEERINGS`.

    Raises:
        PushforwardError: while sampling, the energy is not finite or has no gradient, or the network has none and
            `through` is not 0.
    """
    wanted = of(energy)
    if not wanted.terms or not (steering.through or steering.direct):
        return model
    return replace(model, denoiser=Altered(model.denoiser, partial(_steering, model.images, wanted, steering)))


def guide(
    diffusion: Diffusion,
    energy: Energy | Function,
    steering: Steering,
    *,
    chains: int = 16,
    seed: int = 0,
    batch: int = 64,
    callback: Callable[[Any], None] | None = None,
) -> Guided:
    """Images of a plan whose every step is steered, and the codes that they would be of without.

    Args:
        diffusion: bound to the classes or prompts of the images.
        energy: energy of images; see `steered`.
        steering: how to steer.
        chains: how many images.
        seed: seed of the codes; image i depends on the seed and i alone.
        batch: images at a time.
        callback: told after every network call, or round.

    Raises:
        PushforwardError: as `steered`.
    """
    there = replace(diffusion, model=steered(diffusion.model, energy, steering))
    if there.parallel is None:
        images = there.sample(chains, seed=seed, batch=batch, callback=callback)
        nfe = torch.full((chains,), there.plan.nfe, device="cpu")
    else:
        solved = list(there.solved(chains, seed=seed, batch=batch, callback=callback))
        images = torch.cat([some for some, _ in solved])
        nfe = torch.cat([solution.nfe.cpu() for _, solution in solved])
    code = diffusion.draw(chains, seed=seed)
    energies, equal = values_of(of(energy), images, code, batch), torch.full((chains,), 1 / chains, device="cpu")
    nfe = nfe * (2 if steering.through else 1)  # each answer has a derivative
    return Guided(code, images, energies, equal, torch.arange(chains, device="cpu"), nfe, ())


def classified(model: Model, energy: Callable[[Tensor, Tensor], Tensor], *, floor: float = 1e-6) -> Model:
    """Make a model whose answers follow an energy of *noisy states*: classifier guidance, exact if the energy is.

    Args:
        model: a model of any process.
        energy: function `(u, t) -> (rows,)` of states `(rows, k * channels, *field)` and the process's times `(rows,)`;
            for a classifier, `-weight * log p(y | u, t)`. If the process has a velocity, u contains it.
        floor: signal-to-noise ratio below which steering fades out.

    Raises:
        PushforwardError: the floor is negative; or, while sampling, the energy does not give one number per row, or has
            no gradient.

    References:
        Dhariwal & Nichol, arXiv 2105.05233, algorithm 2.
    """
    if not floor >= 0:
        raise PushforwardError(f"The floor of the signal-to-noise ratio must be at least 0; got {floor}.")
    return replace(model, denoiser=Altered(model.denoiser, partial(_classifying, energy, floor)))


def _steering(
    images: Callable[[Tensor], Tensor], energy: Energy, steering: Steering,
    process: Process, times: Tensor, like: Tensor, trained: bool,
) -> Change:  # fmt: skip
    share = torch.sigmoid(2 * process.log_snr(times))
    course = {"constant": torch.ones_like(share), "increase": share, "decrease": 1 - share}[steering.schedule].to(like)
    gain = _Acting(_gain(process, times, steering.floor), like)
    return _Pull(images, energy, steering, process, trained, gain, course, _noises(steering, process, times, like))


@dataclass(frozen=True, eq=False)
class _Pull:
    """How answers at a list of times follow an energy: a `Change`.

    Args:
        images: function from clean states to images.
        energy: energy of images.
        steering: how to follow the energy.
        process: process of the states.
        trained: whether gradients may be wanted in the network's weights or its condition.
        gain: `Psi^-1 Sigma` at the times.
        course: factor of the strengths at the times, `(n,)`.
        noises: noises to add, one after the other, to a clean state before its energy is computed.
    """

    images: Callable[[Tensor], Tensor]
    energy: Energy
    steering: Steering
    process: Process
    trained: bool
    gain: _Acting
    course: Tensor
    noises: list[Callable[[int | Tensor, Tensor], Tensor | float]]

    def __call__(self, ask: Callable[[Tensor], Tensor], k: int | Tensor, u: Tensor, of: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the answer that follows the energy, in place of that of `ask`."""
        steering, kept = self.steering, torch.is_grad_enabled() and (u.requires_grad or self.trained)
        code = Code(u if kept else u.detach())
        state, denoised = self._through(ask, u, kept) if steering.through else (u, ask(u))
        with torch.enable_grad():
            x = denoised if kept and denoised.requires_grad else denoised.detach().requires_grad_()
            gradient, moved = self._slope(k, x, code, kept), torch.zeros_like(x)
            if steering.through:
                back = torch.autograd.grad(denoised, state, gradient, create_graph=kept)[0]
                moved = self._sized(k, steering.through, self.gain(k, back))
            for turn in range(steering.inner if steering.direct else 0):
                if turn:
                    gradient = self._slope(k, x, code, kept)
                x = x - self._sized(k, steering.direct, gradient)
                x = x if kept else x.detach().requires_grad_()
            changed = x - moved
        return changed if kept else changed.detach()

    def _through(self, ask: Callable[[Tensor], Tensor], u: Tensor, kept: bool) -> tuple[Tensor, Tensor]:
        """Return the state to differentiate in, and the network's answer to it."""
        state = u if kept and u.requires_grad else u.detach().requires_grad_()
        with torch.enable_grad():
            denoised = ask(state)
        if not denoised.requires_grad:
            raise PushforwardError(
                "Steering through the network needs one that PyTorch differentiates; set through=0, as in mpgd."
            )
        return state, denoised

    def _slope(self, k: int | Tensor, x: Tensor, code: Code, create: bool) -> Tensor:
        """Return `grad_D E` at the clean state `x`, averaged and, if wanted, divided by the root of E."""
        values = []
        for noise in self.noises:
            parts = self.energy.parts(self.images(x + noise(k, x)), code)
            check_finite(parts, "image {} of a batch in a steered step")
            values.append(total(parts))
        value = math.log(len(values)) - torch.logsumexp(-torch.stack(values), 0) if len(values) > 1 else values[0]
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create, allow_unused=True)
        if gradient is None:
            names = ", ".join(repr(term.name) for term in self.energy.terms)
            raise PushforwardError(
                f"Steering needs energies of images; {names} depend on the code alone. Guide codes instead."
            )
        if self.steering.normalise == "residual":
            gradient = gradient / _column(_positive(value.abs()).sqrt(), x).to(x)
        return gradient

    def _sized(self, k: int | Tensor, strength: float, shift: Tensor) -> Tensor:
        """Scale a shift of images by its strength, and before that to root mean square 1 if wanted."""
        shift = self.process.lift(self.process.image(shift))
        if self.steering.normalise == "size":
            square = self.process.image(shift).flatten(1).square().mean(1)
            shift = shift / _column(_positive(square).sqrt(), shift)
        return strength * _column(self.course[k], shift) * shift


def _classifying(
    energy: Callable[[Tensor, Tensor], Tensor], floor: float,
    process: Process, times: Tensor, like: Tensor, trained: bool,  # noqa: ARG001
) -> Change:  # fmt: skip
    gain = _Acting(_gain(process, times, floor), like)
    clock = times.to(like.device, at_least_float32(like.dtype))

    def change(ask: Callable[[Tensor], Tensor], k: int | Tensor, u: Tensor, of: Tensor | None) -> Tensor:  # noqa: ARG001
        kept = torch.is_grad_enabled() and u.requires_grad
        state = u if kept else u.detach().requires_grad_()
        with torch.enable_grad():
            value = energy(state, clock[k].expand(len(u)))
            if tuple(value.shape) != (len(u),) or not value.requires_grad:
                raise PushforwardError(
                    f"An energy of noisy states must give one number per state, shape ({len(u)},), with a gradient; it "
                    f"gave shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}."
                )
            slope = torch.autograd.grad(value.sum(), state, create_graph=kept)[0]
        return ask(u) - process.lift(process.image(gain(k, slope)))

    return change


def _gain(process: Process, times: Tensor, floor: float) -> Operator:
    """`Psi^-1 Sigma` at `times (n,)`, as `Psi^T (Psi Psi^T + floor Sigma)^-1 Sigma`."""
    psi, covariance = process.signal(times), process.covariance(times)
    gain = psi.T @ (psi @ psi.T + floor * covariance).inverse() @ covariance
    if not gain.is_finite():
        raise PushforwardError(
            f"There is no signal to steer by at a time of process {process.name!r}; set a floor above 0."
        )
    return gain


def _noises(
    steering: Steering, process: Process, times: Tensor, like: Tensor
) -> list[Callable[[int | Tensor, Tensor], Tensor | float]]:
    """Draw what is added to a clean state, with as many rows, for each sample."""
    if not steering.spread:
        return [lambda k, x: 0.0]  # noqa: ARG005
    deviation = Operator.scalar(steering.spread * (1 + process.snr(times)).rsqrt(), process.blocks, process.basis)
    acting, shape = _Acting(deviation, like), (steering.samples, *process.image(like).shape[1:])
    check_memory(4 * math.prod(shape), f"{steering.samples:,} samples of noise to steer by")

    @lru_cache(maxsize=_KEPT)
    def drawn(k: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(steering.seed, round(float(times[k]) * 2**40)))
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)

    def added(sample: int, k: int | Tensor, x: Tensor) -> Tensor:
        if isinstance(k, Tensor) and k.ndim:
            own = torch.stack([drawn(one)[sample] for one in k.tolist()])
        else:
            own = drawn(int(k))[sample].expand(len(x), *shape[1:])
        return acting(k, process.lift(own))

    return [partial(added, sample) for sample in range(steering.samples)]


class _Acting:
    """`(k, u) -> operator[k] u` in pixels, with the coefficients cast once."""

    def __init__(self, operator: Operator, like: Tensor):
        self._coefficients, self._basis = operator.coefficients.to(like), operator.basis

    def __call__(self, k: int | Tensor, u: Tensor) -> Tensor:
        return Operator(self._coefficients[k], self._basis)(u)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Shape one number for all rows, or one per row, so that it multiplies states."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _positive(values: Tensor) -> Tensor:
    """Make values that one can divide by; where they are 0, so is what is divided."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)
