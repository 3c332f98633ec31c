r"""Collocation: the exponential solver's step, with the network's answers interpolated through later states too.

`plan.exponential` carries the state from `t_k` to `t_k+1` by the exact flow of a reference Gaussian and an integral of
the network's deviation X from it, with X interpolated by a polynomial through the answers up to step k. Outside the
points that it goes through, a polynomial errs most. Here it goes through the answers *around* the step, for degree 3

    u_k+1 = Psi' m + Psi^ (u_k - Psi m) + J_-1 X_k-1 + J_0 X_k + J_1 X_k+1 + J_2 X_k+2,

and the grid's first and last steps take the nearest such points. Each step so errs by an order of magnitude less, and
there is no start of low order. But `u_k+1` now depends on the answers at it and beyond: the plan is *implicit*, and all
states are solved for together, for which `execute.parallel` asks the network about all of them at once anyway.

The order of convergence is `order + 1`; an even order takes its odd point from behind. Where to put the times matters
more than the order: quadratic grids (`grid.power`) to `t_min` and 16 to 32 steps served best. Below that, states where
the image is being decided may depend on one another so strongly that rounds do not converge.

References:
    Solving Ordinary Differential Equations I, Hairer, Norsett & Wanner (1993), section III.1 (interpolated
    right-hand sides); the exponential form: see `plan.exponential`.
"""

from __future__ import annotations

from torch import Tensor

from pushforward.errors import PushforwardError
from pushforward.linear import POINT, Gaussian, Process
from pushforward.plan.exponential import Rule, Variable
from pushforward.plan.plan import Builder, Plan


def collocation(
    process: Process,
    grid: Tensor,
    *,
    order: int = 3,
    reference: Gaussian = POINT,
    variable: Variable = "angle",
    denoise: bool = True,
) -> Plan:
    """Make the implicit plan of the module's docstring, for `execute.parallel`.

    Args:
        process: the diffusion.
        grid: decreasing times, `(steps + 1,)`.
        order: degree of the interpolating polynomial, 1 or more: it goes through `order + 1` answers.
        reference: reference Gaussian N(m, C).
        variable: variable of the polynomial.
        denoise: if the grid ends at time 0, end with the network's answer at the last time of the grid at which it can
            be asked (`t_min` or before); otherwise the last step is like all others.

    Raises:
        PushforwardError: the order is below 1, or there are fewer than two times at which the network can be asked.
    """
    if order < 1:
        raise PushforwardError(f"The degree of collocation is at least 1 (two answers per step); got order={order}.")
    builder = Builder(process, "collocation", grid, reference)
    times = builder.grid
    asked = int((times >= process.t_min * (1 - 1e-9)).sum()) - 1
    if asked < 1:
        raise PushforwardError(
            f"Collocation needs two grid times at or above t_min = {process.t_min:g} of process {process.name!r}."
        )
    denoise = denoise and float(times[-1]) == 0
    firsts = [max(0, min(k - order // 2, asked - order)) for k in range(asked if denoise else len(times) - 1)]
    around = [[range(first, min(first + order, asked) + 1)] for first in firsts]
    rule = Rule(process, builder, reference, variable, around)
    nodes = {k: builder.handle(k, float(t)) for k, t in enumerate(times)}
    current = builder.start()
    for k in range(len(around)):
        current = builder.node(float(times[k + 1]), rule.step(k, current, nodes))
    if denoise:
        builder.node(float(times[-1]), nodes[asked].answer)
    return builder.build(order=order, variable=variable, denoise=denoise)
