"""What the benchmarks share: tables as text, JSON and plots in `results/`, and the environment they ran in."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pushforward.data.files import atomic_path

RESULTS = Path(__file__).parent / "results"


def relative_errors(state: Tensor, reference: Tensor) -> Tensor:
    """Root-mean-square error over root-mean-square of the reference, one a start."""
    difference = (state.double() - reference.double()).flatten(1)
    return difference.norm(dim=1) / reference.double().flatten(1).norm(dim=1)


def median(values: Tensor, dim: int = 0) -> Tensor:
    """The median; of an even count the mean of the two in the middle, of which PyTorch's own is the lower."""
    low, high = values.median(dim).values, -(-values).median(dim).values
    return (low + high) / 2


def number(value: object) -> str:
    """Short text for a cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned."""
    cells = [list(columns), *([number(c) for c in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """Versions and the machine, in words."""
    import diffusers

    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_initialized() else cpu,
    }


def write_json(name: str, content: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json`, with the environment."""
    path = RESULTS / f"{name}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n", encoding="utf-8")
    return path


def read_json(name: str) -> dict[str, Any]:
    """What `write_json` wrote, or nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_text(name: str, text: str) -> Path:
    """Write `results/<name>.md`."""
    path = RESULTS / f"{name}.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def plot_lines(
    name: str,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], bool]]],
    xlabel: str,
    ylabel: str,
) -> Path:
    """Log-log lines in `results/<name>.png`: a panel a title, in it `label -> (x, y, ours)`; ours are solid.

    Four panels or fewer stand in a row.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat[: len(panels)], panels.items(), strict=True):
        for label, (x, y, ours) in lines.items():
            axis.loglog(x, y, "o-" if ours else "s--", label=label, markersize=3.5, linewidth=1.8 if ours else 1.0)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel(ylabel)
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)
    return path
