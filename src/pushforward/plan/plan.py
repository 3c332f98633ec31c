"""Plans: samplers written as coefficients.

Every sampler in use is a list of *nodes*. A node makes a state as a linear combination of other states, of *answers*
of the network, and of fresh noise; some nodes *ask* the network about the state they made:

    u_n = sum_j A_nj u_j + sum_j B_nj D_j + M_n m + N_n xi_n,        D_n = E[u_0 | u_n]  if node n asks.

The answer is the *denoised state* D. Other forms are linear in the state and D (the noise prediction in the root's
form, for example, is `R^-1 (u - Psi D)`), so solvers may use whichever they like. D is the form that stays finite where
there is no signal (alpha = 0, where noise predictions say nothing about the image) and where there is no noise, and
for a single data point it is constant. `m` is the mean of a reference Gaussian, if the solver uses one.

Where nodes refer to earlier ones alone, the plan is *explicit*, and can be run one node after another. A plan that
refers ahead is *implicit*: a system of equations for all states, solved together.

A *solver* is a function `(process, grid, ...) -> Plan`. It writes its update as its paper does, with `Terms`:

    plan = Builder(process, "ddim", grid)
    u = plan.start()
    for i, t in enumerate(grid[1:]):
        eps = inverse_root[i] @ (u.state - psi[i] @ u.answer)
        u = plan.node(t, psi[i + 1] @ u.answer + root[i + 1] @ eps)
    return plan.build()
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.data.words import many
from pushforward.errors import PushforwardError
from pushforward.linear import IDENTITY, POINT, Basis, Gaussian, Operator, Process
from pushforward.plan.grid import STEP, check_grid


class Register(NamedTuple):
    """What a coefficient multiplies: the state, answer or noise of a node, or the reference mean (node 0)."""

    kind: Literal["state", "answer", "noise", "mean"]
    node: int


@dataclass(frozen=True, eq=False)
class Terms:
    """A linear combination of registers: `+`, `-`, `number *` and `operator @` as on paper."""

    coefficients: Mapping[Register, Operator]

    def __add__(self, other: Terms) -> Terms:
        total = dict(self.coefficients)
        for register, operator in other.coefficients.items():
            total[register] = total[register] + operator if register in total else operator
        return Terms(total)

    def __sub__(self, other: Terms) -> Terms:
        return self + (-other)

    def __neg__(self) -> Terms:
        return -1.0 * self

    def __rmul__(self, factor: float) -> Terms:
        return Terms({r: factor * o for r, o in self.coefficients.items()})

    def __rmatmul__(self, operator: Operator) -> Terms:
        return Terms({r: operator @ o for r, o in self.coefficients.items()})


NOTHING = Terms({})


def combined(pairs: Iterable[tuple[Operator, Terms]]) -> Terms:
    """Sum operators times single registers as they are: the unit terms of states, answers or the mean."""
    summed: dict[Register, Operator] = {}
    for operator, unit in pairs:
        (register,) = unit.coefficients
        summed[register] = summed[register] + operator if register in summed else operator
    return Terms(summed)


def total(summands: Iterable[Terms], start: Terms = NOTHING) -> Terms:
    """Sum `start` and all summands."""
    return reduce(add, summands, start)


@dataclass(frozen=True, eq=False)
class Node:
    """One state of a plan.

    Args:
        time: the state's time, at which the network is asked about it.
        terms: the linear combination that makes the state.
        asks: whether the network is asked about the state.
    """

    time: float
    terms: Mapping[Register, Operator]
    asks: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as coefficients: the first node is given (the code's terminal state), the last is the result.

    Args:
        process: the diffusion that the plan samples.
        solver: name of the solver that made the plan.
        nodes: the nodes in order; each refers to its own noise and to other nodes, all of them earlier unless the plan
            is `implicit`.
        steps: indices of the nodes that are states of the chain, not stages in between; one more than there are steps.
        mean: mean of the reference Gaussian that the solver used.
        settings: settings that the solver was given, for reports and for making the plan again.

    Raises:
        PushforwardError: a coefficient is not finite, or a node refers to the noise of a later node or to a node that
            does not exist.
    """

    process: Process
    solver: str
    nodes: tuple[Node, ...]
    steps: tuple[int, ...]
    mean: Tensor = POINT.mean
    settings: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Show the solver, its settings and its length; the nodes fill pages."""
        said = {"process": self.process.name, "steps": len(self.steps) - 1, "nfe": self.nfe, **self.settings}
        if self.rounds < self.nfe:
            said["rounds"] = self.rounds
        return f"Plan({', '.join([self.solver, *(f'{name}={value}' for name, value in said.items())])})"

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            for register, operator in node.terms.items():
                if not operator.is_finite():
                    raise PushforwardError(
                        f"The {register.kind} coefficient of {self.solver!r} at t = {node.time:.4g} is not finite for "
                        f"process {self.process.name!r}; start the grid below t_max = {self.process.t_max:g}, or end "
                        f"it at t_min = {self.process.t_min:.3g}."
                    )
                if register.kind == "noise" and register.node > index:
                    raise PushforwardError(
                        f"Node {index} of {self.solver!r} refers to the noise of the later node {register.node}."
                    )
                if register.node >= len(self.nodes):
                    raise PushforwardError(
                        f"Node {index} of {self.solver!r} refers to node {register.node}, which was never built."
                    )

    @property
    def basis(self) -> Basis:
        """The basis in which the coefficients are diagonal."""
        bases = (o.basis for node in self.nodes for o in node.terms.values() if o.basis != IDENTITY)
        return next(bases, self.process.basis)

    @property
    def nfe(self) -> int:
        """Network evaluations per image; the two of classifier-free guidance about a state count as one."""
        return len(self.asked)

    @property
    def asked(self) -> tuple[int, ...]:
        """The nodes that the network is asked about, in order."""
        return tuple(k for k, node in enumerate(self.nodes) if node.asks)

    @property
    def rounds(self) -> int:
        """Network calls one after another: nodes that do not depend on one another's answers are asked together.

        An implicit plan has no such order; it counts as one call for each of its evaluations.
        """
        return self.nfe if self.implicit else sum(any(self.nodes[k].asks for k in wave) for wave in self.waves)

    @property
    def calls(self) -> str:
        """The network evaluations of an image in words, and rounds if they are fewer; implicit plans find theirs."""
        spent = many(self.nfe, "network evaluation")
        if self.implicit:
            return f"{spent} per round"
        return f"{spent} in {many(self.rounds, 'round')}" if self.rounds < self.nfe else spent

    @property
    def waves(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of an explicit plan by how many answers, each of the one before, lead to them; each in order."""
        waves: list[list[int]] = []
        depth: list[int] = []
        for index, node in enumerate(self.nodes):
            needs = (depth[r.node] + (r.kind == "answer") for r in node.terms if r.kind in ("state", "answer"))
            depth.append(max(needs, default=0))
            waves += [[] for _ in range(depth[index] + 1 - len(waves))]
            waves[depth[index]].append(index)
        return tuple(map(tuple, waves))

    @property
    def implicit(self) -> bool:
        """Whether a state depends on itself or on later ones, so that all must be solved for together."""
        return any(
            register.kind in ("state", "answer") and register.node >= index
            for index, node in enumerate(self.nodes)
            for register in node.terms
        )

    @property
    def times(self) -> Tensor:
        """Times of the chain's states, `(steps + 1,)`, decreasing."""
        return torch.tensor([self.nodes[k].time for k in self.steps], dtype=torch.float64, device="cpu")

    @property
    def node_times(self) -> Tensor:
        """Times of all nodes, `(nodes,)`."""
        return torch.tensor([node.time for node in self.nodes], dtype=torch.float64, device="cpu")

    @property
    def asked_times(self) -> Tensor:
        """Times at which the network is asked, `(nfe,)`, in the order of the nodes."""
        return torch.tensor([self.nodes[k].time for k in self.asked], dtype=torch.float64, device="cpu")

    def mean_state(self, like: Tensor) -> Tensor | None:
        """Return the reference's mean as a clean state, shaped like `(batch, k * channels, *field)`; `None` if zero."""
        return Gaussian(mean=self.mean).mean_state(self.process, like)

    @property
    def noises(self) -> tuple[int, ...]:
        """The nodes that take noise, in order."""
        return tuple(k for k, node in enumerate(self.nodes) if Register("noise", k) in node.terms)


