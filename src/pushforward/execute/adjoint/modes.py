"""Modes of differentiation, each of which does its own work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

from pushforward.data import schema
from pushforward.data.schema import Count, Positive
from pushforward.errors import PushforwardError
from pushforward.execute.adjoint.products import Gradients, Products, Task, ends, summed
from pushforward.execute.adjoint.rounds import damped, solved
from pushforward.execute.adjoint.sweep import sweep
from pushforward.execute.anderson import Mixing
from pushforward.execute.parallel import MIXING, Response
from pushforward.linear import Gaussian
from pushforward.plan import Plan

__all__ = ["Exact", "Gradient", "Implicit", "Phantom", "Skeleton"]


class Gradient(Protocol):
    """How gradients are taken through a plan."""

    def check(self, plan: Plan) -> None:
        """Raise unless the plan can be differentiated so."""

    def with_reference(self, reference: Gaussian) -> Self:
        """Return the mode with this reference, if it takes one and has none yet."""

    def gradients(self, task: Task) -> Gradients:
        """Return the gradients of a loss whose gradient in the last state is given."""


@dataclass(frozen=True)
class Exact:
    """The gradient of the sequential sampler: one vector-Jacobian product after another, as many as network calls."""

    def check(self, plan: Plan) -> None:
        """Raise for an implicit plan, whose gradient has no order to go in."""
        if plan.implicit:
            raise PushforwardError(
                f"The plan of {plan.solver!r} is implicit, so its gradient has no order to go in: take `Implicit()`."
            )

    def with_reference(self, reference: Gaussian) -> Exact:  # noqa: ARG002 - it has none
        """Itself."""
        return self

    def gradients(self, task: Task) -> Gradients:
        """Node after node."""
        return sweep(task)


EXACT = Exact()


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

    tolerance: Positive = 1e-4
    max_rounds: Count | None = None
    response: Response = "gaussian"
    reference: Gaussian | None = None
    mixing: Mixing | None = MIXING
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        schema.check_fields(self)

    def check(self, plan: Plan) -> None:
        """Every plan will do."""

    def with_reference(self, reference: Gaussian) -> Implicit:
        """Return the mode with this reference, unless it has one."""
        return self if self.reference is not None else replace(self, reference=reference)

    def gradients(self, task: Task) -> Gradients:
        """In rounds; node after node for the images whose rounds diverged."""
        system = task.system(self.response, self.reference)
        products = Products(system, task.denoiser, task.states, self.max_rows)
        cotangents, lost = solved(system, products, task.source(system), tolerance=self.tolerance,
                                  max_rounds=self.max_rounds, mixing=self.mixing, callback=task.callback)  # fmt: skip
        start, noises = ends(system, cotangents)
        some = lost.nonzero()[:, 0]
        found = products.parameters(cotangents, task.parameters, ~lost if len(some) else None)
        if not len(some):
            return Gradients(start, noises, found)
        if task.plan.implicit:
            raise PushforwardError(
                f"The gradient of the implicit plan of {task.plan.solver!r} did not converge; use more steps, a lower "
                "order, or an explicit solver."
            )
        swept = sweep(task.some(some))
        start[some], noises[:, some] = swept.start, swept.noises
        return Gradients(start, noises, summed(found, swept.parameters))


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

    steps: Count = 1
    tau: Positive = 1.0
    response: Response = "gaussian"
    reference: Gaussian | None = None
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        schema.check_fields(self)

    def check(self, plan: Plan) -> None:
        """Every plan will do."""

    def with_reference(self, reference: Gaussian) -> Phantom:
        """Return the mode with this reference, unless it has one."""
        return self if self.reference is not None else replace(self, reference=reference)

    def gradients(self, task: Task) -> Gradients:
        """By damped steps of the transposed system."""
        system = task.system(self.response, self.reference)
        products = Products(system, task.denoiser, task.states, self.max_rows)
        cotangents = damped(system, products, task.source(system), self.steps, self.tau)
        return Gradients(*ends(system, cotangents), products.parameters(cotangents, task.parameters))


@dataclass(frozen=True)
class Skeleton:
    """The gradient of the linear skeleton with the noise predictions held: no network call at all.

    In the start it is `tau Psi(t_end, t_0)^T g` wherever the plan treats the linear part exactly; `parameters` get
    none. It is what the released code of the phantom gradient amounts to with one step (arXiv 2210.12867).
    """

    tau: Positive = 1.0

    def __post_init__(self) -> None:
        schema.check_fields(self)

    def check(self, plan: Plan) -> None:
        """Every plan will do."""

    def with_reference(self, reference: Gaussian) -> Skeleton:  # noqa: ARG002 - it has none
        """Itself."""
        return self

    def gradients(self, task: Task) -> Gradients:
        """By the linear system alone."""
        system = task.system("noise")
        cotangents = self.tau * system.transposed(task.source(system))
        return Gradients(*ends(system, cotangents), [None] * len(task.parameters))
