"""Reading the library's own files, and checking settings: an error is one sentence that names what is wrong where.

A schema is a dataclass, or any other type, whose annotations pydantic checks strictly: a number in quotes is not a
number, `true` is not 1, NaN and numbers beyond the range of floats are refused, and so are entries that the dataclass
does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails

from pushforward.errors import PushforwardError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

__all__ = ["Count", "Positive", "check", "check_fields", "check_tensors", "parse", "read"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
T = TypeVar("T")
_LARGEST = 2**30  # bytes of the largest file that is read as JSON


def read(path: Path, kind: type[T], remedy: str) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        kind: type of its content, see `parse`.
        remedy: what to do if the file is wrong, for messages.

    Raises:
        PushforwardError: it is missing, cannot be read, is not JSON, or has other content.
    """
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "is missing"
            raise PushforwardError(f"{path} {what}; {remedy}.")
        if path.stat().st_size > _LARGEST:
            raise PushforwardError(f"{path} is too large to be read, {path.stat().st_size:,} bytes; {remedy}.")
        data = path.read_bytes()
    except OSError as error:
        raise PushforwardError(f"{path} cannot be read ({error.strerror}); {remedy}.") from None
    return parse(data, kind, str(path), remedy)


def parse(text: str | bytes, kind: type[T], where: str, remedy: str) -> T:
    """Parse JSON text.

    Args:
        text: the text; bytes are UTF-8, with or without a byte order mark.
        kind: a dataclass, whose fields are the entries (lists become its tuples), or any type that pydantic knows.
        where: where the text is from, for messages.
        remedy: what to do if the text is wrong, for messages.

    Raises:
        PushforwardError: it is not JSON, or has other content.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise PushforwardError(f"{where} is nested too deeply; {remedy}.") from None
    except ValueError as error:  # wrong syntax, encoding or numbers
        raise PushforwardError(f"{where} is not valid JSON ({error}); {remedy}.") from None
    return check(value, kind, where, remedy)


def check(value: object, kind: type[T], where: str, remedy: str) -> T:
    """Check a value from JSON, and return it as a `kind`; see `parse`.

    Raises:
        PushforwardError: it is of another kind.
    """
    try:
        # Names of files that are not valid text contain lone surrogates, which pydantic's JSON reader refuses.
        plain = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        found: Any = _adapter(kind).validate_json(plain)  # type: ignore[arg-type]
    except RecursionError:
        raise PushforwardError(f"{where} is nested too deeply; {remedy}.") from None
    except ValidationError as error:
        raise PushforwardError(_sentence(error.errors(include_url=False)[0], where, remedy)) from None
    if not is_dataclass(kind):
        return found
    return kind(**{name: getattr(found, name) for name in found.model_fields_set})


def check_fields(value: DataclassInstance) -> None:
    """Check the fields of a new dataclass by their annotations; numbers of other libraries become Python's.

    Raises:
        PushforwardError: a field is of another kind; the message names the first.
    """
    for name, given in vars(value).items():
        if getattr(given, "ndim", None) == 0:
            object.__setattr__(value, name, given.item())
    try:
        _adapter(type(value)).validate_python(vars(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wrong = first["msg"].replace("Input", "it", 1)
        raise PushforwardError(
            f"{type(value).__name__} has a wrong {first['loc'][0]!r}: {wrong}; got {first['input']!r}."
        ) from None


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, str], where: str, remedy: str, **sizes: int
) -> None:
    """Raise unless all tensors are there, hold floating-point numbers or counts, and have shapes that fit together.

        check_tensors(t, {"code": "count numbers", "energy": "count"}, "codes.safetensors", "make them again")

    Args:
        tensors: the tensors by name.
        shapes: the names of their axes; axes of the same name have the same length. A final `...` is any more axes.
        where: where the tensors are from, for messages.
        remedy: what to do if they are wrong, for messages.
        sizes: lengths of axes that are known.

    Raises:
        PushforwardError: a tensor is missing or does not fit; the message names the first.
    """
    known = dict(sizes)
    for name, text in shapes.items():
        if name not in tensors:
            raise PushforwardError(f"{where} lacks {name!r}; {remedy}.")
        found, axes = tuple(tensors[name].shape), text.split()
        if axes[-1] == "...":
            axes = [*axes[:-1], *map(str, range(len(axes) - 1, len(found)))]
            known.update({str(k): length for k, length in enumerate(found)})
        fits = len(found) == len(axes) and not tensors[name].is_complex() and tensors[name].dtype.itemsize > 1
        if not fits or any(known.setdefault(axis, n) != n for axis, n in zip(axes, found, strict=True)):
            raise PushforwardError(
                f"{where} has {name!r}, {tensors[name].dtype} of {found}, that does not fit its other parts; {remedy}."
            )


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return TypeAdapter(kind, config=strict)
    hints = get_type_hints(kind, include_extras=True)
    entries: dict[str, Any] = {
        one.name: (hints[one.name], ... if one.default is one.default_factory is MISSING else Field(default=None))
        for one in fields(kind)
        if one.init
    }
    own: Any = getattr(kind, "__pydantic_config__", {})
    return TypeAdapter(create_model(kind.__name__, __config__={**strict, **own}, **entries))


def _sentence(error: ErrorDetails, where: str, remedy: str) -> str:
    names = [part for part in error["loc"] if isinstance(part, int) or "[" not in part]  # without branches of unions
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    name, bracket, index = text.partition("[")
    entry = f"{name!r}{bracket}{index}"
    if error["type"] == "missing":
        return f"{where} lacks the entry {entry}; {remedy}."
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} has an unknown entry {entry}; {remedy}."
    wrong = error["msg"].removeprefix("Input ")
    got = json.dumps(error["input"], default=str)
    got = got if len(got) <= 40 else f"{got[:37]}..."
    return f"{where} {f'has a wrong entry {entry}: it ' if text else ''}{wrong}; got {got}: {remedy}."