@dataclass(frozen=True)
class Handle:
    """A node of a plan under construction, by the terms that refer to it."""

    builder: Builder
    index: int
    time: float

    @property
    def state(self) -> Terms:
        """The node's state."""
        return self.builder._unit("state", self.index)

    @property
    def answer(self) -> Terms:
        """The network's answer about the node: using it makes the node ask."""
        self.builder._asks.add(self.index)
        return self.builder._unit("answer", self.index)


class Builder:
    """Collects a plan's nodes.

    Args:
        process: the diffusion.
        solver: name of the solver, for messages and reports.
        grid: decreasing times, `(steps + 1,)`.
        reference: reference Gaussian, whose mean the terms may use.
    """

    def __init__(self, process: Process, solver: str, grid: Tensor, reference: Gaussian | None = None):
        self._process, self._solver = process, solver
        self.grid = check_grid(process, grid)
        size = 32 * process.blocks**2 * math.prod(process.basis.shape)  # four coefficients, at least
        check_memory((STEP + size) * len(grid), f"A plan of {len(grid):,} times for process {process.name!r}")
        self._mean = (POINT if reference is None else reference).mean
        self._nodes: list[tuple[float, Terms]] = []
        self._steps: list[int] = []
        self._asks: set[int] = set()
        self.one = Operator.scalar(1.0, process.blocks)

    def start(self) -> Handle:
        """Add the given first state, at the grid's first time."""
        return self.node(float(self.grid[0]), NOTHING)

    def node(self, time: float, terms: Terms, noise: Operator | None = None, *, stage: bool = False) -> Handle:
        """Add a state; `noise` multiplies a fresh standard normal; a `stage` is not a state of the chain."""
        index = len(self._nodes)
        if noise is not None and bool((noise.coefficients != 0).any()):
            terms = terms + noise @ self._unit("noise", index)
        self._nodes.append((float(time), terms))
        if not stage:
            self._steps.append(index)
        return self.handle(index, time)

    def handle(self, index: int, time: float) -> Handle:
        """Return a node by its index, whether it is built or not yet: this is how plans refer ahead."""
        return Handle(self, index, float(time))

    @property
    def mean(self) -> Terms:
        """Return the reference's mean as a clean state."""
        return self._unit("mean", 0) if bool(self._mean.any()) else NOTHING

    def build(self, **settings: object) -> Plan:
        """Make the finished plan; it keeps `settings` for reports."""
        nodes = tuple(Node(t, terms.coefficients, k in self._asks) for k, (t, terms) in enumerate(self._nodes))
        return Plan(self._process, self._solver, nodes, tuple(self._steps), self._mean, settings)

    def _unit(self, kind: Literal["state", "answer", "noise", "mean"], index: int) -> Terms:
        return Terms({Register(kind, index): self.one})
