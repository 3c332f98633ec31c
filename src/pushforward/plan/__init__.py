"""Plans, the grids they live on, and the solvers that make them.

A solver is a function `(process, grid, **settings) -> Plan`; `SOLVERS` lists them under the names that the command
line takes.
"""

from pushforward.plan import grid
from pushforward.plan.auto import auto
from pushforward.plan.collocation import collocation
from pushforward.plan.euler_maruyama import euler_maruyama
from pushforward.plan.exponential import exponential
from pushforward.plan.gddim import ddim, ddpm, gddim
from pushforward.plan.multistep import dpm_solver_pp, unipc
from pushforward.plan.plan import Builder, Node, Plan, Register, Terms
from pushforward.plan.recurrence import repeated
from pushforward.plan.registry import SOLVERS, plan_of
from pushforward.plan.reversible import bdia, o_belm
from pushforward.plan.runge_kutta import runge_kutta
from pushforward.plan.splitting import sscs

__all__ = [
    "SOLVERS", "Builder", "Node", "Plan", "Register", "Terms", "auto", "bdia", "collocation", "ddim", "ddpm",
    "dpm_solver_pp", "euler_maruyama", "exponential", "gddim", "grid", "o_belm", "plan_of", "repeated", "runge_kutta",
    "sscs", "unipc",
]  # fmt: skip
