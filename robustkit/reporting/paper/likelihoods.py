"""Histograms of the detection score, of natural images and of attacked ones (LDAT, Fig. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE, VERMILLION, new_figure
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import GREY, radius_in_words, remarks
from robustkit.reporting.paper.scores import BINS, SETS, THRESHOLD, scored

SIDES = {"right": (BLUE, "classified right"), "wrong": (VERMILLION, "classified wrong")}


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A row for each run, and in it its sets: for each of `bins` bins from 1 / K to 1 how many images are in it.

    `missing` says which sets cannot be had, and why.
    """
    rows, missing = [], []
    for run in runs:
        sets, lacking = scored(run)
        rows.append({"run": run.name, "classes": len(run.facts["classes"]), "sets": sets})
        missing += lacking
    return {"bins": BINS, "threshold": THRESHOLD, "rows": rows, "missing": list(dict.fromkeys(missing))}


def draw(data: dict[str, Any]) -> Figure:
    """Densities: the area of both colours together is 1. What is rejected lies to the left of the line."""
    rows = data["rows"]
    columns = max(len(row["sets"]) for row in rows)
    figure = new_figure(2.3 * columns, 0.8 + 2.1 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        edges = np.linspace(1 / row["classes"], 1, data["bins"] + 1)
        width = edges[1] - edges[0]
        for axes, found in zip(line, row["sets"], strict=True):
            bottom = np.zeros(data["bins"])
            for side, (colour, _) in SIDES.items():
                heights = np.array(found[side]) / found["n"] / width
                axes.bar(edges[:-1], heights, width=width, bottom=bottom, align="edge", color=colour)
                bottom += heights
            axes.set_ylim(0, 1.05 * bottom.max())
            axes.axvline(data["threshold"], color=GREY, linewidth=1.2, linestyle=":")
            rejected = found["fates"]["detected"] + found["fates"]["falsely rejected"]
            words = f"score; below {data['threshold']:g}: {formats.percent(rejected / found['n'])} %"
            axes.set(title=_title(found), xlim=(edges[0], 1), xlabel=words)
        line[0].set_ylabel(f"{row['run']}\ndensity of {row['sets'][0]['n']:,} images")
    patches = [Patch(color=colour, label=label) for colour, label in SIDES.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, **remarks(figure, data["missing"]))
    return figure


def _title(found: dict[str, Any]) -> str:
    name = SETS[found["set"]]
    return (
        name
        if found["set"] == "natural"
        else f"{name}\n{found['norm']} {radius_in_words(found['norm'], found['epsilon'])}"
    )
