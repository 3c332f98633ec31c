"""Results to take away: files with the command and the program that make them again."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from pushforward.maps.code import Code
    from pushforward.maps.diffusion import Diffusion

__all__ = ["Name", "call", "codes_file", "line", "options", "packed", "png", "reading"]


def line(arguments: Sequence[str]) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(["pushforward", *arguments])


def options(**given: object) -> list[str]:
    """Options of a command, each before its value, or before each of several; what is `None` is left out."""
    said: list[str] = []
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            said += [f"--{name.replace('_', '-')}", f"{one:g}" if isinstance(one, float) else str(one)]
    return said


def call(name: str, *positional: object, **named: object) -> str:
    """A call in Python; what is `None` is left out."""
    said = [*map(_literal, positional), *(f"{k}={_literal(v)}" for k, v in named.items() if v is not None)]
    return f"{name}({', '.join(said)})"


def reading(model: str, count: int) -> list[str]:
    """The lines of a program that load a model and read so many pictures of a result as its images."""
    return [
        "import pushforward as pf",
        "from pushforward.data.inputs import read_inputs",
        "from pathlib import Path",
        "",
        f"model = {call('pf.load', model)}",
        "channels, *size = model.image_shape",
        f"photos = [Path(f'picture-{{k}}.png') for k in range({count})]",
        "images = read_inputs(photos, tuple(size), channels).values",
    ]


class Name(str):
    """A name or an expression in a program, to be written as it is."""

    __slots__ = ()


def _literal(value: object) -> str:
    if isinstance(value, str) and not isinstance(value, Name):
        return json.dumps(value, ensure_ascii=False)  # whose escapes of emoji are not Python's
    return str(value) if isinstance(value, Name) else repr(value)


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def codes_file(source: str, there: Diffusion, solver: str, code: Code) -> dict[str, bytes]:
    """The file of codes that commands write, and `pushforward decode` takes.

    Args:
        source: what `load` finds the model by.
        there: the map that decodes them, bound to their classes or prompts and to its guidance.
        solver: its plan's, in words.
        code: the codes.
    """
    from pushforward.maps.spec import parse
    from pushforward.maps.storage import header, save_codes

    info = header(source, parse(solver), there, len(code))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "codes.safetensors"
        save_codes(path, code, {**info, "model": source})
        return {path.name: path.read_bytes()}


def packed(files: Mapping[str, bytes], says: str, command: str, program: str) -> bytes:
    """Files, and in `settings.txt` what the page says of them, the command and the program, as one `.zip`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        settings = f"# {says}\n\n# The same on the command line:\n{command}\n\n# In Python:\n{program}\n"
        archive.writestr("settings.txt", settings)
    return file.getvalue()
