r"""Gradients through a plan, at the memory of one network call and the states.

With the states S of all nodes solving `S = A S + B f(S) + N xi + ...` (`execute.system`) and `g` the gradient of a loss
in the last one, the cotangents `lambda` of all states solve the transposed system

    lambda = g + A^T lambda + J^T B^T lambda,        J_n = f_n'(S_n),

in which every node depends on later ones only. From them follow the gradients in the start, `lambda_0`; in the noises,
`N_n^T lambda_n`; and in whatever the network is made of, `sum_n (d f_n / d theta)^T (B^T lambda)_n`. Nothing of the
forward pass is kept but the states that the network was asked about; its calls are made again.

- `Exact` solves node after node, from the last to the first.
- `Implicit` solves for all nodes at once, in rounds of one batch of vector-Jacobian products each. The network's J is
  preconditioned by a response L known beforehand, as in the forward direction:

      (I - A - B L)^T delta = g + A^T lambda + J^T B^T lambda - lambda.

  The start is the reference Gaussian's own adjoint and asks for nothing. A node's product is final as soon as the
  cotangents of the later nodes are, so after as many rounds as the plan has calls the result is exact. (Not so for an
  implicit plan, whose nodes look ahead: its rounds go on until they have converged, and there is no `Exact`.)
- `Phantom` differentiates k damped steps `S <- (1 - tau) S + tau F(S)` of the preconditioned fixed point map
  `F(S) = S + M^-1 (A S + B f(S) + ... - S)`, `M = I - A - B L`, taken at the solution. With `K = I - A - B J` the
  tangent of such a step is `(I - tau M^-1 K) dS + tau M^-1 d(inputs)`, so the transpose of k of them is

      lambda = tau M^-T sum_{i < k} (I - tau K^T M^-T)^i g,

  which is k damped steps for the transposed system from zero, the first of them without the network.
- `Skeleton` is the first of those steps with the noise prediction held, `L = Psi^-1`: the network is constant.

References:
    Deep Equilibrium Approaches to Diffusion Models, Pokle et al., arXiv 2210.12867, section 4 (phantom gradients);
    On Training Implicit Models, Geng et al., arXiv 2111.05177 (phantom gradients);
    Deep Equilibrium Models, Bai et al., arXiv 1909.01377, theorem 1 (implicit gradients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.anderson import Mixing, anderson_step
from pushforward.execute.parallel import (
    GROWTH,
    MIXING,
    ROUNDS,
    SETTLED,
    Parallel,
    Response,
    Round,
    Subset,
    parallel,
    system_of,
)
from pushforward.execute.remainder import tail
from pushforward.execute.sequential import Noise, Progress, compiled, run
from pushforward.execute.system import System
from pushforward.linear import Gaussian, apply_coefficients
from pushforward.plan import Plan, Register

_FLOOR = 1e-3  # cotangents below this part of the image's largest count as that large, so that rounding can settle


@dataclass(frozen=True)
class Exact:
    """The gradient of the sequential sampler: one vector-Jacobian product after another, as many as network calls."""


@dataclass(frozen=True)
class Implicit:
    """The same gradient to a tolerance, with all vector-Jacobian products of a round in one batch.

    Args:
        tolerance: relative error allowed in any state's cotangent.
        max_rounds: stop there even if the tolerance is not met; by default the plan's calls, which suffice.
        response: how answers are expected to move with their states, as in `Parallel`.
        reference: the Gaussian of that response; by default the forward method's.
        mixing: how past rounds are used, or not.
        max_rows: most states in one network call; a round may take several. All by default.
    """

    tolerance: float = 1e-4
    max_rounds: int | None = None
    response: Response = "gaussian"
    reference: Gaussian | None = None
    mixing: Mixing | None = MIXING
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_positive("An implicit gradient", tolerance=self.tolerance)
        _check_counts("an implicit gradient", max_rounds=self.max_rounds, max_rows=self.max_rows)


@dataclass(frozen=True)
class Phantom:
    """Backpropagation through some damped steps of the preconditioned fixed point map at its solution.

    `steps - 1` rounds of vector-Jacobian products (and one more for `parameters`). With `tau` 1 and as many steps as
    the plan has network calls, plus one, it is exact.

    Args:
        steps: how many.
        tau: damping; 1 is none.
        response: how answers are expected to move with their states, as in `Parallel`.
        reference: the Gaussian of that response; by default the forward method's.
        max_rows: most states in one network call; a round may take several. All by default.
    """

    steps: int = 1
    tau: float = 1.0
    response: Response = "gaussian"
    reference: Gaussian | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_positive("A phantom gradient", tau=self.tau)
        _check_counts("a phantom gradient", steps=self.steps, max_rows=self.max_rows)


@dataclass(frozen=True)
class Skeleton:
    """The gradient of the linear skeleton with the noise predictions held: no network call at all.

    In the start it is `tau Psi(t_end, t_0)^T g` wherever the plan treats the linear part exactly; `parameters` get
    none. It is what the released code of the phantom gradient amounts to with one step (arXiv 2210.12867).
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("A skeleton gradient", tau=self.tau)


