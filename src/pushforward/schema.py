"""Reading files of ours: what is wrong with one is said in one sentence that names the file and the entry.

A schema is a dataclass, or any other type, whose annotations pydantic checks, strictly: a number in quotes is no
number, `true` is no 1, NaN and numbers beyond the range of floats are none, and an entry that the dataclass does not
have is an error.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import ErrorDetails

from pushforward.errors import PushforwardError

__all__ = ["check", "parse", "read"]

T = TypeVar("T")
_LARGEST = 2**30  # bytes of a file that is read as JSON


def read(path: Path, kind: type[T], remedy: str) -> T:
    """What a JSON file holds.

    Args:
        path: of the file.
        kind: of its content, see `parse`.
        remedy: what to do about a file that is wrong.

    Raises:
        PushforwardError: it is not there, cannot be read, is not JSON, or holds something else.
    """
    try:
        if not path.is_file():
            what = "is no file" if path.exists() else "is missing"
            msg = f"{path} {what}; {remedy}."
            raise PushforwardError(msg)
        if path.stat().st_size > _LARGEST:
            msg = f"{path} is too large to be read, {path.stat().st_size:,} bytes; {remedy}."
            raise PushforwardError(msg)
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); {remedy}."
        raise PushforwardError(msg) from None
    return parse(data, kind, str(path), remedy)


def parse(text: str | bytes, kind: type[T], where: str, remedy: str) -> T:
    """What JSON text holds.

    Args:
        text: UTF-8, if bytes (a byte order mark is allowed).
        kind: a dataclass, whose fields are the entries (lists become its tuples), or any type that pydantic knows.
        where: the text is from, for messages.
        remedy: what to do about text that is wrong.

    Raises:
        PushforwardError: it is not JSON, or holds something else.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        msg = f"{where} is no JSON of ours (it is nested too deeply); {remedy}."
        raise PushforwardError(msg) from None
    except ValueError as error:  # of the syntax, of the encoding, of numbers
        msg = f"{where} is not valid JSON ({error}); {remedy}."
        raise PushforwardError(msg) from None
    return check(value, kind, where, remedy)


def check(value: object, kind: type[T], where: str, remedy: str) -> T:
    """A value as JSON has it, as a `kind`; see `parse`.

    Raises:
        PushforwardError: it is something else.
    """
    try:
        # Names of files that are no text have lone surrogates in them, which pydantic's own reader of JSON refuses.
        plain = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        found: Any = _adapter(kind).validate_json(plain)  # type: ignore[arg-type]
    except RecursionError:
        msg = f"{where} is no JSON of ours (it is nested too deeply); {remedy}."
        raise PushforwardError(msg) from None
    except ValidationError as error:
        raise PushforwardError(_sentence(error.errors(include_url=False)[0], where, remedy)) from None
    if not is_dataclass(kind):
        return found
    return kind(**{name: getattr(found, name) for name in found.model_fields_set})


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
    entry = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "missing":
        return f"{where} lacks the entry {entry!r}; {remedy}."
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} has an unknown entry {entry!r}; {remedy}."
    wrong = error["msg"].removeprefix("Input ")
    got = json.dumps(error["input"], default=str)
    got = got if len(got) <= 40 else f"{got[:37]}..."
    return f"{where} {f'has a wrong {entry!r}: it' if entry else ''} {wrong}; got {got}: {remedy}.".replace("  ", " ")
