"""List the models that come with the package.

Each can be sampled by its name: `pushforward sample NAME`.
"""

from __future__ import annotations

import math
from typing import Any

import typer
from safetensors import safe_open

from pushforward.cli._shared.checks import check_outputs
from pushforward.cli._shared.options import JsonOption
from pushforward.cli._shared.report import write_json
from pushforward.evaluation.report import aligned
from pushforward.model import zoo
from pushforward.model.storage import CONFIG, WEIGHTS, read_json

__all__ = ["models"]


def models(json: JsonOption = None) -> None:
    """List the models that come with the package.

    Each can be sampled by its name: `pushforward sample NAME`.
    """
    check_outputs({"--json": json})
    rows = [_row(name) for name in zoo.names()]
    if json != "-":
        head = ["name", "process", "shape", "parameters", "bytes", "data"]
        lines = [
            [row["name"], row["process"], "x".join(map(str, row["shape"])), f"{row['parameters']:,}",
             f"{row['bytes']:,}", row["data"]]
            for row in rows
        ]  # fmt: skip
        typer.echo(aligned([head, *lines]))
    write_json({"models": rows}, json)


def _row(name: str) -> dict[str, Any]:
    """From the files alone: no network is made."""
    config, weights = read_json(zoo.FOLDER / name / CONFIG), zoo.FOLDER / name / WEIGHTS
    with safe_open(weights, "pt") as tensors:
        parameters = sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return {
        "name": name,
        "process": config["process"]["name"],
        "data": config["info"].get("data", ""),
        "shape": config["shape"],
        "parameters": parameters,
        "bytes": weights.stat().st_size,
        "classes": config["classes"],
    }
