"""Plans, the grids they live on, and the solvers that make them.

A solver is a function `(process, grid, **settings) -> Plan`; `SOLVERS` lists them under the names that the command
line takes.
"""

from collections.abc import Callable
from functools import partial

from pushforward.plan import grid
from pushforward.plan.exponential import exponential
from pushforward.plan.gddim import ddim, ddpm, gddim
from pushforward.plan.plan import Builder, Node, Plan, Register, Terms
from pushforward.plan.published import dpm_solver_pp, unipc
from pushforward.plan.runge_kutta import TABLEAUX, runge_kutta
from pushforward.plan.stochastic import euler_maruyama

__all__ = [
    "SOLVERS", "Builder", "Node", "Plan", "Register", "Terms", "ddim", "ddpm", "dpm_solver_pp", "euler_maruyama",
    "exponential", "gddim", "grid", "runge_kutta", "unipc",
]  # fmt: skip

SOLVERS: dict[str, Callable[..., Plan]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "gddim": gddim,
    "exponential": exponential,
    "dpm++": dpm_solver_pp,
    "unipc": unipc,
    "euler-maruyama": euler_maruyama,
    **{name: partial(runge_kutta, tableau=name) for name in TABLEAUX},
}
