"""Vector-Jacobian products of the network, and what a mode of differentiation works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pushforward.denoiser import Ask, Denoiser
from pushforward.errors import PushforwardError
from pushforward.execute.parallel import Response, Round, Subset, system_of
from pushforward.execute.system import System
from pushforward.linear import Gaussian
from pushforward.plan import Plan


class Gradients(NamedTuple):
    """In the start, in the noises (stacked as `plan.noises`), and in the parameters."""

    start: Tensor
    noises: Tensor
    parameters: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be differentiated.

    Args:
        plan: coefficients.
        denoiser: the network.
        states: that the network was asked about, `(nfe, batch, k * channels, *field)`.
        gradient: gradient of the loss in the last state, `(batch, k * channels, *field)`.
        parameters: that are to get gradients.
        reference: reference of the forward pass, the default of a mode's own.
        callback: told after every round.
    """

    plan: Plan
    denoiser: Denoiser
    states: Tensor
    gradient: Tensor
    parameters: Sequence[Tensor]
    reference: Gaussian | None
    callback: Callable[[Round], None] | None

    def some(self, images: Tensor) -> Task:
        """Return the same for some of the images."""
        return replace(self, denoiser=Subset(self.denoiser, images), states=self.states[:, images],
                       gradient=self.gradient[images])  # fmt: skip

    def system(self, response: Response, reference: Gaussian | None = None) -> System:
        """Return the linear system of the plan with a response.

        Raises:
            PushforwardError: the response is not finite.
        """
        system = system_of(self.plan, response, self.reference if reference is None else reference, self.gradient)
        if not system.finite:
            raise PushforwardError(
                f"The gradient with the {response} response is not finite for process {self.plan.process.name!r} at "
                "its first time; start the grid below t_max, or take another gradient."
            )
        return system

    def source(self, system: System) -> Tensor:
        """Return the loss's own cotangents: of the last state alone, a stack as in `System`."""
        last = system.pack(self.gradient[None])
        source = torch.zeros_like(last).repeat(1, system.size, 1, 1)
        source[:, -1:] = last
        return source


@dataclass(frozen=True, eq=False)
class Products:
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
        """Return the parameters' gradients, summed over nodes and images, or some `images (batch,)`."""
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
        ask = prepared(system.plan, self.denoiser, self.states[0])
        nodes = torch.tensor(system.asked, device=self.states.device)
        k, image = wanted.nonzero(as_tuple=True)
        found: list[Tensor | None] = [None] * len(parameters)
        for some in torch.arange(len(k), device=k.device).split(self.max_rows or max(1, len(k))):
            at, of = nodes[k[some]], image[some]
            rows = system.taken(on_answers, at, of)
            state = self.states[k[some], of]
            product, more = vector_jacobian(ask, k[some], state, of, rows, parameters, on_state=into is not None)
            found = summed(found, more)
            if into is not None:
                system.put(product, into, at, of)
        return found


def ends(system: System, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the cotangents of all states say of the start and of the noises, in pixels."""
    return system.unpack(cotangents[:, :1])[0], system.unpack(system.noise_cotangent(cotangents))


def vector_jacobian(
    ask: Ask,
    k: int | Tensor,
    state: Tensor,
    of: Tensor | None,
    cotangent: Tensor,
    parameters: Sequence[Tensor],
    *,
    on_state: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the vector-Jacobian products of one network call: in its state and in the parameters."""
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


def prepared(plan: Plan, denoiser: Denoiser, like: Tensor) -> Ask:
    """Return the network at the times at which the plan asks, with gradients."""
    times = plan.asked_times
    with torch.enable_grad():
        return denoiser.at(plan.process, times, like)


def summed(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return sums of gradients, of which `None` is none."""
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]
