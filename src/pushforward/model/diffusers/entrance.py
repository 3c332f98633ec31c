"""Where a `diffusers` pipeline takes its first state from, and how states are put in its place."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pushforward.model.diffusers.patches import patched

__all__ = ["Entrance", "numbered"]

DIGITS = 8  # numbers are sent in digits of this base, which bfloat16 holds when scaled and shifted, too


@dataclass(frozen=True)
class Entrance:
    """Where a pipeline takes its first state from.

    Args:
        kind: `method` of the pipeline, whose result it is or is in; the argument `latents`; or `noise` that it draws.
        name: name of the method.
        place: place in the method's result, if that is a tuple.
        numbers: where in the result's rows the state's numbers are, if it holds more than them.
    """

    kind: str
    name: str = ""
    place: int | None = None
    numbers: Tensor | None = None

    def put(self, states: Tensor, result: Any) -> Any:
        """Return the method's result with these states in it."""
        if self.place is not None:
            several = list(result)
            several[self.place] = replace(self, place=None).put(states, several[self.place])
            return tuple(several)
        if self.numbers is None:
            return states.to(result)
        numbers = self.numbers.to(result.device).expand(len(result), -1)
        whole: Tensor = result.flatten(1).scatter(1, numbers, states.flatten(1).to(result))
        return whole.view_as(result)

    def enter(self, pipe: Any, states: Tensor, stack: ExitStack) -> dict[str, Any]:
        """Put states in place of the pipeline's own until the stack is closed; return further arguments."""
        if self.kind == "latents":
            return {"latents": states.to(pipe.dtype)}
        if self.kind == "method":
            own = getattr(pipe, self.name)

            def prepare(*args: Any, **kwargs: Any) -> Any:
                return self.put(states, own(*args, **kwargs))

            stack.enter_context(patched(pipe, self.name, prepare))
            return {}

        def draw(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
            drawn: Tensor = own_draw(shape, *args, **kwargs)
            return states.to(drawn) if tuple(shape) == tuple(states.shape) else drawn

        for cls in type(pipe).__mro__:
            module = sys.modules.get(cls.__module__)
            own_draw: Any = getattr(module, "randn_tensor", None)
            if own_draw is not None:
                stack.enter_context(patched(module, "randn_tensor", draw))
                break
        return {}


def numbered(like: Tensor, send: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Find which number of a tensor each one is that comes out; `None` if one comes twice, or is not among them."""
    numbers = torch.arange(like.numel(), device=like.device)
    index: Tensor | None = None
    for digit in range(math.ceil(math.log(max(like.numel(), 2), DIGITS))):
        came = send((numbers // DIGITS**digit % DIGITS).to(like).view_as(like)).flatten().to(torch.float64)
        if not bool(((came - came.round()).abs() < 0.1).all()):
            return None
        part = came.round().long().to(like.device) * DIGITS**digit
        index = part if index is None else index + part
    assert index is not None
    within = bool(((index >= 0) & (index < like.numel())).all())
    return index if within and len(index.unique()) == len(index) else None
