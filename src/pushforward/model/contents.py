"""The contents of models, networks and functions, as plain values for `data.files.digest`.

Two models with the same contents make the same images, bit for bit on the same hardware, whatever their names and
wherever they were read from.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from dis import get_instructions
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from pushforward.data.files import digest
from pushforward.linear import Gaussian
from pushforward.model.model import Model

__all__ = ["contents", "model_digest"]

_LATER = {"sketch"}  # settings of networks since 0.1.0, without which they are what they were
_PLACES = {"name_or_path", "transformers_version"}  # entries of configurations that change nothing
# Modules that have moved keep their old names in digests, so that stored results are still recognised.
_KNOWN_AS = {
    "pushforward.denoiser": "pushforward.model.network",
    "pushforward.verbs.model": "pushforward.model.model",
    "pushforward.model.tokens": "pushforward.model.words",
    "pushforward.model.trained": "pushforward.model.model",
    "pushforward.model.diffusers.load": "pushforward.model.diffusers",
    "pushforward.model.diffusers.folders": "pushforward.model.folders",
    "pushforward.model.diffusers.networks": "pushforward.model.pipelines",
    "pushforward.model.diffusers.schedules": "pushforward.model.schedulers",
    "pushforward.vision.classifiers": "pushforward.tasks.energies.networks",
    "pushforward.vision.clip": "pushforward.tasks.clip",
    "pushforward.vision.faces": "pushforward.tasks.energies.faces",
    "pushforward.vision.features": "pushforward.tasks.features",
}
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}


def model_digest(model: Model) -> str:
    """Hash a model: process, networks with all settings and weights, text encoders, statistics.

    The name, the place it was read from and a negative prompt do not count. It takes about a second per one or two GB.
    """
    told = (model.shape, model.image_shape, model.grid, model.classes, model.means)
    parts = (model.denoiser, model.reference, model.statistics, model.decoder, model.encoder, model.text)
    return digest("model 1", contents([model.process.config(), *told, *parts]))


def contents(value: object) -> Any:
    """Return what an object is made of: plain values and tensors, in lists and mappings.

    - a PyTorch module: classes, settings, weights and buffers of it and of all modules in it;
    - a function: what it closes over and its defaults, and if it comes from no installed package also its code and the
      globals that the code names;
    - a dataclass: its fields; another object of this package or the user's: its attributes;
    - an object of this package with a method `contents`: what that returns;
    - an object of another library: only its class, except for tokenizers and pictures.
    """
    return _contents(value, {})


def _contents(value: Any, seen: dict[int, tuple[object, Any]]) -> Any:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    if id(value) not in seen:
        seen[id(value)] = value, f"again {_name(type(value))}"  # where it is met inside itself
        seen[id(value)] = value, _made_of(value, seen)
    return seen[id(value)][1]


def _made_of(value: Any, seen: dict[int, tuple[object, Any]]) -> Any:
    def of(part: object) -> Any:
        return _contents(part, seen)

    if callable(own := getattr(type(value), "contents", None)):
        return [_name(type(value)), of(own(value))]
    if isinstance(value, Image):
        return [value.mode, np.asarray(value)]
    match value:
        case nn.Module():
            return _of_module(value, seen)
        case Mapping():
            return {key if isinstance(key, str) else digest(of(key)): of(item) for key, item in value.items()}
        case list() | tuple():
            return [of(item) for item in value]
        case set() | frozenset():
            return {digest(of(item)) for item in value}
        case partial():
            return [of(value.func), of(value.args), of(value.keywords)]
        case MethodType():
            return [of(value.__self__), of(value.__func__)]
        case FunctionType():
            return _of_function(value, seen)
        case property():
            return [of(value.fget)]
        case ModuleType() if _own(value.__name__):
            return [value.__name__, of({k: v for k, v in vars(value).items() if not k.startswith("__")})]
        case type() if _own(value.__module__):
            kept = {k: v for k, v in vars(value).items() if isinstance(v, FunctionType) or not k.startswith("_")}
            return [_name(value), of(value.__bases__), of(kept)]
        case ModuleType() | type():
            return _name(value)
    kind = type(value)
    if hasattr(value, "__wrapped__"):
        return of(value.__wrapped__)
    if callable(getattr(value, "get_vocab", None)):
        return [_name(kind), _of_tokenizer(value)]
    if isinstance(value, Gaussian):  # a number is one, be it kept as a tensor
        parts = {"variance": value.variance, "mean": value.mean}
        return [of(kind), {name: x if x.ndim else x.item() for name, x in parts.items()}]
    if is_dataclass(value):
        return [of(kind), of({one.name: getattr(value, one.name) for one in fields(value)})]
    if _own(kind.__module__) or kind.__module__.startswith("pushforward."):
        return [of(kind), of(getattr(value, "__dict__", {}))]
    return str(value) if isinstance(value, torch.dtype) else _name(value if callable(value) else kind)


def _of_module(module: nn.Module, seen: dict[int, tuple[object, Any]]) -> Any:
    """Return classes, settings and tensors; for a compiled module, what saving it would write."""
    if isinstance(module, torch.jit.ScriptModule):
        with zipfile.ZipFile(BytesIO(module.save_to_buffer())) as file:
            own = [name for name in file.namelist() if not name.endswith((".debug_pkl", "/serialization_id"))]
            return {name.partition("/")[2]: file.read(name) for name in own}
    rows: list[Any] = []
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            rows.append([name, _contents(part, seen)])
            continue
        config = getattr(part, "config", None)
        settings = {key: item for key, item in vars(part).items() if _is_setting(item)}
        settings["config"] = config if isinstance(config, Mapping) else getattr(config, "__dict__", None)
        rows.append([name, _contents(type(part), seen), _contents(_public(settings), seen)])
    return [*rows, [*module.named_parameters()], [*module.named_buffers()]]


def _is_setting(value: object) -> bool:
    """Say whether an attribute of a module is a setting, not a part of it or a tool of its library."""
    kinds = (bool, int, float, str, list, tuple, Mapping, Tensor, FunctionType, MethodType, partial)
    return value is None or isinstance(value, kinds) or is_dataclass(value) or hasattr(value, "get_vocab")


def _public(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the settings without those that are private to a library, say where it found them, or came later."""
    return {
        key: _public(item) if isinstance(item, Mapping) else item
        for key, item in settings.items()
        if not (isinstance(key, str) and (key.startswith("_") or key in _PLACES or key == "training"))
        and not (key in _LATER and isinstance(item, int) and not item)
    }


