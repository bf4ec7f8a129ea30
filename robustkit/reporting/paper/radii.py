"""Which images were given radii of their own, epoch by epoch (ECAS, Fig. 2).

As the runs logged it; nothing is measured. An image that the model was certain of (entropy below `h_low`) was given one
of the large radii, one that it was uncertain of (above `h_high`) the smallest. All others keep the radius of the cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from robustkit.core.batch import Progress
from robustkit.core.errors import UserError
from robustkit.core.registry import registry
from robustkit.reporting import formats
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import panels, radius_label, unit_of

ADJUSTED = {"raised": ("#7B2D8B", "adjusted up"), "lowered": ("#CFA9D9", "adjusted down")}
"""Which way: its purple, and the words for it."""
CYCLE = ListedColormap(colormaps["YlGn"](np.linspace(0.25, 1, 256)))
"""Colours of the cycle's radii, none of them nearly white."""


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run, and in it for each epoch the radius of the cycle, the shares "raised" and "lowered" of
    all images, and the histogram of the radii that they had in the end, [[radius, share], ...].

    An image counts by its entropy: one that was given a radius that happens to be the cycle's was adjusted, too.

    Raises:
        UserError: a run did not adjust radii, or did not count how many.
    """
    return {"panels": [_panel(run) for run in runs]}


def _panel(run: FinishedRun) -> dict[str, Any]:
    schedule, reports = run.recipe.epsilon, run.metrics()
    cycle = getattr(schedule, "value", None)
    counted = all(f"radius {way}" in report["train"] for report in reports for way in ADJUSTED)
    if not (reports and counted and callable(cycle)):
        name = registry("epsilon").name_of(type(schedule))
        fault = f"has no counts of adjusted radii: its epsilon schedule is {name}"
        remedy = "give a run with epsilon=ecas (runs of older versions did not count)"
        raise UserError(fault, place=str(run.folder), remedy=remedy)
    epochs = [
        {"epoch": report["epoch"], "cycle": cycle(Progress.at(report["epoch"] - 1, run.recipe.epochs, 1))}
        | {way: report["train"][f"radius {way}"] for way in ADJUSTED}
        | {"radii": _histogram(**report["radii"])}
        for report in reports
    ]
    return {"run": run.name, "norm": run.recipe.threat.norm, "epochs": epochs}


def _histogram(unit: float, counts: Sequence[int]) -> list[list[float]]:
    return [[number * unit, count / sum(counts)] for number, count in enumerate(counts) if count]


def draw(data: dict[str, Any]) -> Figure:
    """A bar for each epoch: below what kept the radius of the cycle, in its colour, above what was adjusted."""
    figure, grid = panels(len(data["panels"]), width=4.8, height=3.4)
    norm = data["panels"][0]["norm"]
    cycles = [epoch["cycle"] / unit_of(norm) for panel in data["panels"] for epoch in panel["epochs"]]
    colours = ScalarMappable(Normalize(min(cycles), max(cycles)), CYCLE)
    for axes, panel in zip(grid, data["panels"], strict=True):
        epochs = panel["epochs"]
        at = [epoch["epoch"] for epoch in epochs]
        tops = [100 * (1 - epoch["raised"] - epoch["lowered"]) for epoch in epochs]
        axes.bar(at, tops, width=1.0, color=[colours.to_rgba(epoch["cycle"] / unit_of(norm)) for epoch in epochs])
        for way, (colour, _) in ADJUSTED.items():
            shares = [100 * epoch[way] for epoch in epochs]
            axes.bar(at, shares, width=1.0, bottom=tops, color=colour)
            tops = [top + share for top, share in zip(tops, shares, strict=True)]
        means = {label: sum(epoch[way] for epoch in epochs) / len(epochs) for way, (_, label) in ADJUSTED.items()}
        words = ", ".join(f"{label} {formats.percent(mean)} %" for label, mean in means.items())
        axes.set(title=panel["run"], ylim=(0, 100), xlim=(0.5, len(epochs) + 0.5), xlabel=f"epoch\non average {words}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.grid(False)
    grid[0].set_ylabel("share of images (%)")
    figure.colorbar(colours, ax=grid, label=f"cycle's {radius_label(norm)}")
    patches = [Patch(color=colour, label=label) for colour, label in ADJUSTED.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure
