"""A diffusion model with a plan, as a map from Gaussian codes to images.

Its code is the terminal state, in units of the marginal's root, the noises of a stochastic plan, and what is left on
the last state: noise, where the plan ends above time 0, or a residual.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute import INVERSE, Noise, Parallel, Round, Solution, encode, invert, parallel, run
from pushforward.execute.adjoint import Gradient, differentiable
from pushforward.execute.autotune import choose, measured
from pushforward.execute.density import Path, check_stochastic, log_densities, walk
from pushforward.execute.distributed import Sharded
from pushforward.execute.inverse import Inverse
from pushforward.linear import Operator
from pushforward.maps.base import ModelMap
from pushforward.maps.code import Code, GaussianStream, batches, numbered
from pushforward.maps.inversion import Encoding, Inversion
from pushforward.maps.labels import UNSAID, Unsaid
from pushforward.model import Model
from pushforward.plan import Plan

__all__ = ["Diffusion"]

LOCAL = (0.15, 1.0)  # sizes of the reference, in parts of the data's, that inversion tries in turn
FAILED = 1e-2  # error of an image above which the next is tried; what is below it is rounding, or not to be had


@dataclass(frozen=True, eq=False)
class Diffusion(ModelMap):
    """A diffusion model with the plan it is sampled by.

    It is bound to a condition by `given` and to a way of running by `run_by`, and keeps both through all it does:

        shirts = Diffusion(model, plan).given(labels="shirt", guidance=2)
        images = shirts.run_by(parallel=Parallel()).sample(16)

    Args:
        model: network and process; one that has been given a condition keeps it.
        plan: any solver's.
        dtype: dtype of the states.
        device: device of the states; by default the network's.
        labels: see `given`.
        guidance: see `given`.
        parallel: see `run_by`.
        gradient: see `run_by`.
        parameters: see `run_by`.
    """

    plan: Plan
    _: KW_ONLY
    parallel: Parallel | None = None
    gradient: Gradient | None = None
    parameters: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            raise PushforwardError(f"A map is made of a plan, as model.plan('ddim', 20) gives it; got {self.plan!r}.")
        if self.plan.process != self.model.process:
            raise PushforwardError(
                f"The plan is for process {self.plan.process.name!r}, model {self.model.name!r} for another: "
                f"{self.model.process.name!r}, or the same with other parameters."
            )

    def __repr__(self) -> str:
        """Show the model by its name, the plan by its size, and what the map is bound to."""
        said: dict[str, object] = {"steps": len(self.plan.steps) - 1, "nfe": self.plan.nfe}
        if self.said and self.bound.conditions:
            said["conditions"] = self.bound.conditions
        if self.guidance is not None:
            said["guidance"] = f"{self.guidance:g}"
        ways = {"parallel": self.parallel, "gradient": self.gradient}
        said |= {name: type(way).__name__ for name, way in ways.items() if way is not None}
        told = (f"{name}={value}" for name, value in said.items())
        return f"Diffusion({', '.join([self.model.name, self.plan.solver, *told])})"

    @property
    def times(self) -> Tensor:
        """Times of the plan's states, `(steps + 1,)`, decreasing."""
        return self.plan.times

    @property
    def noises(self) -> int:
        """Noises of a code: as many as the plan takes."""
        return len(self.plan.noises)

    @property
    def settings(self) -> Mapping[str, object]:
        """Settings of the plan's solver."""
        return self.plan.settings

    def run_by(
        self,
        *,
        parallel: Parallel | Unsaid | None = UNSAID,
        gradient: Gradient | Unsaid | None = UNSAID,
        parameters: Sequence[Tensor] | Unsaid = UNSAID,
    ) -> Self:
        """The same map, run in another way; what is not said stays as it is.

        Args:
            parallel: how `sample` and `decode` take all steps at once; `None`: one after another, as at first. Images
                are the same to its tolerance.
            gradient: how gradients reach the code of `decode` and the `parameters` (see `execute.adjoint`): `Exact()`
                with the memory of one network call, `Implicit()` in a few rounds, `Phantom()`, `Skeleton()`. `None`,
                as at first: autograd keeps every network call's graph.
            parameters: other tensors that shall get gradients by that way: network weights, a condition.
        """
        asked = {"parallel": parallel, "gradient": gradient, "parameters": parameters}
        said: dict[str, Any] = {name: value for name, value in asked.items() if not isinstance(value, Unsaid)}
        return self._changed(self._known, **said)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int = 64,
        callback: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """`count` images in [-1, 1], `(count, channels, height, width)`, on the CPU.

        A map without a condition draws the model's classes, or the captions that it knows, in turn (see `given`). With
        all steps at once, a warning says how many images may be further from the sequential ones than the tolerance,
        unless a number of rounds was asked for.

        Args:
            count: how many.
            seed: seed of the codes; image i depends on the seed and `first + i` alone.
            first: number of the first image.
            batch: images at a time.
            callback: told after every network call (`Progress`), or round (`Round`).
        """
        if self.parallel is None:
            pieces = self._batches(count, seed, first, batch)
            made = (there._run(there.model_for(len(start)), start, stream.noise, callback)
                    for there, start, stream in pieces)  # fmt: skip
            return torch.cat([images.float().cpu() for images in made])
        found = list(self.solved(count, seed=seed, first=first, batch=batch, callback=callback))
        left = torch.cat([solution.residual.cpu() for _, solution in found])
        missed = int((~(left <= self.parallel.tolerance)).sum())
        if missed and self.parallel.rounds is None:
            warnings.warn(
                f"{missed} of {count} images may be further from the sequential ones than the tolerance of "
                f"{self.parallel.tolerance:g}: their errors are estimated, on the safe side and often far, at "
                f"{float(left.max()):.1e} of an image's size at most. Allow more rounds or a larger tolerance, or "
                "compare with the images of `parallel=None`.",
                stacklevel=2,
            )
        return torch.cat([images for images, _ in found])

    @torch.no_grad()
    def solved(
        self,
        count: int,
        *,
        seed: int = 0,
        first: int = 0,
        batch: int = 64,
        callback: Callable[[Round], None] | None = None,
    ) -> Iterator[tuple[Tensor, Solution]]:
        """As `sample` with all steps at once, batch after batch: its images, and how they were found.

        Raises:
            PushforwardError: the steps are not taken at once; see `run_by`.
        """
        for there, start, stream in self._batches(count, seed, first, batch):
            model = there.model_for(len(start))
            solution = there._solve(model, start, stream.noise, callback)
            yield model.images(solution.last).float().cpu(), solution

    def fastest(self, batch: int, method: Parallel) -> tuple[Parallel | None, str]:
        """The way of running the plan that should be fastest here, `None` for step by step, and why.

        Args:
            batch: images at a time.
            method: how all steps would be taken at once; its window is chosen.
        """
        like = torch.zeros(self.model.state_shape(batch), dtype=self.dtype, device=self._place)
        model = self.in_turn(1).some(slice(0, 1)).bound
        latency = measured(Sharded(model.denoiser), model.process, like)
        choice = choose(self.plan, latency, batch, method=method)
        return choice.method, choice.reason

    def decode(
        self,
        code: Code,
        *,
        callback: Callable[[Any], None] | None = None,
        found: Callable[[Solution], None] | None = None,
    ) -> Tensor:
        """The images behind a code, `(count, channels, height, width)`, where the network is.

        Differentiable in the code, in the way that `run_by` says.

        Args:
            code: of as many noises as the plan takes.
            callback: told after every network call or round.
            found: told the solution where all steps are taken at once; `Parallel(start=solution)` begins there when
                codes, condition or guidance are like these.

        Raises:
            PushforwardError: the code does not fit the plan.
        """
        self._check_code(code)
        model, start, gradient = self.model_for(len(code)), self.start(code.start), self.gradient
        if gradient is not None:
            method = None if self.parallel is None else _referenced(self.parallel, model)
            gradient = gradient.with_reference(model.gaussian.tempered())
            final = differentiable(self.plan, model.denoiser, start, noise=code.noises, gradient=gradient,
                                   method=method, parameters=self.parameters, callback=callback,
                                   found=found)  # fmt: skip
            return model.images(self._clean(final, code))
        if self.parallel is None:
            return self._run(model, start, code.replay(start), callback, code)
        solution = self._solve(model, start, code.replay(start), callback)
        if found is not None:
            found(solution)
        return model.images(self._clean(solution.last, code))

    @torch.no_grad()
    def path(self, code: Code) -> Path:
        """The random states on the way from a code to its image, where the network is; see `log_prob` and `images`.

        Raises:
            PushforwardError: a deterministic plan, or a code that does not fit the plan.
        """
        self._check_code(code)
        check_stochastic(self.plan)
        model, start = self.model_for(len(code)), self.start(code.start)
        return walk(self.plan, model.denoiser, start, code.replay(start))

    def log_prob(self, path: Path, *, moves: Sequence[int] | None = None, rows: int = 64) -> Tensor:
        """The logarithm of the density of each random move of a path under this model, `(moves, batch)`.

        Differentiable in the network's parameters, for policy gradients; the sum over the moves is the path's, given
        where it begins (see `execute.density`).

            path = diffusion.path(diffusion.draw(16, seed=0))
            reward = score(diffusion.images(path))
            loss = -(reward * diffusion.log_prob(path).sum(0)).mean()

        Args:
            path: of this plan, under this model's parameters or earlier ones.
            moves: numbers of the moves, counted from 0; all by default, whose graph is that of as many network calls.
            rows: states that the network sees at a time.

        Raises:
            PushforwardError: a deterministic or implicit plan, or a path of another plan.
        """
        return log_densities(self.plan, self.model_for(len(path.start)).denoiser, path, moves=moves, rows=rows)

    def images(self, path: Path) -> Tensor:
        """The images in which a path ends, `(batch, channels, height, width)`, where the network is."""
        return self.model_for(len(path.start)).images(path.last)

    def clean_states(self, images: Tensor) -> Tensor:
        """The clean states of images in [-1, 1], where the network is: themselves or their latents, without velocity.

        Raises:
            PushforwardError: they are no images of the model, or it has no encoder.
        """
        self.model.check_images(images)
        return self.model.process.lift(self.model.latents(images.to(device=self._place, dtype=self.dtype)))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
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
            seed: seed of the path of states; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.
            independent: draw the states independently of one another ("edit-friendly" codes), not as a path.
            sequential: take as many rounds as steps: no rounding adds up.
            rows: states that the network sees at a time.
            callback: told after every network call how many states it saw.

        Raises:
            PushforwardError: a deterministic plan, or images of another shape.
        """
        clean = self.clean_states(images)
        batches(len(images), rows)  # which checks them
        model = self.model_for(len(images))
        stream = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
        z = self._noised(clean, stream)
        found = encode(self.plan, Sharded(model.denoiser), clean, start=self.start(z), draw=stream.draw,
                       independent=independent, sequential=sequential, rows=rows, callback=callback)  # fmt: skip
        if float(self.plan.times[-1]) > 0:
            signal, spread = self._kernel(-1)
            code = Code(z, found.noises, end=spread.inverse()(found.last - signal(clean)))
        else:
            code = Code(z, found.noises, residual=clean - found.last)
        return Encoding(code, self, found.rounds, found.nfe)

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        *,
        seed: int = 0,
        first: int | Sequence[int] = 0,
        noisy: bool = True,
        begin: Code | None = None,
        sequential: bool = False,
        parallel: Parallel = INVERSE,
        callback: Callable[[Round], None] | None = None,
    ) -> Inversion:
        """The codes behind images, by a deterministic plan that ends above time 0, as exactly as rounding allows.

        The image is taken as the clean part of the last state. A state at that time carries noise, so noise of its
        level is added, drawn once and kept in the code; without it (`noisy=False`) codes are less Gaussian. Strong
        guidance may have no inverse.

        Args:
            images: in [-1, 1], `(count, channels, height, width)`.
            seed: seed of the noise on the last state; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.
            noisy: whether there is such noise.
            begin: codes to begin at, by default those of a reference; with strong guidance an image may have several.
            sequential: solve for one state after another, where the plan has one answer per step: with a quarter of the
                network evaluations, in some six times as many rounds: for a CPU, or one image of a large model.
            parallel: how to solve for the states, whichever way the map is run forwards, and to what tolerance of
                `Inversion.residual`. Its reference is, by default, the spectrum of the model's data drawn towards
                white, with 0.15 of its size: what answers near an image respond to is less than all data. Images that
                fail so are tried again with its full size; if `sequential`, all that miss the tolerance.
            callback: told after every round.

        Raises:
            PushforwardError: a stochastic plan, a plan that ends at 0, or images of another shape or that are not
                finite.
        """
        process, clean = self.model.process, self.clean_states(images)
        self.model_for(len(images))
        stream = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
        end = stream.draw().to(clean) if noisy else None
        signal, spread = self._kernel(-1)
        state = clean if end is None else signal(clean) + spread(end)
        back, start = signal.inverse(), None if begin is None else self.start(begin.start)

        def error(gap: Tensor) -> Tensor:
            return process.image(back(gap)).flatten(1).abs().amax(1)

        def find(images: Tensor, scale: float) -> Inverse:
            some = self.some(images).model_for(len(images))
            return invert(self.plan, Sharded(some.denoiser), state[images], clean=clean[images] if noisy else None,
                          begin=None if start is None else start[images], method=_referenced(parallel, some, scale),
                          sequential=sequential, error=error, callback=callback)  # fmt: skip

        found = find(torch.arange(len(images), device=state.device), LOCAL[0])
        first_state, residual, nfe = found.first, found.residual, found.nfe
        rounds, decoding = found.rounds, found.decoding
        enough = parallel.tolerance if sequential else max(FAILED, parallel.tolerance)
        for scale in LOCAL[1:] if parallel.reference is None else ():
            bad = (~(residual <= enough)).nonzero()[:, 0]
            if not len(bad):
                break
            again = find(bad, scale)
            better = again.residual < residual[bad]
            first_state[bad[better]], residual[bad[better]] = again.first[better], again.residual[better]
            rounds, decoding = rounds + again.rounds, decoding + again.decoding
            nfe[bad] += again.nfe
        return Inversion(Code(self.code(first_state), end=end), self, rounds, decoding, nfe, residual)

    @torch.no_grad()
    def perturb(self, images: Tensor, *, seed: int = 0, first: int | Sequence[int] = 0) -> Code:
        """Codes of images that are noised to the plan's first time, with fresh noises for its steps (SDEdit).

        They know nothing of the network, and decode to images that are like these as far as the first state is.

        Args:
            images: in [-1, 1], `(count, channels, height, width)`.
            seed: seed of the noise; image i's depends on the seed and its number alone.
            first: number of the first image, or the number of each.

        References:
            SDEdit, Meng et al., arXiv 2108.01073, algorithm 1.
        """
        clean = self.clean_states(images)
        stream = GaussianStream(seed, numbered(first, len(images)), clean.shape[1:])
        start = self._noised(clean, stream)
        noises = [stream.draw() for _ in range(self.noises)]
        return Code(start, torch.stack(noises).to(start) if noises else None)

    def _noised(self, clean: Tensor, stream: GaussianStream) -> Tensor:
        """The code of a state drawn from `q(u_0 | x)` at the plan's first time."""
        signal, spread = self._kernel(0)
        return self.code(signal(clean) + spread(stream.draw().to(clean)))

    def _kernel(self, step: int) -> tuple[Operator, Operator]:
        """The parts of `q(u | x)` at the plan's first (0) or last (-1) time: of the clean state, and of white noise."""
        process, time = self.model.process, self.plan.times[step][None]
        return process.signal(time)[0], process.covariance(time).cholesky()[0]

    def _run(
        self,
        model: Model,
        start: Tensor,
        noise: Noise,
        callback: Callable[[Any], None] | None,
        code: Code | None = None,
    ) -> Tensor:
        """The images that the plan makes of a terminal state, step by step."""
        final = run(self.plan, model.denoiser, start, noise=noise, callback=callback)
        return model.images(final if code is None else self._clean(final, code))

    def _solve(self, model: Model, start: Tensor, noise: Noise, callback: Callable[[Round], None] | None) -> Solution:
        """The same states with all steps at once."""
        if self.parallel is None:
            raise PushforwardError("Say how all steps are to be taken at once: run_by(parallel=Parallel()).")
        method = _referenced(self.parallel, model)
        return parallel(self.plan, Sharded(model.denoiser), start, noise=noise, method=method, callback=callback)

    def _clean(self, state: Tensor, code: Code) -> Tensor:
        """The clean state in a last state, by what the code says is left on it."""
        if code.end is not None:
            signal, spread = self._kernel(-1)
            state = signal.inverse()(state - spread(code.end.to(state)))
        return state if code.residual is None else state + code.residual.to(state)


def _referenced(method: Parallel, model: Model, scale: float = 1.0) -> Parallel:
    """The method with the data of the (conditioned) model as its reference, if it has no other."""
    if method.reference is not None:
        return method
    return replace(method, reference=model.gaussian.tempered(scale=scale))
