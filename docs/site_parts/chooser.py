"""What the plot of solvers shows: the measured figures of benchmarks/results, for `_static/chooser.js` to draw."""

import json
from pathlib import Path
from typing import Any

PEERS = "the best of diffusers"
FASHION = {"vp": "VP", "blurring": "blurring", "langevin": "Langevin"}


def html(results: Path) -> str:
    """The plot's place in a page, with its data; without scripts, the tables of the page say the same."""
    data = json.dumps([*_errors(results), *_fashion(results)], separators=(",", ":"))
    return f'<div class="chooser"><script type="application/json">{data}</script></div>'


def _errors(results: Path) -> list[dict[str, Any]]:
    """Errors to the converged images, by solver: with its best settings for that many calls, in hindsight."""
    cases = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))["cases"]
    sets = []
    for name, case in cases.items():
        lines: dict[str, dict[int, tuple[float, str]]] = {}
        for row in case["rows"]:
            solver = row["solver"] if row["ours"] else PEERS
            settings = row["settings"] if row["ours"] else f"{row['solver']}, {row['settings']}"
            for calls, (error, _) in row["errors"].items():
                line = lines.setdefault(solver, {})
                line[int(calls)] = min(line.get(int(calls), (float("inf"), "")), (error, settings))
        _, mixture, process = name.partition(", ")
        sets.append({
            "title": f"{process}, exact network" if mixture else f"{name}, embedded network",
            "measure": "error of the image (median, relative)", "less": "less is better",
            "lines": [{"name": n, "points": [[c, *line[c]] for c in sorted(line)]} for n, line in lines.items()],
        })  # fmt: skip
    return sets


def _fashion(results: Path) -> list[dict[str, Any]]:
    """Distances of images to real ones, on the embedded networks."""
    sets = []
    for file, title in FASHION.items():
        lines: dict[str, list[tuple[float, float, str]]] = {}
        for row in json.loads((results / "tables" / f"{file}.json").read_text(encoding="utf-8"))["rows"]:
            if row["sampler"] != "converged":
                solver, _, settings = row["sampler"].partition(":")
                name = "rk45 (adaptive)" if solver == "rk45" else row["sampler"]
                ratio = row["measures"]["Fashion"]["ratio"]
                lines.setdefault(name, []).append((row["nfe"], ratio, settings if solver == "rk45" else ""))
        sets.append({
            "title": f"{title}, trained on Fashion-MNIST",
            "measure": "distance to real images (1: that of 200 calls)", "less": "less is better",
            "lines": [{"name": n, "points": sorted(line)} for n, line in lines.items()],
        })  # fmt: skip
    return sets
