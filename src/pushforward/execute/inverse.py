r"""Exact inversion: the first state behind a given last one, for any deterministic plan.

The equations are the plan's own, with the last state known in place of the first, so nothing here depends on the
solver: multistep, predictor-corrector, Runge-Kutta and collocation plans are inverted alike. All states are solved for
at once, as in `execute.parallel`, on from the path of the reference Gaussian that ends in the given state.

The plan must end at a time t > 0: a last step to zero noise projects onto the data and has no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.execute.mixing import Mixing
from pushforward.execute.parallel import Parallel, Round, Solution, iterate, mean, system_of
from pushforward.execute.sequential import check_start
from pushforward.linear import root
from pushforward.model.network import Denoiser
from pushforward.plan import Plan

INVERSE = Parallel(tolerance=1e-4, mixing=Mixing(history=5, below=1.0), max_rounds=40)


@torch.no_grad()
def invert(
    plan: Plan,
    denoiser: Denoiser,
    end: Tensor,
    *,
    clean: Tensor | None = None,
    method: Parallel = INVERSE,
    callback: Callable[[Round], None] | None = None,
) -> Solution:
    """The states of `plan` that lead to a given last one.

    Args:
        plan: deterministic, of any solver, ending at a time above 0.
        denoiser: the network.
        end: last state, `(batch, k * channels, *field)`.
        clean: the clean state of which `end` is a noisy one, shaped like it, if it is known: the states begin on the
            path that leads from this point to `end`, in place of the reference's.
        method: how; `tolerance` is the greatest absolute error allowed when the plan is run again from the state
            found, in any value of the last state. The rounds stop at `max_rounds` whatever the error.
        callback: told after every round.

    Returns:
        All states; `.first` is the one sought, and `residual` the error estimated of running the plan from it.

    Raises:
        PushforwardError: a stochastic plan, one that ends at time 0, or a state of the wrong shape.
    """
    check_start(plan, end)
    if plan.noises:
        msg = f"The plan of {plan.solver!r} is stochastic: it has no inverse. Use a deterministic one (eta or noise 0)."
        raise PushforwardError(msg)
    if not plan.nodes[-1].time > 0:
        msg = (
            f"The plan of {plan.solver!r} ends at time 0, and its last step has no inverse; end the grid at "
            f"t_min = {plan.process.t_min:g}."
        )
        raise PushforwardError(msg)
    system = system_of(plan, method.response, method.reference, end)
    constant = system.constant(None, len(end), end)
    last = system.pack(end[None])
    if clean is None:
        states, answers = system.linear_start(torch.zeros_like(last), constant, mean(method.reference))
        moves = system.from_end((last - states[:, -1:])[:, 0])
        states, answers = states + moves, answers + system.respond(moves)
    else:
        states = system.pack(_path_of_a_point(plan, clean, end))
        answers = system.pack(clean.expand(system.size, *clean.shape)).clone()
    states[:, -1:] = last
    method = replace(method, max_rounds=method.max_rounds or INVERSE.max_rounds)
    return iterate(system, denoiser, end, states, answers, constant, method, backwards=True, callback=callback)


def _path_of_a_point(plan: Plan, clean: Tensor, end: Tensor) -> Tensor:
    """`Psi_k x + R_k z` at every node, with the z that leads to `end`: `(nodes, batch, k * channels, *field)`."""
    times = torch.tensor([node.time for node in plan.nodes], dtype=torch.float64)
    psi, factor = plan.process.transition(times, torch.zeros_like(times)), root(plan.process, times)
    z = factor[-1].inverse()(end - psi[-1](clean))
    return torch.stack([psi[k](clean) + factor[k](z) for k in range(len(times))])
