"""What universal inverse perturbations look like after training: a histogram of z.

A sign step as long as the radius drives every pixel to the edge of the box; one that was clipped comes back to 0. So z
has three levels, -eps', 0 and eps', with most of it at the outer two. And whether it helps: cross-entropy with it and
without, on some test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from robustkit.core.errors import UserError
from robustkit.core.registry import registry
from robustkit.core.spec import walk
from robustkit.evaluation.evaluate import fixed_part
from robustkit.reporting import formats
from robustkit.reporting.figures import BLUE
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.reporting.paper.panels import panels
from robustkit.targets.universal import Universal

BINS = 41
"""From -eps' to eps', an odd number: one is around 0."""
LEVELS = (-1, 0, 1)
IMAGES, SLICE = 1000, 250
"""Test images at most that cross-entropies are of: a fixed random part, the same for every run."""


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
    """A panel for each run: counts of z / radius in `BINS` equal bins, the share of each level, and how it helps.

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
    helped = run.remember("universal", [IMAGES], partial(_helped, run, z))
    keys = ("images", "without", "with", "lower")
    return {
        "run": run.name,
        "radius": radius,
        "values": len(scaled),
        "counts": counts.tolist(),
        "levels": shares,
        "cross-entropy": {key: helped[key] for key in keys},
    }


def _helped(run: FinishedRun, z: Tensor) -> dict[str, Any]:
    """Mean cross-entropy of f(x) and of f(x + z_y), in nats, and the share of images on which the latter is lower."""
    values: dict[str, list[Tensor]] = {"without": [], "with": []}
    with run.opened(run.recipe.threat) as (subject, source, world), torch.no_grad():
        chosen = fixed_part(len(source), IMAGES)
        for rows in torch.split(chosen, SLICE):
            x, y = (part.to(world.device) for part in source.rows(rows))
            for name, images in (("without", x), ("with", (x + z.to(x.device)[y]).clamp(0, 1))):
                values[name].append(F.cross_entropy(subject.logits(images).float(), y, reduction="none").cpu())
    before, after = (torch.cat(found).double() for found in values.values())
    return {
        "images": len(chosen),
        "without": float(before.mean()),
        "with": float(after.mean()),
        "lower": float((after < before).double().mean()),
    }


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
            xlabel=f"z / eps'; elsewhere: {formats.percent(max(0.0, rest))} %\n{_in_words(panel['cross-entropy'])}",
        )
        axes.set_xticks(LEVELS, ["-eps'", "0", f"eps' = {255 * panel['radius']:.3g}/255"])
    grid[0].set_ylabel("share of values (%)")
    return figure


def _in_words(found: dict[str, Any]) -> str:
    share = f"{formats.percent(found['lower'])} % of {found['images']:,} images"
    return f"cross-entropy {found['without']:.2f}, with z {found['with']:.2f}; lower on {share}"
