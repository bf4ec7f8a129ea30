"""What universal inverse perturbations look like after training: a histogram of z.

A sign step as long as the radius drives every pixel to the edge of the box; one that was clipped comes back to 0. So z
has three levels, -eps', 0 and eps', with most of it at the outer two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from robustkit.core.errors import UserError
from robustkit.core.registry import registry
from robustkit.core.spec import walk
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import panels
from robustkit.targets.universal import Universal

BINS = 41
"""From -eps' to eps', an odd number: one is around 0."""
LEVELS = (-1, 0, 1)


def perturbations(run: FinishedRun) -> tuple[Tensor, float] | None:
    """z (K, C, H, W) and its radius, where the run's target has them, however deep they are wrapped."""
    settings = next((part for _, part in walk(run.recipe.target) if isinstance(part, Universal)), None)
    if settings is None:
        return None
    found = (
        tensor
        for name, tensor in run.tensors().items()
        if name.startswith("strategies.target.") and name.rpartition(".")[2] == "z"
    )
    return next(found).float(), settings.radius


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run: counts of z / radius in `BINS` equal bins, and the share of each level.

    Raises:
        UserError: a run's target has no universal perturbations.
    """
    return {"bins": BINS, "panels": [_panel(run) for run in runs]}


def _panel(run: FinishedRun) -> dict[str, Any]:
    found = perturbations(run)
    if found is None:
        target = run.recipe.target
        name = "none" if target is None else registry("target").name_of(type(target))
        remedy = "give a run with target=universal, or one wrapped in momentum or one-off"
        raise UserError(f"has no universal perturbations: its target is {name}", place=str(run.folder), remedy=remedy)
    z, radius = found
    scaled = (z / (radius or 1)).flatten()
    width = 2 / (BINS - 1)
    counts = torch.histc(scaled, BINS, -1 - width / 2, 1 + width / 2)
    shares = {str(level): float(((scaled - level).abs() < 1e-5).double().mean()) for level in LEVELS}
    return {"run": run.name, "radius": radius, "values": len(scaled), "counts": counts.tolist(), "levels": shares}


def draw(data: dict[str, Any]) -> Figure:
    """A bar for each bin; what lies exactly on a level is written above it."""
    figure, grid = panels(len(data["panels"]), height=3.0)
    places = torch.linspace(-1, 1, data["bins"]).tolist()
    for axes, panel in zip(grid, data["panels"], strict=True):
        heights = [100 * count / panel["values"] for count in panel["counts"]]
        axes.bar(places, heights, width=2 / (data["bins"] - 1), color=BLUE)
        for level in LEVELS:
            share = panel["levels"][str(level)]
            height = heights[round((level + 1) / 2 * (data["bins"] - 1))]
            axes.annotate(
                f"{formats.percent(share)} %", (level, height), (0, 3), textcoords="offset points", ha="center"
            )
        rest = 1 - sum(panel["levels"].values())
        axes.set(
            title=panel["run"],
            xlim=(-1.3, 1.3),
            ylim=(0, 108),
            xlabel=f"z / eps'; elsewhere: {formats.percent(max(0.0, rest))} %",
        )
        axes.set_xticks(LEVELS, ["-eps'", "0", f"eps' = {255 * panel['radius']:.3g}/255"])
    grid[0].set_ylabel("share of values (%)")
    return figure
