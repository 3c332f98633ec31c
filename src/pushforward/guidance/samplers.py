"""Samplers of guided images in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import Any, get_args

from pushforward.errors import PushforwardError
from pushforward.guidance.dynamics import SAMPLERS, Dynamics
from pushforward.guidance.optimisers import OPTIMISERS
from pushforward.guidance.particles import PARTICLES, Particles, psi
from pushforward.guidance.posterior import Prior
from pushforward.guidance.steering import STEERINGS, Steering
from pushforward.maps.spec import words

__all__ = ["parse_sampler"]


def parse_sampler(text: str) -> Dynamics | Particles | Steering | dict[str, Any]:
    """Read how chains move, how particles go, how a plan's steps are steered, or the settings of a descent.

    Args:
        text: the sampler's name with settings after colons, for instance `hmc:leaps=5`.

    Raises:
        PushforwardError: no such sampler, or it does not take these settings.
    """
    name, settings = words(text, "sampler", "hmc:leaps=5")
    try:
        if name in SAMPLERS:
            return SAMPLERS[name](**settings)
        if name in PARTICLES:
            return PARTICLES[name](**_of_particles(settings))
        if name in STEERINGS:
            return replace(STEERINGS[name], **settings)  # type: ignore[arg-type]
        if name in OPTIMISERS:
            unknown = settings.keys() - {"candidates", "learning_rate", "prior"}
            if unknown:
                raise TypeError(", ".join(unknown))
            prior = settings.pop("prior", "chi")
            if prior not in (*get_args(Prior), "none"):
                raise PushforwardError(
                    f"The prior of a descent is {', '.join(get_args(Prior))} or none; got {prior!r}."
                )
            return {"optimiser": name, "prior": None if prior == "none" else prior, **settings}
    except TypeError as error:
        raise PushforwardError(
            f"The sampler {name!r} does not take these settings ({text}): {str(error).splitlines()[0]}."
        ) from error
    raise PushforwardError(
        f"Unknown sampler {name!r}; known are {', '.join([*SAMPLERS, *PARTICLES, *OPTIMISERS, *STEERINGS])}."
    )


def _of_particles(settings: Mapping[str, object]) -> dict[str, Any]:
    """The settings of particles, with the chains of `psi:dynamics=mala:step-size=0.1` made of their words."""
    names = signature(psi).parameters
    made: dict[str, Any] = {name: value for name, value in settings.items() if name in names}
    chains: dict[str, Any] = {name: value for name, value in settings.items() if name not in names}
    if chains or "dynamics" in made:
        dynamics = made.get("dynamics", "mala")
        if dynamics not in SAMPLERS:
            raise TypeError(f"no chains {dynamics!r}; known are {', '.join(SAMPLERS)}")
        made["dynamics"] = SAMPLERS[dynamics](**chains)
    return made
