"""A plan that is run forwards by an executor and backwards by a mode of differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pushforward.denoiser import Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.adjoint.modes import EXACT, Gradient
from pushforward.execute.adjoint.products import Gradients, Task
from pushforward.execute.adjoint.sweep import sweep
from pushforward.execute.parallel import Parallel, Round, Solution, Subset, parallel
from pushforward.execute.sequential import Noise, Progress, run
from pushforward.plan import Plan

__all__ = ["differentiable"]


def differentiable(
    plan: Plan,
    denoiser: Denoiser,
    start: Tensor,
    *,
    noise: Tensor | Noise | None = None,
    gradient: Gradient = EXACT,
    method: Parallel | None = None,
    parameters: Sequence[Tensor] = (),
    callback: Callable[[Any], None] | None = None,
    backward: Callable[[Round], None] | None = None,
    found: Callable[[Solution], None] | None = None,
) -> Tensor:
    """Return what `run` does, with gradients that do not need the whole chain's memory.

    Kept for the backward pass are the states that the network was asked about (`torch.autograd.graph.save_on_cpu`
    keeps them elsewhere). The network is called again there, so it must answer the same: no dropout.

    Args:
        plan: coefficients, of any solver.
        denoiser: the network.
        start: first state, `(batch, k * channels, *field)`.
        noise: noise of the nodes `plan.noises`: stacked, `(n, batch, k * channels, *field)`; or as in `run`, and then
            it gets no gradient.
        gradient: how the gradient is computed.
        method: run all steps at once as this says; by default one after another.
        parameters: tensors that the denoiser uses and that shall get gradients, leaves or not: weights, a condition.
            The very tensors, and none that is computed from another one.
        callback: callback of the forward pass, as in `run` (`Progress`) or, with a method, in `parallel` (`Round`).
        backward: told after every round of `Implicit`.
        found: told the solution where all steps are run at once.

    Returns:
        The last state, shaped like `start`. It can be differentiated once.

    Raises:
        PushforwardError: as `run`; an `Exact` gradient of an implicit plan; noises of a wrong shape; noise that
            requires gradients but is not stacked; or parameters of which one is computed from another.
    """
    gradient.check(plan)
    if isinstance(noise, Tensor):
        expected = (len(plan.noises), *start.shape)
        if tuple(noise.shape) != expected:
            raise PushforwardError(
                f"The noises of this plan of {plan.solver!r} have shape {expected}; got {tuple(noise.shape)}."
            )
        noise = noise.to(start)
    chain = _Chain(plan, denoiser, gradient, method, callback, backward, found, _precision(start))
    wanted = tuple({id(p): p for p in parameters if p.requires_grad}.values())
    stacked = noise if isinstance(noise, Tensor) else None
    if not torch.is_grad_enabled() or not (
        wanted or start.requires_grad or (stacked is not None and stacked.requires_grad)
    ):
        with torch.no_grad():
            return chain.last(start, _drawing(plan, noise))
    _check_independent(wanted)
    last: Tensor = _Adjoint.apply(chain, noise if stacked is None else None, start, stacked, *wanted)
    return last


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: _Chain, noise: Noise | None, start: Tensor, stacked: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        last, states = chain.solved(start, _drawing(chain.plan, _ungraded(noise) if stacked is None else stacked))
        ctx.chain, ctx.parameters = chain, parameters
        ctx.save_for_backward(states, *parameters)  # parameters only to notice that they were changed in place
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states = ctx.saved_tensors[0]
        on_start, on_noise = ctx.needs_input_grad[2:4]
        with ctx.chain.precision:
            found = ctx.chain.gradients(states, gradient, ctx.parameters)
        return (None, None, found.start if on_start else None, found.noises if on_noise else None, *found.parameters)


@dataclass(frozen=True, eq=False)
class _Chain:
    """A plan with its network: states forwards, gradients backwards."""

    plan: Plan
    denoiser: Denoiser
    gradient: Gradient
    method: Parallel | None
    callback: Callable[[Any], None] | None
    backward: Callable[[Round], None] | None
    found: Callable[[Solution], None] | None
    precision: torch.autocast

    def last(self, start: Tensor, noise: Noise | None) -> Tensor:
        """Return the last state alone."""
        if self.method is None:
            return run(self.plan, self.denoiser, start, noise=noise, callback=self.callback)
        return self._at_once(start, noise, self.method).last

    def solved(self, start: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Return the last state, and those that the network was asked about, `(nfe, batch, k * channels, *field)`."""
        plan, method = self.plan, self.method
        if method is None:
            return _recorded(plan, self.denoiser, start, noise, self.callback)
        drawn = {} if noise is None else {n: noise(n) for n in plan.noises}
        again = None if noise is None else drawn.__getitem__
        solution = self._at_once(start, again, method)
        last, states = solution.last.clone(), solution.states[list(plan.asked)]
        bad = solution.diverged.nonzero()[:, 0]
        if len(bad):  # only their last state is right
            some = None if noise is None else lambda n: drawn[n].to(start)[bad]
            last[bad], states[:, bad] = _recorded(plan, Subset(self.denoiser, bad), start[bad], some, None)
        return last, states

    def _at_once(self, start: Tensor, noise: Noise | None, method: Parallel) -> Solution:
        solution = parallel(self.plan, self.denoiser, start, noise=noise, method=method, callback=self.callback)
        if self.found is not None:
            self.found(solution)
        return solution

    def gradients(self, states: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> Gradients:
        """Return gradients of a loss whose gradient in the last state is given, at these states."""
        reference = None if self.method is None else self.method.reference
        task = Task(self.plan, self.denoiser, states, gradient, parameters, reference, self.backward)
        return self.gradient.gradients(task) if len(states) else sweep(task)


def _recorded(
    plan: Plan, denoiser: Denoiser, start: Tensor, noise: Noise | None, callback: Callable[[Any], None] | None
) -> tuple[Tensor, Tensor]:
    """Return the last state, and those that the network was asked about."""
    states = start.new_empty(plan.nfe, *start.shape)

    def record(progress: Progress) -> None:
        states[progress.call] = progress.state
        if callback is not None:
            callback(progress)

    return run(plan, denoiser, start, noise=noise, callback=record).clone(), states


def _drawing(plan: Plan, noise: Tensor | Noise | None) -> Noise | None:
    """Return noise as `run` asks for it."""
    return dict(zip(plan.noises, noise.detach(), strict=True)).__getitem__ if isinstance(noise, Tensor) else noise


def _ungraded(noise: Noise | None) -> Noise | None:
    """Return the same noise, unless it asks for gradients, which would be lost."""
    if noise is None:
        return None

    def drawn(n: int) -> Tensor:
        with torch.enable_grad():
            value = noise(n)
        if value.requires_grad:
            raise PushforwardError(
                "Noise gets gradients only if it is given as one tensor, (n, batch, k * channels, *field)."
            )
        return value

    return drawn


def _precision(like: Tensor) -> torch.autocast:
    """Return the present autocast, to be entered again when the network is called again."""
    kind = like.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _check_independent(parameters: Sequence[Tensor]) -> None:
    """Raise if one is computed from another, whose gradient would count twice."""
    edges = [torch.autograd.graph.get_gradient_edge(p) for p in parameters]
    targets = {(edge.node, edge.output_nr): i for i, edge in enumerate(edges)}
    for i, edge in enumerate(edges):
        seen, waiting = {edge.node}, [edge.node]
        while waiting:
            for node, output in waiting.pop().next_functions:
                if node is None:
                    continue
                if (node, output) in targets:
                    raise PushforwardError(
                        f"Parameter {i} is computed from parameter {targets[node, output]}, so that gradients would "
                        "count twice; give only one of them."
                    )
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
