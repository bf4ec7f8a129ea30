"""Figures of papers, of finished runs: of UIAT (Dong et al., CVPR 2023) and its supplement, ECAS (BMVC 2023), and LDAT
(CMC 2024).

One file for each: `collect(runs, ...)` gives its data, which are JSON, and `draw(data)` makes the picture of nothing
else. What has to be measured is kept in figures.json of the run it was measured of, so that drawing again is free.
This page loads neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from robustkit.core.errors import UserError
from robustkit.core.registry import hint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from robustkit.reporting.paper.finished import FinishedRun


@attrs.frozen
class Entry:
    """A figure in a few words, which figures of which paper it repeats, and what it takes besides runs."""

    shows: str
    paper: str
    takes: tuple[str, ...] = ()


FIGURES = {
    "strength": Entry("accuracy against attack strength, easy and hard half apart", "UIAT, Figs. 1 and 4", ("images",)),
    "overfitting": Entry("learning curves on training and held-out images", "UIAT, Fig. 2"),
    "sweep": Entry("accuracy against the setting in which runs differ", "UIAT, Fig. 3 and supplement", ("setting",)),
    "difference": Entry("how two runs differ, against the test radius", "UIAT, Fig. 5", ("images", "attack")),
    "inverse": Entry("inverse perturbations and what they do to images", "UIAT, supplement", ("images",)),
    "universal": Entry("histogram of universal perturbations", "in no paper"),
    "radii": Entry("which radii ECAS adjusted, epoch by epoch", "ECAS, Fig. 2"),
    "budgets": Entry(
        "accuracy against the radius in L-inf and L2, runs together", "LDAT, Fig. 4", ("images", "attack")
    ),
    "iterations": Entry("accuracy against the attack's iterations, runs together", "LDAT, Fig. 5", ("images",)),
    "bars": Entry("natural and robust accuracy of runs as bars", "LDAT, Fig. 6"),
    "features": Entry("features of natural and attacked images, by t-SNE", "LDAT, Fig. 7", ("images",)),
    "likelihoods": Entry("histograms of the detection score, by attack", "LDAT, Fig. 8", ("images",)),
    "defence": Entry("what rejecting by that score is worth, by attack", "LDAT, Fig. 9", ("images",)),
}
"""By name, which is the name of its file here."""


def figure_named(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UserError: there is none; near misses are named.
    """
    if name not in FIGURES:
        raise UserError(f"there is no figure '{name}'", place="--figure", remedy=hint(name, FIGURES))
    return FIGURES[name]


def make(name: str, runs: Sequence[FinishedRun], **options: Any) -> tuple[dict[str, Any], Figure]:
    """The data of a figure, and its picture.

    Args:
        runs: of `robustkit.reporting.paper.finished.open_runs`.
        options: `attack` of "difference" and "budgets", `setting` of "sweep".

    Raises:
        UserError: there is no such figure, or a run lacks what it needs.
    """
    from matplotlib import rc_context

    from robustkit.reporting.figures import STYLE

    figure_named(name)
    module = importlib.import_module(f"{__name__}.{name}")
    collected = module.collect(runs, **options)
    data = {"figure": name, "checkpoint": runs[0].checkpoint, "runs": [str(run.folder) for run in runs]} | collected
    with rc_context(STYLE):
        return data, module.draw(data)
