"""List the models that come with the package.

Each can be sampled by its name: `pushforward sample NAME`.
"""

from __future__ import annotations

from typing import Any

import typer

from pushforward.cli.common import JsonOption, write_json
from pushforward.model import zoo
from pushforward.model.model import WEIGHTS

__all__ = ["models"]


def models(json: JsonOption = None) -> None:
    """List the models that come with the package.

    Each can be sampled by its name: `pushforward sample NAME`.
    """
    rows = [_row(name) for name in zoo.names()]
    if json != "-":
        line = "{:<24} {:<12} {:<28} {:>10} {:>12} {:>10}".format
        typer.echo(line("name", "process", "data", "shape", "parameters", "bytes"))
        for row in rows:
            shape = "x".join(map(str, row["shape"]))
            size = (f"{row['parameters']:,}", f"{row['bytes']:,}")
            typer.echo(line(row["name"], row["process"], row["data"], shape, *size))
    write_json({"models": rows}, json)


def _row(name: str) -> dict[str, Any]:
    model = zoo.load_zoo(name)
    return {
        "name": name,
        "process": model.process.name,
        "data": model.info.get("data", ""),
        "shape": list(model.shape),
        "parameters": model.parameters,
        "bytes": (zoo.FOLDER / name / WEIGHTS).stat().st_size,
        "classes": list(model.classes),
    }
