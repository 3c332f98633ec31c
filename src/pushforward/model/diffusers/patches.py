"""What a call of a `diffusers` pipeline puts in place of the pipeline's own, and takes back however the call ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

__all__ = [
    "LOCK",
    "alike",
    "alone",
    "as_wide",
    "callee",
    "guiders",
    "hooked",
    "hooked_locally",
    "offloading_known",
    "parts",
    "patched",
    "restored",
]

LOCK = threading.RLock()  # one call at a time: pipelines share parts, and functions of their modules
_P = ParamSpec("_P")
_R = TypeVar("_R")


def alone(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let one thread at a time call this function and the others that are marked so."""

    @wraps(function)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with LOCK:
            return function(*args, **kwargs)

    return waiting


def parts(pipe: Any) -> dict[str, nn.Module]:
    """List the pipeline's modules by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def guiders(pipe: Any) -> dict[str, Any]:
    """List the pipeline's parts that guide its predictions, by name."""
    return {name: part for name, part in pipe.components.items() if hasattr(part, "prepare_inputs")}


def alike(pipe: Any, names: Collection[str]) -> frozenset[str]:
    """Name the parts of a pipeline of the same classes as these."""
    own = parts(pipe)
    classes = {type(own[name]) for name in names}
    return frozenset(name for name, part in own.items() if type(part) in classes)


def callee(part: nn.Module) -> str:
    """Name the method through which a module is called: what comes before it is not compiled with it."""
    return "forward" if getattr(part, "_compiled_call_impl", None) is None else "_compiled_call_impl"


def hooked(part: nn.Module, hook: Callable[..., Any]) -> AbstractContextManager[None]:
    """Put a hook before a module's calls, which may change their arguments."""
    own = getattr(part, callee(part))

    @wraps(own)  # some pipelines look at its signature
    def called(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook(part, args, kwargs) or (args, kwargs)
        return own(*args, **kwargs)

    return patched(part, callee(part), called)


def hooked_locally(part: nn.Module) -> bool:
    """Say whether functions that were made within others, which cannot be pickled, are called with a module."""
    hooks = (hook for module in part.modules() for kind in (module._forward_hooks, module._forward_pre_hooks)
             for hook in kind.values())  # fmt: skip
    return any("<locals>" in getattr(hook, "__qualname__", "") for hook in hooks)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in an object's attribute, past whatever watches its assignment, and put the old back at the end."""
    had, old = name in vars(owner), vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = old
        else:
            del vars(owner)[name]


@contextmanager
def restored(owner: Any) -> Iterator[None]:
    """Have an object hold at the end what it holds now, and nothing else."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name in vars(owner).keys() - before.keys():
            del vars(owner)[name]
        vars(owner).update(before)


@contextmanager
def as_wide(part: Any) -> Iterator[None]:
    """Have a part at the end in the dtype that it is in now: pipelines widen decoders for a while."""
    before: list[Any] = []
    own = part._apply

    @wraps(own)  # what moves or casts a part goes by this
    def changed(*args: Any, **kwargs: Any) -> Any:
        before.append(getattr(part, "dtype", None))  # looked up only now, as it is looked for in all its modules
        return own(*args, **kwargs)

    try:
        with patched(part, "_apply", changed):
            yield
    finally:
        if before and getattr(part, "dtype", None) != before[0]:
            part.to(before[0])


def offloading_known() -> AbstractContextManager[None]:
    """Have `diffusers` look for how a part is offloaded once: it looks through all modules whenever it asks where."""
    from diffusers.hooks import group_offloading

    name = "_get_top_level_group_offload_hook"
    own = getattr(group_offloading, name, None)  # which another version may lack
    return nullcontext() if own is None else patched(group_offloading, name, cache(own))
