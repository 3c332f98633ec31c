"""Pictures that training leaves: a grid of samples and the loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

__all__ = ["loss_curve", "picture"]


def picture(images: Tensor, *, columns: int = 10) -> Image.Image:
    """Images `(count, channels, height, width)` in [-1, 1] side by side, small ones enlarged."""
    array = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    count, channels, height, width = array.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, channels, height, width), 255, dtype=np.uint8)
    canvas[:count] = array
    sheet = canvas.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    factor = max(1, 64 // height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def loss_curve(losses: Sequence[float], path: Path) -> None:
    """The loss of every step, and its running mean, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.5, label="step")
    window = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
