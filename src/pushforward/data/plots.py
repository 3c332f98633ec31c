"""What all plots share: colours that colour-blind readers tell apart, and names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "name_lines"]

# Of Okabe and Ito, https://jfly.uni-koeln.de/color, without yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_APART = 0.05  # distance of names at least, in heights of the axes


def name_lines(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name at its end, right of the axes, moved apart where names would touch.

    Args:
        axes: whose limits and scales are set.
        ends: last value, name and colour of each line; what is not finite names nothing.
    """
    low, high = axes.get_ylim()

    def height(value: float) -> float:
        pixel = axes.transData.transform((axes.get_xlim()[1], min(max(value, low), high)))
        return float(axes.transAxes.inverted().transform(pixel)[1])

    places = sorted((height(value), name, colour) for value, name, colour in ends if abs(value) < float("inf"))
    heights: list[float] = []
    for place, _, _ in places:
        heights.append(max(place, heights[-1] + _APART) if heights else place)
    over = max(0.0, heights[-1] - 1) if heights else 0.0
    for y, (_, name, colour) in zip(heights, places, strict=True):
        axes.text(1.02, y - over, name, color=colour, transform=axes.transAxes, va="center", clip_on=False)