Gradient = Exact | Implicit | Phantom | Skeleton


def differentiable(
    plan: Plan,
    denoiser: Denoiser,
    start: Tensor,
    *,
    noise: Tensor | Noise | None = None,
    gradient: Gradient = Exact(),
    method: Parallel | None = None,
    parameters: Sequence[Tensor] = (),
    callback: Callable[[Any], None] | None = None,
    backward: Callable[[Round], None] | None = None,
) -> Tensor:
    """What `run` does, with gradients that do not need the whole chain's memory.

    Kept for the backward pass are the states that the network was asked about (`torch.autograd.graph.save_on_cpu`
    keeps them elsewhere). The network is called again there, so it must answer the same: no dropout.

    Args:
        plan: coefficients, of any solver.
        denoiser: the network.
        start: first state, `(batch, k * channels, *field)`.
        noise: of the nodes `plan.noises`: stacked, `(n, batch, k * channels, *field)`; or as in `run`, and then it gets
            no gradient.
        gradient: how the gradient is computed.
        method: run all steps at once as this says; by default one after another.
        parameters: tensors that the denoiser uses and that shall get gradients, leaves or not: weights, a condition.
            The very tensors, and none that is computed from another one.
        callback: of the forward pass, as in `run` (`Progress`) or, with a method, in `parallel` (`Round`).
        backward: told after every round of `Implicit`.

    Returns:
        The last state, shaped like `start`. It can be differentiated once.

    Raises:
        PushforwardError: as `run`; an `Exact` gradient of an implicit plan; noises of a wrong shape; noise that
            requires gradients but is not stacked; or parameters of which one is computed from another.
    """
    if plan.implicit and isinstance(gradient, Exact):
        raise PushforwardError(
            f"The plan of {plan.solver!r} is implicit, so its gradient has no order to go in: take `Implicit()`."
        )
    if isinstance(noise, Tensor):
        expected = (len(plan.noises), *start.shape)
        if tuple(noise.shape) != expected:
            raise PushforwardError(
                f"The noises of this plan of {plan.solver!r} have shape {expected}; got {tuple(noise.shape)}."
            )
        noise = noise.to(start)
    chain = _Chain(plan, denoiser, gradient, method, callback, backward, _precision(start))
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


class _Gradients(NamedTuple):
    """In the start, in the noises (stacked as `plan.noises`), and in the parameters."""

    start: Tensor
    noises: Tensor
    parameters: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class _Chain:
    """A plan with its network: states forwards, gradients backwards."""

    plan: Plan
    denoiser: Denoiser
    gradient: Gradient
    method: Parallel | None
    callback: Callable[[Any], None] | None
    backward: Callable[[Round], None] | None
    precision: torch.autocast

    def last(self, start: Tensor, noise: Noise | None) -> Tensor:
        """The last state alone."""
        if self.method is None:
            return run(self.plan, self.denoiser, start, noise=noise, callback=self.callback)
        plan, method = self.plan, self.method
        return parallel(plan, self.denoiser, start, noise=noise, method=method, callback=self.callback).last

    def solved(self, start: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """The last state, and those that the network was asked about, `(nfe, batch, k * channels, *field)`."""
        plan, method = self.plan, self.method
        if method is None:
            return _recorded(plan, self.denoiser, start, noise, self.callback)
        drawn = {} if noise is None else {n: noise(n) for n in plan.noises}
        again = None if noise is None else drawn.__getitem__
        solution = parallel(plan, self.denoiser, start, noise=again, method=method, callback=self.callback)
        last, states = solution.last.clone(), solution.states[[n for n, node in enumerate(plan.nodes) if node.asks]]
        bad = solution.diverged.nonzero()[:, 0]
        if len(bad):  # only their last state is right
            some = None if noise is None else lambda n: drawn[n].to(start)[bad]
            last[bad], states[:, bad] = _recorded(plan, Subset(self.denoiser, bad), start[bad], some, None)
        return last, states

    def gradients(self, states: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> _Gradients:
        """Gradients of a loss whose gradient in the last state is given, at these states."""
        mode = self.gradient
        if isinstance(mode, Exact) or not len(states):
            return _sweep(self.plan, self.denoiser, states, gradient, parameters)
        reference = None if isinstance(mode, Skeleton) else mode.reference
        if reference is None and self.method is not None:
            reference = self.method.reference
        kind: Response = "noise" if isinstance(mode, Skeleton) else mode.response
        system = _system(self.plan, kind, reference, gradient)
        source = torch.zeros_like(system.pack(gradient[None])).repeat(1, system.size, 1, 1)
        source[:, -1:] = system.pack(gradient[None])
        products = _Products(system, self.denoiser, states, getattr(mode, "max_rows", None))
        if isinstance(mode, Skeleton):
            return _Gradients(*_ends(system, mode.tau * system.transposed(source)), [None] * len(parameters))
        if isinstance(mode, Phantom):
            cotangents = _phantom(system, products, source, mode)
        else:
            cotangents, lost = _implicit(system, products, source, mode, self.backward)
            if bool(lost.any()):
                return self._mended(products, cotangents, lost, gradient, parameters)
        return _Gradients(*_ends(system, cotangents), products.parameters(cotangents, parameters))

    def _mended(
        self, products: _Products, cotangents: Tensor, lost: Tensor, gradient: Tensor, parameters: Sequence[Tensor]
    ) -> _Gradients:
        """Node after node for the images whose rounds diverged."""
        if self.plan.implicit:
            raise PushforwardError(
                f"The gradient of the implicit plan of {self.plan.solver!r} did not converge; use more steps, a lower "
                "order, or an explicit solver."
            )
        some = lost.nonzero()[:, 0]
        swept = _sweep(self.plan, Subset(self.denoiser, some), products.states[:, some], gradient[some], parameters)
        found = products.parameters(cotangents, parameters, ~lost)
        start, noises = _ends(products.system, cotangents)
        start[some], noises[:, some] = swept.start, swept.noises
        return _Gradients(start, noises, _summed(found, swept.parameters))


# -- node after node -------------------------------------------------------------------------------------------------


def _sweep(
    plan: Plan, denoiser: Denoiser, states: Tensor, gradient: Tensor, parameters: Sequence[Tensor]
) -> _Gradients:
    """The transposed recurrence, from the last node to the first."""
    basis, frequencies = plan.basis, len(plan.basis.shape)
    ask = _prepared(plan, denoiser, gradient)
    program, _ = compiled(plan, gradient)
    place = {n: k for k, n in enumerate(n for n, node in enumerate(plan.nodes) if node.asks)}
    drawn = {n: i for i, n in enumerate(plan.noises)}
    noises = gradient.new_zeros(len(drawn), *gradient.shape)
    found: list[Tensor | None] = [None] * len(parameters)
    value = torch.zeros_like(gradient)
    waiting = {Register("state", len(plan.nodes) - 1): basis.forward(gradient)}
    for n in reversed(range(len(plan.nodes))):
        value = waiting.pop(Register("state", n), torch.zeros_like(gradient))
        answer = waiting.pop(Register("answer", n), None)
        if answer is not None:
            k = place[n]
            product, more = _product(ask, k, states[k], None, basis.inverse(answer), parameters)
            value = value + basis.forward(product)
            found = _summed(found, more)
        for register, coefficient in program[n]:
            if register.kind == "mean":
                continue
            if isinstance(coefficient, float):
                moved = coefficient * value
            else:
                moved = apply_coefficients(coefficient.mT, value, frequencies)
            if register.kind == "noise":
                noises[drawn[n]] = basis.inverse(moved)
            else:
                waiting[register] = waiting[register] + moved if register in waiting else moved
    return _Gradients(basis.inverse(value), noises, found)


# -- all nodes at once -----------------------------------------------------------------------------------------------


def _phantom(system: System, products: _Products, source: Tensor, mode: Phantom) -> Tensor:
    """Cotangents of all states after the given damped steps from zero."""
    cotangents = mode.tau * system.transposed(source)
    pulled = torch.zeros_like(source)
    every = torch.ones(products.states.shape[:2], dtype=torch.bool, device=source.device)
    for _ in range(mode.steps - 1):
        through_states, on_answers = system.pulled(cotangents)
        products.evaluate(on_answers, pulled, every)
        cotangents = cotangents + mode.tau * system.transposed(source + through_states + pulled - cotangents)
    return cotangents


def _implicit(
    system: System, products: _Products, source: Tensor, mode: Implicit, callback: Callable[[Round], None] | None
) -> tuple[Tensor, Tensor]:
    """Cotangents of all states, and the images for which they diverged, `(batch,)`."""
    count, batch = products.states.shape[:2]
    nodes = torch.tensor(system.asked, device=source.device)
    place = torch.arange(count, device=source.device)[:, None]
    every = torch.arange(system.size, device=source.device)[:, None]
    weight = system.whitened(torch.ones_like(source[..., :1]))  # cotangents scale as 1 / states
    cotangents = system.transposed(source)
    through_states, on_answers = system.pulled(cotangents)
    pulled = _responded(system, on_answers)
    frontier = torch.zeros(batch, dtype=torch.long, device=source.device)  # settled products, from the data end
    active = _magnitudes(system, source, weight).amax(0) > 0
    lost = torch.zeros_like(active)
    residual = torch.where(active, math.inf, 0.0).to(source)
    least, shrinking = residual.clone(), list[Tensor]()
    history: list[tuple[Tensor, Tensor]] = []
    whole = system.plan.implicit  # nothing settles before the rest
    limit = min(mode.max_rounds or math.inf, ROUNDS if whole else count)
    rounds = 0
    while rounds < limit and bool(active.any()):
        wanted = (place < count - frontier) & active
        products.evaluate(on_answers, pulled, wanted)
        rounds += 1
        moves = system.transposed(source + through_states + pulled - cotangents)
        own, absolute = (_magnitudes(system, x, weight) for x in (cotangents, moves))
        sizes = torch.where(active, absolute / torch.maximum(own, _FLOOR * own.amax(0)), 0.0)
        largest, absolute = sizes.amax(0), absolute.amax(0)
        shrinking.append(largest)
        lost |= active & (~absolute.isfinite() | (absolute > GROWTH * least))
        least = torch.minimum(least, absolute.nan_to_num(math.inf))
        keep = active & ~lost
        moves = system.by_image(moves).masked_fill(~keep[:, None], 0).view_as(moves)
        estimate = tail(shrinking)
        later = sizes.flip(0).cumsum(0).flip(0)[nodes + 1]  # moves of the cotangents that a product was made of
        settled = (later <= SETTLED * mode.tolerance).sum(0)
        if not whole:
            frontier = torch.where(active, torch.maximum(frontier + 1, settled), frontier)
            estimate = torch.where(frontier >= count, estimate.clamp_max(SETTLED * mode.tolerance), estimate)
        if mode.mixing is not None:
            free = (every <= nodes[(count - 1 - frontier).clamp_min(0)]) & (frontier < count)
            units = weight.square()  # it divides by the deviation, and a cotangent is to be multiplied by it
            moves = (
                units
                * anderson_step(
                    system, cotangents / units, moves / units, sizes, history, mode.mixing, free, backwards=True
                )[0]
            )
            moves = system.by_image(moves).masked_fill(~keep[:, None], 0).view_as(moves)
        cotangents = cotangents + moves
        expected = on_answers
        through_states, on_answers = system.pulled(cotangents)
        pulled += _responded(system, on_answers - expected)
        residual = torch.where(active, estimate, residual)
        active = keep & (residual > mode.tolerance)
        if callback is not None:
            callback(Round(rounds, float(residual.max()), int(active.sum()), int(wanted.sum())))
    if whole and mode.max_rounds is None:
        lost |= active
    return cotangents, lost


@dataclass(frozen=True, eq=False)
class _Products:
    """Vector-Jacobian products of the network at all `states (nfe, batch, k * channels, *field)` it was asked about."""

    system: System
    denoiser: Denoiser
    states: Tensor
    max_rows: int | None

    def evaluate(self, on_answers: Tensor, into: Tensor, wanted: Tensor) -> None:
        """Put `J^T` of the answers' cotangents into the stack, where `wanted (nfe, batch)`."""
        self._each(on_answers, wanted, (), into)

    def parameters(
        self, cotangents: Tensor, parameters: Sequence[Tensor], images: Tensor | None = None
    ) -> list[Tensor | None]:
        """The parameters' gradients, summed over nodes and images, or some `images (batch,)`."""
        if not parameters:
            return []
        wanted = torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)
        if images is not None:
            wanted = wanted & images
        return self._each(self.system.pulled(cotangents)[1], wanted, parameters, None)

    def _each(
        self, on_answers: Tensor, wanted: Tensor, parameters: Sequence[Tensor], into: Tensor | None
    ) -> list[Tensor | None]:
        system = self.system
        ask = _prepared(system.plan, self.denoiser, self.states[0])
        nodes = torch.tensor(system.asked, device=self.states.device)
        k, image = wanted.nonzero(as_tuple=True)
        cotangents = system.by_image(on_answers)
        found: list[Tensor | None] = [None] * len(parameters)
        for some in torch.arange(len(k), device=k.device).split(self.max_rows or max(1, len(k))):
            at, of = nodes[k[some]], image[some]
            rows = system.unpack_rows(cotangents[:, at, :, of])
            state = self.states[k[some], of]
            product, more = _product(ask, k[some], state, of, rows, parameters, on_state=into is not None)
            found = _summed(found, more)
            if into is not None:
                system.by_image(into)[:, at, :, of] = system.pack_rows(product)
        return found


def _system(plan: Plan, kind: Response, reference: Gaussian | None, like: Tensor) -> System:
    """The linear system of the gradient, whose response must be finite."""
    system = system_of(plan, kind, reference, like)
    if not system.finite:
        raise PushforwardError(
            f"The gradient with the {kind} response is not finite for process {plan.process.name!r} at its first time; "
            "start the grid below t_max, or take another gradient."
        )
    return system


def _ends(system: System, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """What the cotangents of all states say of the start and of the noises, in pixels."""
    return system.unpack(cotangents[:, :1])[0], system.unpack(system.noise_cotangent(cotangents))


def _responded(system: System, on_answers: Tensor) -> Tensor:
    """`L^T` of the answers' cotangents: what their products are expected to be."""
    return torch.zeros_like(on_answers) if system.response is None else system.response.mT @ on_answers


def _magnitudes(system: System, cotangents: Tensor, weight: Tensor) -> Tensor:
    """Root mean square of each node's cotangents for states in units of their deviation, `(nodes, batch)`."""
    return system.by_image(cotangents / weight).square().mean((0, 2, 4)).sqrt()


# -- the network -----------------------------------------------------------------------------------------------------


def _product(
    ask: Ask,
    k: int | Tensor,
    state: Tensor,
    of: Tensor | None,
    cotangent: Tensor,
    parameters: Sequence[Tensor],
    *,
    on_state: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """The vector-Jacobian products of one network call: in its state and in the parameters."""
    with torch.enable_grad():
        state = state.detach().requires_grad_(on_state)
        answer = ask(k, state, of)
    if not answer.requires_grad:
        return torch.zeros_like(state), [None] * len(parameters)
    # What parameters were computed from outside of this call, or in `Denoiser.at`, serves further calls: retained.
    inputs = [state, *parameters] if on_state else list(parameters)
    found: list[Tensor | None] = list(
        torch.autograd.grad(answer, inputs, cotangent, retain_graph=True, allow_unused=True)
    )
    product = found.pop(0) if on_state else None
    return torch.zeros_like(state) if product is None else product, found


def _prepared(plan: Plan, denoiser: Denoiser, like: Tensor) -> Ask:
    times = plan.asked_times
    with torch.enable_grad():
        return denoiser.at(plan.process, times, like)


def _recorded(
    plan: Plan, denoiser: Denoiser, start: Tensor, noise: Noise | None, callback: Callable[[Any], None] | None
) -> tuple[Tensor, Tensor]:
    """The last state, and those that the network was asked about."""
    states = start.new_empty(plan.nfe, *start.shape)

    def record(progress: Progress) -> None:
        states[progress.done - 1] = progress.state
        if callback is not None:
            callback(progress)

    return run(plan, denoiser, start, noise=noise, callback=record).clone(), states


def _drawing(plan: Plan, noise: Tensor | Noise | None) -> Noise | None:
    """Noise as `run` asks for it."""
    return dict(zip(plan.noises, noise.detach(), strict=True)).__getitem__ if isinstance(noise, Tensor) else noise


def _ungraded(noise: Noise | None) -> Noise | None:
    """The same noise, unless it asks for gradients, which would be lost."""
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
    """The present autocast, to be entered again when the network is called again."""
    kind = like.device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _summed(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


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


def _check_positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise PushforwardError(f"{what} needs a positive {name}; got {value}.")


def _check_counts(what: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise PushforwardError(f"{name} of {what} must be at least 1; got {value}.")
