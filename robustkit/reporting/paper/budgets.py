"""Accuracy against the radius, several runs in one panel, in L-infinity and in L2 (LDAT, Fig. 4).

Radii are shares of the one that the first run reports in that norm: of 8/255 and of 0.5, those of our choice for the
paper, whose text does not name its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustkit.core.errors import UserError
from robustkit.core.spec import evolve
from robustkit.core.strategy import ThreatModel
from robustkit.evaluation import PGD_40, AutoAttack, Clean
from robustkit.reporting.paper.finished import FinishedRun, Judged, on_the_same_data
from robustkit.reporting.paper.lines import draw_lines, lines_of
from robustkit.reporting.paper.panels import GREY, panels, radius_in_words, radius_label, unit_of
from robustkit.threats.l2 import L2
from robustkit.threats.linf import Linf

USUAL: tuple[ThreatModel, ...] = (Linf(epsilon=8 / 255), L2(epsilon=0.5))
"""A panel each; their radii where the first run reports nothing in that norm."""
SHARES = {
    "Linf": (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0),
    "L2": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
}
"""Of 8/255: 0, 1, 2, 4, 6, 8, 10, 12, 16, 24 and 32/255; of 0.5: 0 to 1 in quarters, 1.5, 2 and 3."""
FINEST = 0.125
"""Steps are a quarter of the radius; in L-infinity no shorter than this share of the reported one, 1/255 of 8/255."""
AUTOATTACK = (0.5, 1.0, 1.5, 2.0)
"""Shares at which AutoAttack is added, where it is wanted."""


def collect(runs: Sequence[FinishedRun], attack: str | None = None) -> dict[str, Any]:
    """A panel for each norm, and in it a line for each run: PGD-40 from radius 0, the images as they are, onwards.

    `attack` "autoattack" adds AutoAttack at four of the radii.

    Raises:
        UserError: the runs are not on the same data, or there is nothing to add by that name.
    """
    if attack not in (None, "autoattack"):
        fault = f"'{attack}' cannot be added: lines are PGD-40's"
        raise UserError(fault, place="--attack", remedy="leave it out, or give autoattack for four points of it")
    on_the_same_data(runs)
    return {"panels": [_panel(runs, runs[0].ball(usual), attack is not None) for usual in USUAL]}


def _panel(runs: Sequence[FinishedRun], reported: ThreatModel, autoattack: bool) -> dict[str, Any]:
    def by_pgd(run: FinishedRun, radius: float) -> Judged:
        if radius == 0:
            return run.judged(Clean(), run.recipe.threat)
        shortest = FINEST * reported.epsilon if reported.norm == "Linf" else 0.0
        measure = PGD_40 if radius / 4 >= shortest else evolve(PGD_40, step_size=shortest)
        return run.judged(measure, evolve(reported, epsilon=radius))

    def by_autoattack(run: FinishedRun, radius: float) -> Judged:
        return run.judged(AutoAttack(), evolve(reported, epsilon=radius))

    panel: dict[str, Any] = {"norm": reported.norm, "epsilon": reported.epsilon, "attack": PGD_40.key}
    panel["lines"] = lines_of(runs, _radii(reported, SHARES[reported.norm]), by_pgd)
    if autoattack:
        panel["autoattack"] = lines_of(runs, _radii(reported, AUTOATTACK), by_autoattack)
    return panel


def _radii(reported: ThreatModel, shares: Sequence[float]) -> list[float]:
    """In L-infinity none beyond all of a pixel's range."""
    most = 1.0 if reported.norm == "Linf" else math.inf
    return [share * reported.epsilon for share in shares if share * reported.epsilon <= most]


def draw(data: dict[str, Any]) -> Figure:
    """A line for each run; AutoAttack's are the hollow points below it."""
    figure, grid = panels(len(data["panels"]), width=4.2)
    for axes, panel in zip(grid, data["panels"], strict=True):
        norm, unit = panel["norm"], unit_of(panel["norm"])
        mark = panel["epsilon"] / unit
        axes.axvline(mark, color=GREY, linewidth=1.2, linestyle=":", zorder=0)
        words = radius_in_words(norm, panel["epsilon"])
        axes.annotate(words, (mark, 101.5), (3, -2), textcoords="offset points", va="top", fontsize=8, color=GREY)
        axes.set(title=f"{panel['attack'].upper()}, {norm}", ylim=(0, 101.5), xlabel=radius_label(norm))
        draw_lines(axes, panel["lines"], unit=unit)
        draw_lines(axes, panel.get("autoattack", ()), unit=unit, points=True)
        axes.set_xlim(left=0)
    first = data["panels"][0]
    grid[0].set_ylabel(f"accuracy of {first['lines'][0]['n']:,} images (%)")
    handles, labels = grid[0].get_legend_handles_labels()
    if "autoattack" in first:
        handles.append(Line2D([], [], color=GREY, marker="D", markerfacecolor="white", linestyle="none", markersize=4))
        labels.append("AutoAttack")
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
