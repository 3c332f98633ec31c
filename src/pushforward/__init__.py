"""Diffusion models as maps between Gaussian codes and images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from pushforward.denoiser import Function
    from pushforward.execute import Exact, Implicit, Parallel, Phantom, Skeleton
    from pushforward.guidance.chains import Schedule, hmc, langevin, mala
    from pushforward.guidance.posterior import best, guide
    from pushforward.guidance.steering import Steering, steered
    from pushforward.integrations.diffusers import PushforwardScheduler
    from pushforward.linear import Gaussian, process_from_config
    from pushforward.maps.code import Code
    from pushforward.maps.diffusion import Diffusion
    from pushforward.maps.generator import Generator, consistency, gan, load_generator, stylegan
    from pushforward.maps.protocol import Pushforward
    from pushforward.model import Model, Network, load
    from pushforward.plan import SOLVERS, Plan, grid

__all__ = [
    "SOLVERS", "Code", "Diffusion", "Exact", "Function", "Gaussian", "Generator", "Implicit", "Model", "Network",
    "Parallel", "Phantom", "Plan", "Pushforward", "PushforwardError", "PushforwardScheduler", "Schedule", "Skeleton",
    "Steering", "best", "consistency", "gan", "grid", "guide", "hmc", "langevin", "load", "load_generator", "mala",
    "process_from_config", "steered", "stylegan",
]  # fmt: skip

_HOMES = {
    "Gaussian": "linear", "process_from_config": "linear", "Function": "denoiser", "Model": "model", "Network": "model",
    "load": "model", "SOLVERS": "plan", "Plan": "plan", "grid": "plan", "Code": "maps.code",
    "Diffusion": "maps.diffusion", "Pushforward": "maps.protocol", "Exact": "execute", "Implicit": "execute",
    "Parallel": "execute", "Phantom": "execute", "Skeleton": "execute", "PushforwardScheduler": "integrations.diffusers",
    "Generator": "maps.generator", "consistency": "maps.generator", "gan": "maps.generator", "load_generator": "maps.generator",
    "stylegan": "maps.generator", "Schedule": "guidance.chains", "hmc": "guidance.chains", "langevin": "guidance.chains",
    "mala": "guidance.chains", "best": "guidance.posterior", "guide": "guidance.posterior", "Steering": "guidance.steering",
    "steered": "guidance.steering",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import names when they are used, so that `import pushforward` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
