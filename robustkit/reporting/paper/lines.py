"""Accuracy of several runs against one thing that an attack is given: a line for each, in one panel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from robustkit.evaluation import wilson
from robustkit.reporting.paper.finished import FinishedRun, Judged, on_the_same_images
from robustkit.reporting.paper.panels import COLOURS


def lines_of(
    runs: Sequence[FinishedRun], values: Sequence[float], judge: Callable[[FinishedRun, float], Judged]
) -> list[dict[str, Any]]:
    """For each run its accuracies at `values` with 95 % intervals; `judge` says what a run gets right at a value.

    Raises:
        UserError: the runs are not judged on the same test images.
    """
    lines: list[dict[str, Any]] = []
    first: Judged | None = None
    for run in runs:
        found = [judge(run, value) for value in values]
        first = first or found[0]
        on_the_same_images(runs[0], first, run, found[0])
        n, right = len(first.right), [judged.right.count("1") for judged in found]
        shares = {"accuracies": [count / n for count in right], "ci95": [list(wilson(count, n)) for count in right]}
        lines.append({"run": run.name, "n": n, "values": list(values), **shares})
    return lines


def draw_lines(axes: Axes, lines: Sequence[dict[str, Any]], *, unit: float = 1.0, points: bool = False) -> None:
    """Each in a colour of its own, with its intervals as a band, or as bars of hollow `points`; values in `unit`."""
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        at = [value / unit for value in line["values"]]
        shares = [100 * accuracy for accuracy in line["accuracies"]]
        low, high = ([100 * interval[end] for interval in line["ci95"]] for end in (0, 1))
        if points:
            axes.vlines(at, low, high, color=colour, linewidth=1)
            axes.plot(at, shares, "D", color=colour, markerfacecolor="white", markersize=4)
        else:
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(at, shares, color=colour, marker="o", markersize=3, label=line["run"])
