"""Plots of a comparison of samplers: errors and distances by network evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from pushforward.data.plots import COLOURS, mark_plainly, name_lines
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
    nets = [None, *sorted({net for row in rows for net in row.measures})]
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(6.5 * len(models), 4 * len(nets)), layout="constrained")
    for net, line in zip(nets, figure.subplots(len(nets), len(models), squeeze=False), strict=True):
        for model, axes in zip(models, line, strict=True):
            ends = []
            own = [row for row in rows if row.model == model and (net is not None or row.error)]
            for sampler in dict.fromkeys(row.sampler for row in own):
                of = sorted((row for row in own if row.sampler == sampler), key=lambda row: row.nfe)
                values, errors = zip(*(_figure(row, net) for row in of), strict=True)
                colour = "0.4" if sampler == "converged" else colours[sampler]
                if sampler == "converged":
                    axes.axhline(values[0], color=colour, linestyle=":")
                else:
                    nfe, known = [row.nfe for row in of], None if net is None else errors
                    axes.errorbar(nfe, values, known, marker="o", markersize=4, capsize=3, color=colour)
                ends.append((values[-1], sampler, colour))
            apart = net is None and any((row.error or {}).get("median") for row in own)
            what = "error of an image (median)" if net is None else f"{distance_name(net)}, extrapolated where known"
            axes.set(
                xlabel="network evaluations per image",
                ylabel=what,
                title=model,
                xscale="log",
                yscale="log" if apart else "linear",
            )
            for axis in (axes.xaxis, axes.yaxis) if apart else (axes.xaxis,):
                mark_plainly(axis)
            name_lines(axes, ends)
    figure.savefig(path, format="png", dpi=120)


def _figure(row: Row, net: str | None) -> tuple[float, float]:
    """What a row shows by a feature network, a distance and its standard error, or the median of its images' errors."""
    if net is None:
        return (row.error or {}).get("median") or math.nan, 0.0
    measures = row.measures[net]
    name = "frechet" if measures.get("extrapolated") is None else "extrapolated"
    value = measures.get(name)
    return math.nan if value is None else value, measures.get(f"{name}_error") or 0.0
