"""The configuration of a pipeline's own scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from pushforward.errors import PushforwardError
from pushforward.model.diffusers.package import import_diffusers
from pushforward.model.diffusers.schedules import READERS, read_schedule, settings_in_force

__all__ = ["public_settings"]

_DEFAULTS = "_use_default_values"  # names of the settings that a configuration has by default


def public_settings(config: Any) -> dict[str, Any]:
    """Return the public settings of a scheduler, with the class that they are of as `trained`."""
    settings = settings_in_force(config)
    if not isinstance(config, Mapping):
        settings["_class_name"] = type(config).__name__
        _check(config, settings)
    config = settings
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    if "trained" not in known:
        known["trained"] = config.get("_class_name") or _class_with(set(known))
    if _DEFAULTS in config:
        known[_DEFAULTS] = config[_DEFAULTS]
    return known


def _check(scheduler: Any, settings: Mapping[str, Any]) -> None:
    """Raise if a scheduler was changed since it was made of its settings."""
    read_schedule(settings, "The scheduler", scheduler=scheduler)
    shift = getattr(scheduler, "shift", settings.get("shift"))
    if shift != settings.get("shift"):
        name = type(scheduler).__name__
        raise PushforwardError(
            f"The shift of this {name} was set to {shift:g} later; make one of that shift, as by "
            f"{name}.from_config(scheduler.config, shift={shift:g})."
        )


def _class_with(names: set[str]) -> str:
    """Find the class with settings of these names: schedulers made in memory do not say it in their configuration."""
    for name in READERS:
        cls = getattr(import_diffusers(), name, None)
        if cls is not None and set(signature(cls.__init__).parameters) - {"self", "kwargs"} == names:
            return name
    raise PushforwardError(
        "The configuration does not say which scheduler it is of; give the scheduler itself, pipe.scheduler."
    )
