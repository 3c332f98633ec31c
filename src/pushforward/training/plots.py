"""Plots of a training: the loss by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pushforward.data.plots import mark_plainly

__all__ = ["loss_curve"]


def loss_curve(losses: Sequence[float], path: Path) -> None:
    """The loss of every step, and its running mean, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.5, label="step")
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    mark_plainly(axes.yaxis)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
