"""The linear skeleton: structured operators, forward processes, reference Gaussians and their roots."""

from dataclasses import fields
from typing import Any

from pushforward.data.schema import check
from pushforward.errors import PushforwardError
from pushforward.linear.basis import IDENTITY, Basis
from pushforward.linear.discrete import Discrete
from pushforward.linear.gaussian import POINT, WHITE, Gaussian, fit, root, unrooted, whitening_angle
from pushforward.linear.operator import Operator, add_products, apply_coefficients, products
from pushforward.linear.process import (
    VE,
    VP,
    Blurring,
    BlurringLangevin,
    Cosine,
    Flow,
    Langevin,
    Process,
    ScaledProcess,
)

__all__ = [
    "IDENTITY", "POINT", "PROCESSES", "VE", "VP", "WHITE", "Basis", "Blurring", "BlurringLangevin", "Cosine",
    "Discrete", "Flow", "Gaussian", "Langevin", "Operator", "Process", "ScaledProcess", "add_products",
    "apply_coefficients", "fit", "process_from_config", "products", "root", "unrooted", "whitening_angle",
]  # fmt: skip

PROCESSES: dict[str, type[Process]] = {
    p.name: p for p in (VP, Cosine, VE, Flow, Blurring, Langevin, BlurringLangevin, Discrete)
}


def process_from_config(config: dict[str, Any]) -> Process:
    """Make the process that `Process.config` described.

    Raises:
        PushforwardError: the name or a parameter is unknown, or a parameter is not a number.
    """
    settings = dict(config)
    if "name" not in settings:
        raise PushforwardError(
            f"This describes no process: it has no 'name', one of {', '.join(PROCESSES)}. The configuration of a "
            "diffusers scheduler is read by pushforward.load, with its folder, or by pushforward.PushforwardScheduler."
        )
    name = settings.pop("name")
    if not isinstance(name, str) or name not in PROCESSES:
        raise PushforwardError(
            f"Unknown process {name!r}; known are {', '.join(PROCESSES)}. Add a process of your own to "
            "pushforward.linear.PROCESSES first."
        )
    kind = PROCESSES[name]
    known = [one.name for one in fields(kind) if one.init]  # type: ignore[arg-type]
    if unknown := settings.keys() - known:
        raise PushforwardError(
            f"Process {name!r} does not take {', '.join(sorted(unknown))}; its parameters are {', '.join(known)}."
        )
    return check(settings, kind, f"Process {name!r}", f"its parameters are {', '.join(known)}")
