"""What rejecting unlikely images is worth as a defence, against each attack and one that knows of it (LDAT, Fig. 9).

An image is defended if it is classified right and accepted, or classified wrong and rejected; without a threshold that
is accuracy. Attacks that stop at the decision boundary make images that any threshold rejects, so that the adaptive
attack stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from robustkit.evaluation import wilson
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import GREEN, panels, radius_in_words, remarks
from robustkit.reporting.paper.scores import SETS, THRESHOLD, scored

WITHOUT, REJECTED = "#9BC8E3", "#D9D9D9"
WIDTH = 0.38


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run, and in it for each set its `accuracy` without threshold and its `defence success` with it,
    each with a 95 % interval, and the shares of images that became what.

    `false rejections` is the share of natural images that are classified right and rejected; `missing` says which sets
    cannot be had, and why.
    """
    made, missing = [], []
    for run in runs:
        sets, lacking = scored(run)
        shown = [_set(found) for found in sets]
        made.append({"run": run.name, "sets": shown, "false rejections": shown[0]["shares"]["falsely rejected"]})
        missing += lacking
    return {"threshold": THRESHOLD, "panels": made, "missing": list(dict.fromkeys(missing))}


def _set(found: dict[str, Any]) -> dict[str, Any]:
    fates, n = found["fates"], found["n"]
    numbers = {
        "accuracy": fates["classified"] + fates["falsely rejected"],
        "defence success": fates["classified"] + fates["detected"],
    }
    entries = {name: {"share": count / n, "ci95": list(wilson(count, n))} for name, count in numbers.items()}
    told = {name: found[name] for name in ("set", "norm", "epsilon", "n")}
    return told | entries | {"shares": {name: count / n for name, count in fates.items()}}


def draw(data: dict[str, Any]) -> Figure:
    """Two bars a set: without threshold, and with it. What lies above the second one is wrong and accepted."""
    figure, grid = panels(len(data["panels"]), width=5.2, height=3.8)
    for axes, panel in zip(grid, data["panels"], strict=True):
        for place, found in enumerate(panel["sets"]):
            shares = {name: 100 * share for name, share in found["shares"].items()}
            left, right = place - WIDTH / 2, place + WIDTH / 2
            axes.bar(left, 100 * found["accuracy"]["share"], width=0.95 * WIDTH, color=WITHOUT)
            bottom = 0.0
            for name, colour in (("classified", BLUE), ("detected", GREEN), ("falsely rejected", REJECTED)):
                axes.bar(right, shares[name], width=0.95 * WIDTH, bottom=bottom, color=colour)
                bottom += shares[name]
            for at, name in ((left, "accuracy"), (right, "defence success")):
                share, (low, high) = found[name]["share"], found[name]["ci95"]
                axes.vlines(at, 100 * low, 100 * high, color="black", linewidth=0.9)
                axes.annotate(
                    formats.percent(share),
                    (at, 100 * high),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
        axes.set_xticks(range(len(panel["sets"])), [_tick(found) for found in panel["sets"]], fontsize=8)
        rejections = formats.percent(panel["false rejections"])
        axes.set(title=panel["run"], ylim=(0, 108), xlabel=f"natural images falsely rejected: {rejections} %")
        axes.grid(False, axis="x")
    grid[0].set_ylabel("share of images (%)")
    told = f"threshold {data['threshold']:g}"
    patches = [
        Patch(color=WITHOUT, label="no threshold: right"),
        Patch(color=BLUE, label=f"{told}: right, accepted"),
        Patch(color=GREEN, label=f"{told}: wrong, rejected"),
        Patch(color=REJECTED, label=f"{told}: right, rejected"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, **remarks(figure, data["missing"]))
    return figure


def _tick(found: dict[str, Any]) -> str:
    name = SETS[found["set"]].replace(" ", "\n")
    return (
        name
        if found["set"] == "natural"
        else f"{name}\n{found['norm']} {radius_in_words(found['norm'], found['epsilon'])}"
    )
