"""Inverse perturbations and the images they help (UIAT, supplement, Fig. 1).

For a few test images: the image; its own inverse perturbation (5 steps down the cross-entropy) and the example it
gives; the universal one of its class, where the run's target has learnt some, and that example. Images and examples
carry the probability of the true class; perturbations are shown as 0.5 + z / (2 eps').
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget
from robustkit.core.rng import whole
from robustkit.objectives.inverse import InverseObjective
from robustkit.reporting.figures import BLUE, EXAMPLES, VERMILLION, draw_picture, new_figure, varied
from robustkit.reporting.paper.finished import SEED, FinishedRun
from robustkit.reporting.paper.panels import radius_in_words
from robustkit.reporting.paper.universal import perturbations

STEPS = 5
"""Of the instance-wise descent, each half a radius long: 2/255 of 4/255."""


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A block of rows for each run; pictures are 8-bit pixels (C, H, W) in hexadecimal.

    The radius eps' is that of the run's universal target, else half the threat model's.
    """
    return {"blocks": [{"run": run.name} | run.remember("inverse", STEPS, partial(_block, run)) for run in runs]}


def _block(run: FinishedRun) -> dict[str, Any]:
    threat, learnt = run.recipe.threat, perturbations(run)
    radius = learnt[1] if learnt is not None and learnt[1] else threat.epsilon / 2
    chosen = varied(run.data.test.labels, run.images or EXAMPLES)
    with run.opened(threat) as (subject, source, world):
        x, y = (part.to(world.device) for part in source.rows(chosen))

        def probabilities(images: Tensor) -> list[float]:
            return [float(p) for p in subject.logits(images).softmax(dim=1).gather(1, y[:, None]).squeeze(1)]

        descent = PGD(steps=STEPS, step_size=radius / 2, objective=InverseObjective(beta=0), start="gaussian")
        budget = Budget(x.new_full((len(y),), radius))
        example = descent(subject.predict, x, y, budget, threat, whole(x, SEED, "inverse"))
        rows = [
            _row("natural", x, probabilities(x)),
            _row("instance-wise", 0.5 + (example - x) / (2 * radius)),
            _row("example", example, probabilities(example)),
        ]
        if learnt is not None:
            z = learnt[0].to(world.device)[y]
            example = (x + z).clamp(0, 1)
            rows += [
                _row("universal", 0.5 + z / (2 * radius)),
                _row("example", example, probabilities(example)),
            ]
    return {
        "norm": threat.norm,
        "radius": radius,
        "shape": list(x.shape[1:]),
        "classes": [run.data.classes[label] for label in y.tolist()],
        "rows": rows,
    }


def _row(label: str, images: Tensor, probabilities: list[float] | None = None) -> dict[str, Any]:
    pixels = (255 * images.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
    return {"label": label, "pictures": [image.tobytes().hex() for image in pixels], "probabilities": probabilities}


def draw(data: dict[str, Any]) -> Figure:
    """Images side by side, what was done to them below."""
    blocks = data["blocks"]
    heights = [0.5 + 1.25 * len(block["rows"]) for block in blocks]
    figure = new_figure(1.2 + 1.1 * max(len(block["classes"]) for block in blocks), sum(heights))
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights).flatten()
    for part, block in zip(parts, blocks, strict=True):
        radius = radius_in_words(block["norm"], block["radius"])
        title = f"{block['run']}: inverse perturbations within {block['norm']} {radius}, probability of the true class"
        part.suptitle(title, fontsize=9, fontweight="bold")
        grid = part.subplots(len(block["rows"]), len(block["classes"]), squeeze=False)
        for row, line in zip(block["rows"], grid, strict=True):
            for column, (axes, picture) in enumerate(zip(line, row["pictures"], strict=True)):
                pixels = np.frombuffer(bytes.fromhex(picture), np.uint8).reshape(block["shape"])
                draw_picture(axes, torch.from_numpy(pixels.astype(np.float32) / 255))
                if row["probabilities"] is not None:
                    share = row["probabilities"][column]
                    axes.set_title(f"{100 * share:.1f} %", fontsize=8, color=BLUE if share > 0.5 else VERMILLION)
            line[0].set_ylabel(row["label"], fontsize=8)
        for axes, name in zip(grid[-1], block["classes"], strict=True):
            axes.set_xlabel(name[:12], fontsize=8)
    return figure
