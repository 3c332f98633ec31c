"""A device that is not there: its tensors are computed on the CPU, and refuse to be mixed with those of the CPU.

`with Elsewhere():` makes `torch.device("elsewhere")` a device like a GPU. An operation on tensors of both raises what a
GPU's would; copies, numbers (tensors without dimensions) and indices may be of the CPU. So what would fail on a GPU for
a tensor left behind fails on any machine.

Importing this changes PyTorch for the rest of the process.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEXED = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
BELOW = (aten.empty_strided.default, aten.empty.memory_format, *COPIES)  # what lists as indices call without a mode


class _Module(_DummyBackendModule):
    """What autocast asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class There(Tensor):
    """A tensor elsewhere, held here."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """See the module."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, its result where a device would have it."""
    given = [x for x in leaves([*args, *kwargs.values()]) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, There)]
    if there and func not in COPIES | INDEXING:
        checked = leaves([args[0], *args[2:]]) if func in INDEXED else given
        left = [x for x in checked if isinstance(x, Tensor) and not isinstance(x, There) and x.dim()]
        if left:
            msg = f"{func}: tensors {NAME} and on the CPU, of shape {', '.join(str(tuple(x.shape)) for x in left)}"
            raise RuntimeError(msg)
    stays = bool(there)
    if func is aten.copy_.default:
        stays = isinstance(args[0], There)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there:
        args, kwargs = changed(held, args), {name: changed(held, value) for name, value in kwargs.items()}
    outcome = func(*args, **kwargs)
    if not stays:
        return outcome
    known = {id(x.held): x for x in there}

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else There(x)

    return changed(placed, outcome)


def leaves(value: Any) -> Iterator[Any]:
    """What an operation is given. PyTorch's own trees take longer to walk than the operations of small tensors."""
    if isinstance(value, list | tuple):
        for x in value:
            yield from leaves(x)
    else:
        yield value


def changed(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists of changed leaves."""
    if isinstance(value, list | tuple):
        made = [changed(change, x) for x in value]
        return made if isinstance(value, list) else tuple(made)
    return change(value)


def held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_library = torch.library.Library("aten", "IMPL")
for _func in BELOW:

    def _below(*args: Any, _func: Any = _func, **kwargs: Any) -> Any:
        return dispatched(_func, args, kwargs if _func in COPIES else {**kwargs, "device": torch.device(NAME)})

    _library.impl(_func.name().removeprefix("aten::"), _below, "PrivateUse1")
