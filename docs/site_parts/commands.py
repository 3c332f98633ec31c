"""The page of commands: what `pushforward COMMAND --help` says."""

import re
from pathlib import Path

import typer

from pushforward.cli import app, command_names


def write_page(path: Path) -> None:
    """Write the page, if it changes."""
    group = typer.main.get_command(app)
    parts = ["Commands\n========\n", "What ``pushforward COMMAND --help`` says.\n"]
    for name in command_names():
        command = group.get_command(None, name)
        context = typer.Context(command, info_name=name)
        words, _, examples = command.help.partition("\b\n")
        parts += [f"{name}\n{'-' * len(name)}\n", _marked(words.strip()) + "\n"]
        if examples:
            parts.append(".. code-block:: sh\n\n" + re.sub("^", "   ", examples.strip("\n"), flags=re.MULTILINE) + "\n")
        records = filter(None, (parameter.get_help_record(context) for parameter in command.params))
        rows = "".join(f"   * - ``{left}``\n     - {_marked(right)}\n" for left, right in records)
        parts.append(f".. list-table::\n   :widths: 35 65\n\n{rows}")
    text = "\n".join(parts)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _marked(text: str) -> str:
    """Plain text, in which options are code, as reStructuredText."""
    text = re.sub(r"([*|\\_])", r"\\\1", text)
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"``\1``", text)
