"""What the figures share: panels side by side, colours of runs, radii as people read them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustkit.core.strategy import ThreatModel
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE, VERMILLION, new_figure

COLUMNS = 4
"""Panels in a row."""
GREEN, GREY = "#009E73", "#555555"
COLOURS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of runs in one panel."""


def panels(count: int, *, width: float = 3.6, height: float = 3.2, one_axis: bool = True) -> tuple[Figure, list[Axes]]:
    """`count` panels, with one y axis unless told otherwise, in rows of `COLUMNS`."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = new_figure(max(5.2, width * columns), height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=one_axis).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def remarks(figure: Figure, lines: Sequence[str]) -> dict[str, Any]:
    """A legend's title that says what the figure does without, and why."""
    wrapped = [row for line in lines for row in textwrap.wrap(line, int(15 * figure.get_figwidth()))]
    return {"title": "\n".join(wrapped), "title_fontsize": 8} if wrapped else {}


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
