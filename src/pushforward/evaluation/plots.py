"""Plots of a comparison of samplers: errors and distances by network evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from pushforward.data.plots import COLOURS, name_lines
from pushforward.evaluation.report import Row, distance_name

__all__ = ["distance_curves"]


def distance_curves(rows: Sequence[Row], path: Path) -> None:
    """What tells samplers apart, by network evaluations, as a PNG with a column for each model.

    On top, the error of each image against the converged one of the same code, its median: it tells samplers apart
    long before their distances do. Below, the Fréchet distance by each feature network, with its standard error,
    extrapolated to infinitely many images where that is known; the dotted line is the converged run's.
    """
    from matplotlib.figure import Figure

    colours = dict(zip(dict.fromkeys(row.sampler for row in rows), cycle(COLOURS), strict=False))
    nets = sorted({net for row in rows for net in row.measures})
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(6.5 * len(models), 4 * (1 + len(nets))), layout="constrained")
    grid = figure.subplots(1 + len(nets), len(models), squeeze=False)
    for model, axes in zip(models, grid[0], strict=True):
        own, ends = [row for row in rows if row.model == model and row.error], []
        for sampler in dict.fromkeys(row.sampler for row in own):
            of = sorted((row for row in own if row.sampler == sampler), key=lambda row: row.nfe)
            medians = [(row.error or {}).get("median") or float("nan") for row in of]
            axes.plot([row.nfe for row in of], medians, marker="o", markersize=4, color=colours[sampler])
            ends.append((medians[-1], sampler, colours[sampler]))
        apart = any((row.error or {}).get("median") for row in own)
        axes.set(
            xlabel="network evaluations per image",
            ylabel="error of an image (median)",
            title=model,
            xscale="log",
            yscale="log" if apart else "linear",
        )
        name_lines(axes, ends)
    for net, line in zip(nets, grid[1:], strict=True):
        for model, axes in zip(models, line, strict=True):
            own, ends = [row for row in rows if row.model == model], []
            for sampler in dict.fromkeys(row.sampler for row in own):
                of = sorted((row for row in own if row.sampler == sampler), key=lambda row: row.nfe)
                values = [_distance(row.measures[net]) for row in of]
                if sampler == "converged":
                    axes.axhline(values[0], color="0.4", linestyle=":")
                    ends.append((values[0], sampler, "0.4"))
                else:
                    errors = [_error(row.measures[net]) for row in of]
                    nfe = [row.nfe for row in of]
                    axes.errorbar(nfe, values, errors, marker="o", markersize=4, capsize=3, color=colours[sampler])
                    ends.append((values[-1], sampler, colours[sampler]))
            axes.set(
                xlabel="network evaluations per image",
                ylabel=f"{distance_name(net)}, extrapolated where known",
                title=model,
                xscale="log",
            )
            name_lines(axes, ends)
    figure.savefig(path, format="png", dpi=120)


def _error(measures: Mapping[str, float | None]) -> float:
    name = "frechet" if measures.get("extrapolated") is None else "extrapolated"
    return measures.get(f"{name}_error") or 0.0


def _distance(measures: Mapping[str, float | None]) -> float:
    value = measures.get("extrapolated")
    value = measures.get("frechet") if value is None else value
    return float("nan") if value is None else value
