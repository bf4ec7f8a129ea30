"""Learning curves, natural and attacked, on training and held-out images (UIAT, Fig. 2): is there robust overfitting?

As the runs logged them; nothing is measured. Training images are a fixed few, without augmentation; held-out ones are
those of the recipe's `validation`, where the paper has the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robustkit.core.errors import UserError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE, VERMILLION, draw_line
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import panels

PARTS = (("training", "training", "--"), ("held_out", "held out", "-"))
KINDS = (("natural", BLUE), ("robust", VERMILLION))


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run: {"training" | "held_out": {"natural" | "robust": [[epoch, accuracy], ...]}}."""
    return {"panels": [_panel(run) for run in runs]}


def _panel(run: FinishedRun) -> dict[str, Any]:
    reports = run.metrics()
    if not any("validation" in report for report in reports):
        fault = "has no learning curves: no images were held out"
        raise UserError(fault, place=str(run.folder), remedy="train with validation.images=1024")
    curves = {
        part: {kind: [[r["epoch"], r[logged][kind]] for r in reports if kind in r.get(logged, {})] for kind, _ in KINDS}
        for part, logged in (("training", "training"), ("held_out", "validation"))
    }
    return {"run": run.name, "attack": _attack(run.recipe), **curves}


def _attack(recipe: Recipe) -> str:
    """'pgd-10'; "" where nothing was attacked."""
    attack = recipe.validation.attack
    if attack is None:
        return ""
    name = registry("attack").name_of(type(attack)) or type(attack).__name__
    return f"{name}-{attack.steps}" if hasattr(attack, "steps") else name


def draw(data: dict[str, Any]) -> Figure:
    """Below each panel, how far held-out robust accuracy fell from its best epoch to the last one."""
    figure, grid = panels(len(data["panels"]))
    for axes, panel in zip(grid, data["panels"], strict=True):
        for part, words, style in PARTS:
            for kind, colour in KINDS:
                points = [(epoch, 100 * share) for epoch, share in panel[part][kind]]
                label = f"{'natural' if kind == 'natural' else panel['attack']}, {words}"
                draw_line(axes, points, label, color=colour, linestyle=style)
        axes.set(title=panel["run"], ylim=(0, 101.5), xlabel=f"epoch{_fall(panel['held_out']['robust'])}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.legend(loc="best")
    grid[0].set_ylabel("accuracy (%)")
    return figure


def _fall(robust: Sequence[Sequence[float]]) -> str:
    if not robust:
        return ""
    epoch, best = max(robust, key=lambda point: point[1])
    return f"\nheld-out robust: {formats.percent(best)} % (epoch {epoch}) to {formats.percent(robust[-1][1])} %"
