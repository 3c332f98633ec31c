"""A pipeline made tiny, and the arguments of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tiny:
    """A pipeline with random weights, and the arguments that a user would call it with.

    Steps, latents and generator are not among them.
    """

    pipe: Any
    call: dict[str, Any] = field(default_factory=dict)
