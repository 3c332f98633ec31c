r"""Plans that take every step several times: step, noise the result back, step again.

From the state at t_i a one-step solver makes one at t_{i+1}; the forward process takes it back,

    u_i <- Psi(t_i, t_{i+1}) u_{i+1} + chol(Sigma_i - Psi Sigma_{i+1} Psi^T) xi,

and the solver steps again. States that had the right marginals keep them, since both moves do. Other states, of which
an answer was steered or some pixels are held, come nearer with each turn to what the answers ask for: what is known of
one part of an image spreads to the rest.

References:
    RePaint, Lugmayr et al., arXiv 2201.09865, algorithm 1 (with jumps of one step);
    FreeDoM, Yu et al., arXiv 2303.09833, algorithm 2 ("time travel");
    Universal Guidance, Bansal et al., arXiv 2302.07121, algorithm 1 ("self-recurrence").
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pushforward.data.memory import check_memory
from pushforward.errors import PushforwardError
from pushforward.linear import Gaussian, Process
from pushforward.plan.grid import STEP, check_grid
from pushforward.plan.plan import Builder, Handle, Plan, Register, Terms, total

__all__ = ["repeated"]


def repeated(make: Callable[[Process, Tensor], Plan], process: Process, grid: Tensor, repeats: int = 2) -> Plan:
    """Make a solver's plan with every step taken `repeats` times, which takes `repeats` times the network calls.

    Each step is a plan of its own: a multistep solver forgets what was answered before and is of order one.

    Args:
        make: the solver, `(process, grid) -> Plan`, explicit.
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        repeats: how many times to take each step; 1 does not change the plan of a one-step solver.

    Raises:
        PushforwardError: `repeats` is below 1, or the solver is implicit.
    """
    if repeats < 1:
        raise PushforwardError(f"Each step must be taken at least once; got repeats = {repeats}.")
    times = check_grid(process, grid)
    check_memory(STEP * repeats * len(times), f"A plan of {len(times) - 1:,} steps, each taken {repeats:,} times,")
    plans: list[Plan] = []
    for i in range(len(times) - 1):
        plans.append(make(process, times[i : i + 2]))
        if plans[i].implicit:
            raise PushforwardError(
                f"The plan of {plans[i].solver!r} is implicit; only the steps of explicit solvers can be repeated."
            )
    builder = Builder(process, plans[0].solver, times, Gaussian(mean=plans[0].mean))
    up, covariance = process.transition(times[:-1], times[1:]), process.covariance(times)
    spread = (covariance[:-1] - up @ covariance[1:] @ up.T).cholesky()
    current = builder.start()
    for i, plan in enumerate(plans):
        start = current
        for turn in range(repeats):
            if turn:
                start = builder.node(float(times[i]), up[i] @ current.state, spread[i], stage=True)
            current = _spliced(builder, plan, start, stage=turn < repeats - 1)
    return builder.build(**plans[0].settings, repeats=repeats)


def _spliced(builder: Builder, plan: Plan, start: Handle, *, stage: bool) -> Handle:
    """Build a plan of one step from `start`; return its last node, a stage if so told. All other nodes are stages."""
    handles = [start]

    def register(one: Register) -> Terms:
        if one.kind == "mean":
            return builder.mean
        return handles[one.node].answer if one.kind == "answer" else handles[one.node].state

    for index, node in enumerate(plan.nodes[1:], 1):
        own = Register("noise", index)
        terms = total(operator @ register(one) for one, operator in node.terms.items() if one != own)
        inside = stage or index < len(plan.nodes) - 1
        handles.append(builder.node(node.time, terms, node.terms.get(own), stage=inside))
    return handles[-1]
