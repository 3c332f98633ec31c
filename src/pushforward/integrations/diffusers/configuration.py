"""The configuration of a pipeline's own scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.schedules import READERS

__all__ = ["public_settings"]

_DEFAULTS = "_use_default_values"  # names of the settings that a configuration has by default


def public_settings(config: Any) -> dict[str, Any]:
    """Return the public settings of a scheduler, with the class that they are of as `trained`."""
    if not isinstance(config, Mapping):
        config = {**config.config, "_class_name": type(config).__name__}
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    if "trained" not in known:
        known["trained"] = config.get("_class_name") or _class_with(set(known))
    if _DEFAULTS in config:
        known[_DEFAULTS] = config[_DEFAULTS]
    return known


def _class_with(names: set[str]) -> str:
    """Find the class with settings of these names: schedulers made in memory do not say it in their configuration."""
    for name in READERS:
        cls = getattr(import_diffusers(), name, None)
        if cls is not None and set(signature(cls.__init__).parameters) - {"self", "kwargs"} == names:
            return name
    raise PushforwardError(
        "The configuration does not say which scheduler it is of; give the scheduler itself, pipe.scheduler."
    )
