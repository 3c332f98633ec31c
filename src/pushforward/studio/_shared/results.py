"""Results to take away: files with the command and the program that make them again."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from pushforward.maps.code import Code

__all__ = ["call", "codes_file", "line", "packed", "png"]


def line(arguments: Sequence[str]) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(["pushforward", *arguments])


def call(name: str, *positional: object, **named: object) -> str:
    """A call in Python; what is `None` is left out."""
    said = [*map(_literal, positional), *(f"{k}={_literal(v)}" for k, v in named.items() if v is not None)]
    return f"{name}({', '.join(said)})"


class Name(str):
    """A name or an expression in a program, to be written as it is."""

    __slots__ = ()


def _literal(value: object) -> str:
    return str(value) if isinstance(value, Name) else json.dumps(value) if isinstance(value, str) else repr(value)


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def codes_file(code: Code, info: Mapping[str, Any]) -> bytes:
    """Codes as the bytes of a file that `pushforward decode` takes."""
    from pushforward.maps.storage import save_codes

    with TemporaryDirectory() as folder:
        path = Path(folder) / "codes.safetensors"
        save_codes(path, code, info)
        return path.read_bytes()


def packed(files: Mapping[str, bytes], command: str, program: str) -> bytes:
    """Files, and in `settings.txt` the command and the program, as one `.zip`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("settings.txt", f"# The same on the command line:\n{command}\n\n# In Python:\n{program}\n")
    return file.getvalue()
