"""What the figures share: panels side by side, radii as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustkit.core.strategy import ThreatModel
from robustkit.reporting import formats
from robustkit.reporting.figures import new_figure

COLUMNS = 4
"""Panels in a row."""
GREEN, GREY = "#009E73", "#555555"


def panels(count: int, *, width: float = 3.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """`count` panels with one y axis, in rows of `COLUMNS`."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(max(5.2, width * columns), height * rows)
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


def quarters_of(threat: ThreatModel, quarters: Iterable[int]) -> list[float]:
    """So many quarters of the threat model's radius, each; in L-infinity none beyond all of a pixel's range."""
    most = 1.0 if threat.norm == "Linf" else math.inf
    found = (quarter * threat.epsilon / 4 for quarter in quarters)
    return [radius for radius in found if abs(radius) <= most]


def radius_label(norm: str) -> str:
    """Of an axis."""
    return f"{norm} radius" + (" (1/255)" if norm == "Linf" else "")
