"""What all plots share: colours that colour-blind readers tell apart, plain numbers, and names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["COLOURS", "mark_plainly", "name_lines"]

# Of Okabe and Ito, https://jfly.uni-koeln.de/color, without yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_APART = 0.05  # distance of names at least, in heights of the axes
_MANY = 1000  # a logarithmic axis whose ends are as far apart has room for a mark in each decade


def mark_plainly(axis: Axis) -> None:
    """Mark a logarithmic axis, whose limits are set, by plain numbers: at 1, 2 and 5 of each decade, or at 1 of many.

    Where there are fewer than two such numbers, marks stand evenly.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _MANY * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


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
