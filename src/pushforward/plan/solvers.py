"""The solvers: functions `(process, grid, **settings) -> Plan`; see each for what its settings mean.

    plan = solvers.gddim(process, grid.power(process, 20), order=2)

`registry.SOLVERS` has them under the names that the command line takes.
"""

from pushforward.plan.auto import auto_at as auto
from pushforward.plan.collocation import collocation
from pushforward.plan.euler_maruyama import euler_maruyama
from pushforward.plan.exponential import exponential
from pushforward.plan.gddim import ddim, ddpm, gddim
from pushforward.plan.multistep import dpm_solver_pp, unipc
from pushforward.plan.reversible import bdia, o_belm
from pushforward.plan.runge_kutta import runge_kutta
from pushforward.plan.splitting import sscs

__all__ = [
    "auto", "bdia", "collocation", "ddim", "ddpm", "dpm_solver_pp", "euler_maruyama", "exponential", "gddim", "o_belm",
    "runge_kutta", "sscs", "unipc",
]  # fmt: skip
