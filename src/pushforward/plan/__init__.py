"""Plans, the grids they live on, and the solvers that make them.

A solver is a function `(process, grid, **settings) -> Plan`; `solvers` has them all, and `SOLVERS` lists them under the
names that the command line takes.

    >>> from pushforward.linear import VP
    >>> SOLVERS["heun"](VP(), grid.uniform(VP(), 5)).nfe  # the last step goes to clean data by one call
    9
"""

from pushforward.plan import grid, solvers
from pushforward.plan.auto import auto, in_rounds
from pushforward.plan.files import load_plan, save_plan
from pushforward.plan.plan import Builder, Node, Plan, Register, Terms
from pushforward.plan.recurrence import repeated
from pushforward.plan.registry import SOLVERS, plan_of
from pushforward.plan.solvers import (
    bdia,
    collocation,
    ddim,
    ddpm,
    dpm_solver_pp,
    euler_maruyama,
    exponential,
    gddim,
    o_belm,
    runge_kutta,
    sscs,
    unipc,
)

__all__ = [
    "SOLVERS", "Builder", "Node", "Plan", "Register", "Terms", "auto", "bdia", "collocation", "ddim", "ddpm",
    "dpm_solver_pp", "euler_maruyama", "exponential", "gddim", "grid", "in_rounds", "load_plan", "o_belm", "plan_of",
    "repeated", "runge_kutta", "save_plan", "solvers", "sscs", "unipc",
]  # fmt: skip
