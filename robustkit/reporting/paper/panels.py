"""What the figures share: panels side by side, radii as people read them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustkit.reporting import formats
from robustkit.reporting.figures import _figure

COLUMNS = 4
"""Panels in a row."""
GREEN, GREY = "#009E73", "#555555"


def panels(count: int, *, width: float = 3.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """`count` panels with one y axis, in rows of `COLUMNS`."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = _figure(max(5.2, width * columns), height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def unit_of(norm: str) -> float:
    """What radii of that norm are divided by on an axis: L-infinity's are in 255ths."""
    return 1 / 255 if norm == "Linf" else 1.0


def radius_in_words(norm: str, radius: float) -> str:
    """'8/255' of L-infinity, '0.5' of others."""
    return formats.in_255ths(radius) if norm == "Linf" else f"{radius:.3g}"


def radius_label(norm: str) -> str:
    """Of an axis."""
    return f"{norm} radius" + (" (1/255)" if norm == "Linf" else "")
