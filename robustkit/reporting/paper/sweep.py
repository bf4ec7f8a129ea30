"""Natural and robust accuracy against one setting (UIAT, Fig. 3: lambda; supplement, Fig. 2: beta, gamma, T and T').

From results.json alone. The setting is the one in which the recipes differ, seeds aside; runs that share its value
(other seeds) stand above one another, and the line goes through their mean.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from robustkit.core.errors import UserError
from robustkit.core.registry import hint
from robustkit.core.spec import canonical, flatten
from robustkit.reporting import formats
from robustkit.reporting.comparison import ABSENT
from robustkit.reporting.figures import BLUE, VERMILLION, new_figure
from robustkit.reporting.paper.finished import FinishedRun, on_the_same_data
from robustkit.reporting.paper.reported import common_attacks, entry_of, hardest

KINDS = ("natural", "robust")
ASIDE = ("seed", "control", "evaluation", "precision", "validation")
"""Settings that a sweep may differ in besides: they say how a run is judged and computed, not what is trained."""


def collect(runs: Sequence[FinishedRun], setting: str | None = None) -> dict[str, Any]:
    """A point for each run, ascending in `setting` (None: the only one that differs).

    `measure` is AutoAttack where all runs have it, else the measure that leaves the least; `also` lists what else
    differs.

    Raises:
        UserError: there are fewer than two runs, no such setting or several, or a run was not judged.
    """
    if len(runs) < 2:
        raise UserError("a sweep needs several runs", place="sweep", remedy="give at least two that differ")
    on_the_same_data(runs)
    leaves = [flatten(json.loads(canonical(run.recipe))) for run in runs]
    differing = _differing(leaves)
    path = _only(differing) if setting is None else setting
    values = [_number(run, found, path) for run, found in zip(runs, leaves, strict=True)]
    measure = _robust_measure(runs)
    points = [
        {"run": run.name, "value": value, "seed": run.recipe.seed}
        | {kind: entry_of(run, key) for kind, key in zip(KINDS, ("clean", measure), strict=True)}
        for run, value in zip(runs, values, strict=True)
    ]
    points.sort(key=lambda point: (point["value"], point["seed"]))
    also = sorted(set(differing) - {path})
    return {"setting": path, "measure": measure, "points": points, "also": also}


def _differing(leaves: Sequence[dict[str, Any]]) -> list[str]:
    """Settings that are not the same in all recipes, but for those put `ASIDE`."""
    paths = dict.fromkeys(path for found in leaves for path in found if path.split(".")[0] not in ASIDE)
    return [path for path in paths if any(found.get(path, ABSENT) != leaves[0].get(path, ABSENT) for found in leaves)]


def _only(differing: Sequence[str]) -> str:
    if len(differing) == 1:
        return differing[0]
    if not differing:
        raise UserError("the runs differ in no setting", place="sweep", remedy="give runs of different recipes")
    raise UserError(
        "the runs differ in several settings", place="--setting", remedy=f"name one: {', '.join(differing)}"
    )


def _number(run: FinishedRun, leaves: dict[str, Any], path: str) -> float:
    if path not in leaves:
        raise UserError(f"has no setting '{path}'", place=str(run.folder), remedy=hint(path, leaves))
    value = leaves[path]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fault = f"{path} is {formats.setting(path, value)}, no number"
        raise UserError(fault, place=str(run.folder), remedy="give runs that differ in a number")
    return float(value)


def _robust_measure(runs: Sequence[FinishedRun]) -> str:
    """AutoAttack, else the hardest of what all runs have."""
    attacks = common_attacks(runs)
    return "autoattack" if "autoattack" in attacks else hardest(runs, attacks)


def draw(data: dict[str, Any]) -> Figure:
    """A panel each for natural and robust accuracy, with 95 % intervals."""
    figure = new_figure(8.0, 3.2)
    grid = figure.subplots(1, 2)
    values = [point["value"] for point in data["points"]]
    ticks = sorted(set(values))
    robust = data["measure"] if data["measure"] == "autoattack" else f"{data['measure']}, the hardest that all have"
    for axes, kind, words, colour in zip(grid, KINDS, ("clean", robust), (BLUE, VERMILLION), strict=True):
        entries = [point[kind] for point in data["points"]]
        shares = [100 * entry["accuracy"] for entry in entries]
        low, high = ([100 * entry["ci95"][end] for entry in entries] for end in (0, 1))
        axes.vlines(values, low, high, color=colour, linewidth=1.2, label="95 % interval")
        axes.plot(values, shares, "o", color=colour, markersize=4)
        means = [statistics.fmean(s for s, v in zip(shares, values, strict=True) if v == tick) for tick in ticks]
        axes.plot(ticks, means, color=colour, linewidth=1.2)
        axes.set_xticks(ticks, [_tick(data["setting"], tick) for tick in ticks])
        counts = " or ".join(f"{n:,}" for n in sorted({entry["n"] for entry in entries}))
        axes.set(title=f"{kind.capitalize()} accuracy", xlabel=data["setting"], ylabel=f"{words}\n{counts} images (%)")
    grid[0].legend(loc="best")
    if data["also"]:
        figure.supxlabel(f"also different: {', '.join(data['also'])}", fontsize=8)
    return figure


def _tick(path: str, value: float) -> str:
    """'3.5'; of a radius, '8/255'."""
    return formats.setting(path.rpartition(".")[2], value).rpartition("= ")[2]