def _of_function(function: FunctionType, seen: dict[int, tuple[object, Any]]) -> Any:
    if not _own(function.__module__) and hasattr(function, "__wrapped__"):
        return _contents(function.__wrapped__, seen)
    cells: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled
            cells.append(cell.cell_contents)
    made = [_contents(part, seen) for part in (function.__defaults__, function.__kwdefaults__, cells)]
    if not _own(function.__module__):
        return [_name(function), *made]
    known = function.__globals__
    for code in _codes(function.__code__):
        consts = [one for one in code.co_consts if not isinstance(one, CodeType)]
        imported = sorted({step.argval for step in get_instructions(code) if step.opname == "IMPORT_NAME"})
        used = [known[word] for word in code.co_names if word in known]
        used += [_imported(word) for word in imported]
        made += [code.co_code, code.co_names, *(_contents(part, seen) for part in (consts, used))]
    return made


def _imported(name: str) -> ModuleType | str:
    """Return the module that a function imports when it runs; the user's own is imported now."""
    with suppress(Exception):  # an error in the user's code; running the function will report it
        if name not in sys.modules and (spec := find_spec(name)) is not None and not _installed(spec.origin):
            import_module(name)
    return sys.modules.get(name, name)


def _of_tokenizer(tokenizer: Any) -> Any:
    """Return all its rules, except the length that the texts of the last call were cut or filled to."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def _codes(code: CodeType) -> list[CodeType]:
    """List a function's code and that of the functions in it."""
    return [code, *(part for one in code.co_consts if isinstance(one, CodeType) for part in _codes(one))]


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__)
    module = getattr(value, "__module__", None) or ""
    return f"{_KNOWN_AS.get(module, module)}.{name}"


def _own(module: str | None) -> bool:
    """Say whether a module is the user's: not of an installed package, of Python or of this package."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names or top in ("", "pushforward"):
        return False
    found = sys.modules.get(top)
    return not _installed(getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None))


def _installed(place: str | None) -> bool:
    return place is not None and any(Path(place).resolve().is_relative_to(folder) for folder in _INSTALLED)
