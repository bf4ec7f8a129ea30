"""Natural and robust accuracy of several runs as bars (LDAT, Fig. 6: other attacks in place of its own in training).

From results.json alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from robustkit.evaluation import PGD_40
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE, VERMILLION, new_figure
from robustkit.reporting.paper.finished import FinishedRun, on_the_same_data
from robustkit.reporting.paper.reported import common_attacks, entry_of, hardest

SHADES = (BLUE, VERMILLION, "#E69F00")
"""Of clean accuracy, our attack and AutoAttack."""
THICK = 0.26
"""Of a bar; a run has room of 1."""


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """For each run its entries: clean, PGD-40 (the hardest that all have, where not all have it), and AutoAttack where
    all have it.

    Raises:
        UserError: the runs are not on the same data, or have nothing in common.
    """
    on_the_same_data(runs)
    attacks = common_attacks(runs)
    own = [key for key in attacks if key != "autoattack"]
    measures = ["clean", *([PGD_40.key] if PGD_40.key in own else [hardest(runs, own)] if own else [])]
    if "autoattack" in attacks:
        measures.append("autoattack")
    shown = [{"run": run.name, "results": {key: entry_of(run, key) for key in measures}} for run in runs]
    return {"measures": measures, "bars": shown}


def draw(data: dict[str, Any]) -> Figure:
    """A group of bars for each run, the first one on top; lines are 95 % intervals."""
    shown, measures = data["bars"], data["measures"]
    figure = new_figure(6.4, 1.2 + 0.28 * len(measures) * len(shown))
    axes = figure.subplots()
    for number, (key, colour) in enumerate(zip(measures, SHADES, strict=False)):
        places = [place + (number - (len(measures) - 1) / 2) * THICK for place in range(len(shown))]
        entries = [bar["results"][key] for bar in shown]
        counts = " or ".join(f"{n:,}" for n in sorted({entry["n"] for entry in entries}))
        widths = [100 * entry["accuracy"] for entry in entries]
        axes.barh(places, widths, height=0.9 * THICK, color=colour, label=f"{key}, {counts} images")
        low, high = ([100 * entry["ci95"][end] for entry in entries] for end in (0, 1))
        axes.hlines(places, low, high, color="black", linewidth=0.9)
        for place, entry, end in zip(places, entries, high, strict=True):
            axes.annotate(
                formats.percent(entry["accuracy"]),
                (end, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(range(len(shown)), [bar["run"] for bar in shown])
    axes.set(xlim=(0, 108), ylim=(len(shown) - 0.5, -0.5), xlabel="accuracy (%)")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=len(measures))
    return figure
