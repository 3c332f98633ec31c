"""Verbs in a program that has set PyTorch in its own way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["undisturbed"]

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(verb: Callable[P, R]) -> Callable[P, R]:
    """Make a verb work outside inference mode, whose tensors take no gradients, and make its own tensors on the CPU.

    So results are the same in either mode and under any `torch.set_default_device`. The network keeps its device.
    """

    @wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.no_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            return verb(*args, **kwargs)

    return called
