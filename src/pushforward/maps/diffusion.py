"""A diffusion model with a plan, as a map from Gaussian codes to images.

Its code is the terminal state, in units of the marginal's root, the noises of a stochastic plan, and what is left on
the last state: noise, where the plan ends above time 0, or a residual.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pushforward.data.memory import check_images
from pushforward.errors import PushforwardError
from pushforward.execute import INVERSE, Adaptive, Noise, Parallel, Round, Solution, encode, invert, parallel, run
from pushforward.execute.adjoint import Gradient, Implicit, Phantom, differentiable
from pushforward.execute.autotune import choose, measured
from pushforward.execute.distributed import Sharded
from pushforward.linear import root
from pushforward.maps.code import Code, GaussianStream, numbered
from pushforward.maps.labels import IN_TURN, Labels, in_turn, listed, take_labels
from pushforward.model import Model
from pushforward.plan import Plan

LOCAL = (0.15, 1.0)  # sizes of the reference, in parts of the data's, that inversion tries in turn
FAILED = 1e-2  # error of an image above which the next is tried; what is below it is rounding, or not to be had


@dataclass(frozen=True)
class Inversion:
    """Codes found behind images.

    Args:
        code: decoded by the same `Diffusion`, it gives the images back.
        rounds: batched network calls on the critical path that found the codes.
        decoding: network calls, one after another, of decoding them to see how near they lead.
        nfe: network evaluations of each image, both kinds together, `(count,)`.
        residual: greatest error of each image when its code is decoded step by step, as measured, `(count,)`; of a
            latent diffusion, in its latents.
    """

    code: Code
    rounds: int
    decoding: int
    nfe: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Encoding:
    """Codes drawn for images.

    Args:
        code: decoded by the same `Diffusion`, it gives the images back.
        rounds: batched network calls on the critical path.
        nfe: network evaluations of each image.
    """

    code: Code
    rounds: int
    nfe: int


@dataclass(frozen=True)
class Diffusion:
    """A diffusion model with the plan it is sampled by.

    Args:
        model: network and process.
        plan: any solver's, or `Adaptive` steps.
        dtype: of the states.
        device: of the states; by default the network's.
    """

    model: Model
    plan: Plan | Adaptive
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.plan.process != self.model.process:
            raise PushforwardError(
                f"The plan is for process {self.plan.process.name!r}, model {self.model.name!r} for another: "
                f"{self.model.process.name!r}, or the same with other parameters."
            )

    def draw(self, count: int, *, seed: int = 0, first: int = 0) -> Code:
        """The codes of the images of `sample`, `count` of them, where the network is.

        Raises:
            PushforwardError: a count below 1.
        """
        if count < 1:
            raise PushforwardError(f"Draw at least 1 code; got {count}.")
        stream = GaussianStream(seed, range(first, first + count), self.model.state_shape(1)[1:])
        noises = 0 if isinstance(self.plan, Adaptive) else len(self.plan.noises)
        return stream.code(noises, torch.empty(0, dtype=self.dtype, device=self._device))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        labels: Labels | int = IN_TURN,
        guidance: float = 1.0,
        batch: int = 64,
        parallel: Parallel | None = None,
        callback: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """`count` images in [-1, 1], `(count, channels, height, width)`, on the CPU.

        Args:
            count: how many.
            seed: of the codes; image i depends on the seed and `first + i` alone.
            first: number of the first image.
            labels: classes, by name or number, or prompts, one an image or one for all. By default the model's classes,
                or the captions that it knows, in turn, as `in_turn` has them; `None` is without.
            guidance: weight of classifier-free guidance; 1 is plain.
            batch: images at a time.
            parallel: run all steps at once, so; the images are the same to its tolerance, or a warning says that they
                may not be.
            callback: told after every network call (`Progress`), or round (`Round`).
        """
        if parallel is not None:
            found = list(self.solved(count, parallel, seed=seed, first=first, labels=labels, guidance=guidance,
                                     batch=batch, callback=callback))  # fmt: skip
            left = torch.cat([solution.residual.cpu() for _, solution in found])
            if missed := int((~(left <= parallel.tolerance)).sum()):
                warnings.warn(
                    f"{missed} of {count} images may be further from the sequential ones than the tolerance of "
                    f"{parallel.tolerance:g}: their errors are estimated at {float(left.max()):.1e} at most",
                    stacklevel=2,
                )
            return torch.cat([images for images, _ in found])
        pieces = self._pieces(count, seed, first, labels, guidance, batch)
        return torch.cat([self._run(*piece, callback).float().cpu() for piece in pieces])

    @torch.no_grad()
    def solved(
        self,
        count: int,
        parallel: Parallel,
        *,
        seed: int = 0,
        first: int = 0,
        labels: Labels | int = IN_TURN,
        guidance: float = 1.0,
        batch: int = 64,
        callback: Callable[[Round], None] | None = None,
    ) -> Iterator[tuple[Tensor, Solution]]:
        """As `sample` with all steps at once, batch after batch: its images, and how they were found.

        Raises:
            PushforwardError: adaptive steps, which cannot be taken at once.
        """
        for model, start, noise in self._pieces(count, seed, first, labels, guidance, batch):
            solution = self._solve(model, start, noise, parallel, callback)
            yield model.images(solution.last).float().cpu(), solution

    def fastest(self, batch: int, method: Parallel) -> tuple[Parallel | None, str]:
        """The way of running the plan that should be fastest here, `None` for step by step, and why.

        Args:
            batch: images at a time.
            method: how all steps would be taken at once; its window is chosen.
        """
        if isinstance(self.plan, Adaptive):
            return None, "adaptive steps follow one another; running sequentially"
        like = torch.zeros(self.model.state_shape(batch), dtype=self.dtype, device=self._device)
        latency = measured(Sharded(self._given(None, 1.0).denoiser), self.model.process, like)
        choice = choose(self.plan, latency, batch, method=method)
        return choice.method, choice.reason

    def _pieces(
        self, count: int, seed: int, first: int, labels: Labels | int, guidance: float, batch: int
    ) -> Iterator[tuple[Model, Tensor, Noise]]:
        """Model, terminal states and noises of each batch, with all arguments checked before the first."""
        if count < 1 or batch < 1:
            raise PushforwardError(f"Sampling needs a count and a batch of at least 1; got {count} and {batch}.")
        check_images(count, self.model.image_shape or self.model.shape)
        if isinstance(labels, str) and labels == IN_TURN:
            labels = in_turn(self.model, count, first)
        self._given(labels, guidance, count)
        for begin in range(0, count, batch):
            end = min(begin + batch, count)
            some = slice(begin, end)
            stream = GaussianStream(seed, range(first + begin, first + end), self.model.state_shape(1)[1:])
            start = self.start(stream.draw())
            yield self.model.some(some).given(take_labels(labels, some), guidance), start, stream.noise

    def decode(
        self,
        code: Code,
        labels: Labels | int = None,
        guidance: float = 1.0,
        *,
        parallel: Parallel | None = None,
        gradient: Gradient | None = None,
        parameters: Sequence[Tensor] = (),
        callback: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """The images behind a code, `(count, channels, height, width)`, where the network is.

        Differentiable in the code; `gradient` says how. Without it, autograd keeps every network call's graph.

        Args:
            code: of as many noises as the plan takes.
            labels: classes `(count,)`, or as many prompts, for a model that takes them.
            guidance: weight of classifier-free guidance; 1 is plain.
            parallel: run all steps at once, so.
            gradient: how gradients reach the code and the `parameters` (see `execute.adjoint`): `Exact()` with the
                memory of one network call, `Implicit()` in a few rounds, `Phantom()`, `Skeleton()`.
            parameters: other tensors that shall get gradients by that way: network weights, a condition.
            callback: told after every network call or round.

        Raises:
            PushforwardError: the code does not fit the plan.
        """
        count = 0 if isinstance(self.plan, Adaptive) else len(self.plan.noises)
        given = 0 if code.noises is None else len(code.noises)
        if given != count:
            raise PushforwardError(
                f"The plan takes {count} noises, the code has {given}; decode it with the plan that it was made by."
            )
        model = self._given(labels, guidance, len(code))
        rest = _Rest(code.end, code.residual)
        noises = iter(() if code.noises is None else code.noises)
        start = self.start(code.start)
        if gradient is not None and not isinstance(self.plan, Adaptive):
            method = None if parallel is None else _referenced(parallel, model)
            if isinstance(gradient, Implicit | Phantom) and gradient.reference is None:
                gradient = replace(gradient, reference=model.gaussian.tempered())
            final = differentiable(self.plan, model.denoiser, start, noise=code.noises, gradient=gradient,
                                   method=method, parameters=parameters, callback=callback)  # fmt: skip
            return model.images(self._clean(final, rest))
        if parallel is None:
            return self._run(model, start, lambda _: next(noises).to(start), callback, rest)
        final = self._solve(model, start, lambda _: next(noises).to(start), parallel, callback).last
        return model.images(self._clean(final, rest))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        labels: Labels | int = None,
        guidance: float = 1.0,
        *,
        seed: int = 0,
        first: int | Sequence[int] = 0,
        independent: bool = False,
        sequential: bool = False,
        rows: int = 64,
        callback: Callable[[int], None] | None = None,
    ) -> Encoding:
        """Codes of images under a stochastic plan (DPM-Encoder), drawn from all that decode to them.

        Args:
            images: in [-1, 1], `(count, channels, height, width)`.
            labels: classes `(count,)` or as many prompts, for a model that has them.
            guidance: weight of classifier-free guidance.
            seed: of the path of states; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.
            independent: draw the states independently of one another ("edit-friendly" codes), not as a path.
            sequential: take as many rounds as steps: no rounding adds up.
            rows: states that the network sees at a time.
            callback: told after every network call how many states it saw.

        Raises:
            PushforwardError: a deterministic plan, adaptive steps, or images of another shape.
        """
        if isinstance(self.plan, Adaptive):
            raise PushforwardError(
                "Adaptive steps are deterministic and take no noises; name a stochastic solver, e.g. ddpm."
            )
        model, process = self._given(labels, guidance, len(images)), self.model.process
        clean = self._state(images)
        stream = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
        z = self._noised(clean, stream)
        found = encode(self.plan, Sharded(model.denoiser), clean, start=self.start(z), draw=stream.draw,
                       independent=independent, sequential=sequential, rows=rows, callback=callback)  # fmt: skip
        time, end, residual = self.plan.times[-1:], None, None
        if float(time) > 0:
            gap = found.last - process.signal(time)[0](clean)
            end = process.covariance(time).cholesky()[0].inverse()(gap)
        else:
            residual = clean - found.last
        return Encoding(Code(z, found.noises, end, residual), found.rounds, found.nfe)

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        labels: Labels | int = None,
        guidance: float = 1.0,
        *,
        seed: int = 0,
        first: int | Sequence[int] = 0,
        noisy: bool = True,
        parallel: Parallel = INVERSE,
        callback: Callable[[Round], None] | None = None,
    ) -> Inversion:
        """The codes behind images, by a deterministic plan that ends above time 0, as exactly as rounding allows.

        The image is taken as the clean part of the last state. A state at that time carries noise, so noise of its
        level is added, drawn once and kept in the code; without it (`noisy=False`) codes are less Gaussian.

        Args:
            images: in [-1, 1], `(count, channels, height, width)`.
            labels: classes `(count,)`, or as many prompts, for a model that takes them.
            guidance: weight of classifier-free guidance; strong guidance may have no inverse.
            seed: of the noise on the last state; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.
            noisy: whether there is such noise.
            parallel: how to solve, and to what tolerance of `Inversion.residual`. Its reference is, by default, the
                model's data's spectrum drawn towards white, with 0.15 of its size: what answers near an image respond
                to is less than all data. Images that fail so are tried again with its full size.
            callback: told after every round.

        Raises:
            PushforwardError: a stochastic plan, adaptive steps, a plan that ends at 0, or images of another shape or
                that are not finite.
        """
        if isinstance(self.plan, Adaptive):
            raise PushforwardError("Adaptive steps have no inverse; name a solver, e.g. ddim.")
        model, process = self._given(labels, guidance, len(images)), self.model.process
        clean = self._state(images)
        end = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:]).draw() if noisy else None
        time = self.plan.times[-1:]
        state = clean
        if end is not None:
            end = end.to(state)
            signal = process.signal(time)[0](clean)
            state = signal + process.covariance(time).cholesky()[0](end)
        back = process.signal(time)[0].inverse()

        def error(gap: Tensor) -> Tensor:
            return process.image(back(gap)).flatten(1).abs().amax(1)

        found = invert(self.plan, Sharded(model.denoiser), state, clean=clean if noisy else None, error=error,
                       method=_referenced(parallel, model, LOCAL[0]), callback=callback)  # fmt: skip
        first_state, residual, nfe = found.first, found.residual, found.nfe
        rounds, decoding = found.rounds, found.decoding
        for scale in LOCAL[1:] if parallel.reference is None else ():
            bad = (~(residual <= max(FAILED, parallel.tolerance))).nonzero()[:, 0]
            if not len(bad):
                break
            some = self.model.some(bad.cpu()).given(take_labels(labels, bad.cpu()), guidance)
            again = invert(self.plan, Sharded(some.denoiser), state[bad], clean=clean[bad] if noisy else None,
                           error=error, method=_referenced(parallel, some, scale), callback=callback)  # fmt: skip
            better = again.residual < residual[bad]
            first_state[bad[better]], residual[bad[better]] = again.first[better], again.residual[better]
            rounds, decoding = rounds + again.rounds, decoding + again.decoding
            nfe[bad] += again.nfe
        return Inversion(Code(self.code(first_state), end=end), rounds, decoding, nfe, residual)

    @torch.no_grad()
    def perturb(self, images: Tensor, *, seed: int = 0, first: int | Sequence[int] = 0) -> Code:
        """Codes of images that are noised to the plan's first time, with fresh noises for its steps (SDEdit).

        They know nothing of the network, and decode to images that are like these as far as the first state is.

        Args:
            images: in [-1, 1], `(count, channels, height, width)`.
            seed: of the noise; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.

        References:
            SDEdit, Meng et al., arXiv 2108.01073, algorithm 1.
        """
        clean = self._state(images)
        stream = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
        start = self._noised(clean, stream)
        count = 0 if isinstance(self.plan, Adaptive) else len(self.plan.noises)
        return Code(start, torch.stack([stream.draw() for _ in range(count)]).to(start) if count else None)

    def _state(self, images: Tensor) -> Tensor:
        """The clean state of images in [-1, 1]: themselves or their latents, without velocity."""
        if not images.is_floating_point():
            raise PushforwardError(
                f"Images are floating-point numbers in [-1, 1]; got {images.dtype}: divide bytes by 127.5, less 1."
            )
        bad = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise PushforwardError(
                f"Images must be of finite numbers; {len(bad)} of {len(images)} are not, the first at place {bad[0]}."
            )
        return self.model.process.lift(self.model.latents(images.to(device=self._device, dtype=self.dtype)))

    def _noised(self, clean: Tensor, stream: GaussianStream) -> Tensor:
        """The code of a state drawn from `q(u_0 | x)` at the plan's first time."""
        process, time = self.model.process, self.plan.times[:1]
        signal, spread = process.signal(time)[0], process.covariance(time).cholesky()[0]
        return self.code(signal(clean) + spread(stream.draw().to(clean)))

    @property
    def _device(self) -> torch.device | str:
        parameters = () if self.model.module is None else self.model.module.parameters()
        return self.device or next((p.device for p in parameters), torch.device("cpu"))

    def start(self, z: Tensor) -> Tensor:
        """The terminal state whose code is `z (batch, k * channels, *field)`: `Psi m + R z`."""
        z = z.to(device=self._device, dtype=self.dtype)
        return root(self.model.process, self.plan.times[:1], self.model.reference)[0](z) + self._mean(z)

    def code(self, start: Tensor) -> Tensor:
        """The other way: z of a terminal state."""
        inverse = root(self.model.process, self.plan.times[:1], self.model.reference)[0].inverse()
        return inverse(start - self._mean(start))

    def _mean(self, like: Tensor) -> Tensor | float:
        """Mean of the terminal state for data of the reference."""
        reference, process, time = self.model.reference, self.model.process, self.plan.times[:1]
        mean = reference.mean_state(process, like)
        return 0.0 if mean is None else process.signal(time)[0](mean)

    def _given(self, labels: Labels | int, guidance: float, count: int | None = None) -> Model:
        labels = listed(labels)
        given = self.model.conditions if labels is None else len(labels)
        if count is not None and given not in (0, 1, count):
            raise PushforwardError(f"{count} images need as many labels or prompts; got {given}.")
        return self.model.to(self._device).given(labels, guidance)

    def _run(
        self,
        model: Model,
        start: Tensor,
        noise: Noise,
        callback: Callable[[Any], None] | None,
        rest: _Rest | None = None,
    ) -> Tensor:
        """The images that the plan makes of a terminal state, step by step."""
        if isinstance(self.plan, Adaptive):
            final = self.plan.run(model.denoiser, start, callback)
        else:
            final = run(self.plan, model.denoiser, start, noise=noise, callback=callback)
        return model.images(self._clean(final, rest))

    def _solve(
        self, model: Model, start: Tensor, noise: Noise, method: Parallel, callback: Callable[[Round], None] | None
    ) -> Solution:
        """The same states with all steps at once."""
        if isinstance(self.plan, Adaptive):
            raise PushforwardError(
                "Adaptive steps follow one another and cannot be taken at once; name a solver, e.g. ddim."
            )
        method = _referenced(method, model)
        return parallel(self.plan, Sharded(model.denoiser), start, noise=noise, method=method, callback=callback)

    def _clean(self, state: Tensor, rest: _Rest | None) -> Tensor:
        """The clean state in a last state of which it is known what is left on it."""
        if rest is not None and rest.end is not None:
            process, time = self.model.process, self.plan.times[-1:]
            signal = state - process.covariance(time).cholesky()[0](rest.end.to(state))
            state = process.signal(time)[0].inverse()(signal)
        return state if rest is None or rest.residual is None else state + rest.residual.to(state)


class _Rest(NamedTuple):
    """What is left on a last state, as a `Code` has it."""

    end: Tensor | None
    residual: Tensor | None


def _referenced(method: Parallel, model: Model, scale: float = 1.0) -> Parallel:
    """The method with the data of the (conditioned) model as its reference, if it has no other."""
    if method.reference is not None:
        return method
    return replace(method, reference=model.gaussian.tempered(scale=scale))
