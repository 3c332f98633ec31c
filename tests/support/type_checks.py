"""How the library's annotations are checked while tests run. Not imported outside of tests.

What a module defines is decorated as soon as the module has run, function by function, so that what cannot be checked
at run time, such as a protocol, leaves the rest as it is.
"""

import inspect
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

_CALLED = ("__init__", "__call__")  # of special methods; an operator may answer NotImplemented to what it cannot take
_decorate = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int will do for a float
        violation_type=TypeError,  # as an unchecked call may raise
    )
)


def check_annotations(package: str) -> None:
    """Have the annotations of a package's functions and methods checked at each call. Comes before its first import."""
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_check(module: ModuleType) -> None:
            run(module)
            _check(module, module.__name__)

        spec.loader.exec_module = run_and_check  # type: ignore[method-assign]
        return spec


def _check(owner: Any, module: str) -> None:
    """Decorate the functions of a module or a class that were defined in this module."""
    for name, value in list(vars(owner).items()):
        if getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value):
            if not hasattr(value, "_fields"):  # the constructor of a named tuple is not the module's
                _check(value, module)
        elif isinstance(value, FunctionType) and (not name.startswith("__") or name in _CALLED):
            setattr(owner, name, _checked(value))


def _checked(function: FunctionType) -> Any:
    try:  # names that are there for a type checker alone are not found; what is a string is looked up at every call
        function.__annotations__ = get_type_hints(function, include_extras=True)
        return _decorate(function)
    except (NameError, BeartypeDecorHintException):
        return function
