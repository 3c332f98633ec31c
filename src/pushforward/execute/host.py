"""Work in a program that has set PyTorch in its own way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["undisturbed"]

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function work outside inference mode, whose tensors take no gradients, and make its tensors on the CPU.

    So results are the same in either mode and under any `torch.set_default_device`. The network keeps its device.
    """

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> R:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.no_grad())
                args, kwargs = tuple(map(_usable, args)), {name: _usable(one) for name, one in kwargs.items()}
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return called


def _usable(value: object) -> object:
    """The value, as a tensor that gradients may be taken of if it is one of inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
