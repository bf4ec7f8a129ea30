"""Which radii training attacked with, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from robustkit.reporting import formats
from robustkit.reporting.report import charts, words
from robustkit.reporting.report.html import Html, folded, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun

MOST = 24
"""More different radii than these are taken together in groups."""


def section(runs: Sequence[StoredRun]) -> Html:
    parts = []
    for run in runs:
        parts.append(tag("h3", run.name) if len(runs) > 1 else None)
        parts.append(_radii(run, f" of {run.name}" if len(runs) > 1 else ""))
    return joined(parts)


def _radii(run: StoredRun, whose: str) -> Html:
    if run.recipe.attack is None:
        return tag("p", "Training did not attack.")
    reports = _alike(run.reports)
    if not reports:
        return missing("No epoch has ended yet.", words.command("resume", run.path))
    norm = run.recipe.threat.norm
    values, counts = histogram(reports)
    names = [formats.in_255ths(value) if norm == "Linf" else f"{value:.3g}" for value in values]
    if len(values) == 1:
        epochs = "epoch" if len(reports) == 1 else f"{len(reports)} epochs"
        whole = words.radius(values[0], norm)
        return tag("p", f"All images of the {epochs} were attacked within {words.NORMS[norm]} {whole}.")
    shares = [[share / max(1, sum(column)) for share in column] for column in zip(*counts, strict=True)]
    means = [report["train"].get("epsilon") for report in reports]
    heights = [_height(values, mean or 0.0) for mean in means]
    said = ["" if mean is None else f"mean {formats.in_255ths(mean)}" for mean in means]
    tips = [f"epoch {r['epoch']}: {text}" for r, text in zip(reports, said, strict=True)]
    drawn = charts.share_map(
        f"Radii of the training attack{whose}",
        [report["epoch"] for report in reports],
        names,
        list(zip(*shares, strict=True)),
        heights,
        tips,
        x="epoch",
        y=f"radius, to {reports[0]['radii']['unit']:.2g}",
    )
    rows = [
        [f"{report['epoch']}", text.removeprefix("mean "), *(formats.percent(share) for share in column)]
        for report, text, column in zip(reports, said, shares, strict=True)
    ]
    caption = f"Share of the images by radius{whose}, %"
    numbers = table(("Epoch", "mean", *names), rows, caption=caption, numbers=True)
    return joined([charts.side_by_side(drawn), folded(f"{caption}: all numbers", numbers)])


def _alike(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports that count radii the way the last one does, from one epoch to the next without a gap."""
    held = [report for report in reports if report.get("radii") and any(report["radii"]["counts"])]
    last = held[-1:]
    kept = [r for r in held if (r["radii"]["unit"], len(r["radii"]["counts"])) == _way(last[0])]
    gaps = [place for place, (one, two) in enumerate(pairwise(kept), 1) if two["epoch"] != one["epoch"] + 1]
    return kept[gaps[-1] if gaps else 0 :]


def _way(report: dict[str, Any]) -> tuple[float, int]:
    return report["radii"]["unit"], len(report["radii"]["counts"])


def histogram(reports: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[int]]]:
    """The radii that occur, ascending, in pixels of [0, 1], and for each how many images had it in each epoch."""
    unit = reports[0]["radii"]["unit"]
    table = [report["radii"]["counts"] for report in reports]
    occupied = [place for place in range(len(table[0])) if any(counts[place] for counts in table)]
    size = -(-(occupied[-1] - occupied[0] + 1) // MOST) if len(occupied) > MOST else 1
    starts = range(occupied[0], occupied[-1] + 1, size) if size > 1 else occupied
    groups = [range(start, min(start + size, len(table[0]))) for start in starts]
    values = [unit * sum(group) / len(group) for group in groups]
    return values, [[sum(counts[place] for place in group) for counts in table] for group in groups]


def _height(values: Sequence[float], mean: float) -> float:
    """How high a radius stands among rows of these values."""
    for row, (low, high) in enumerate(pairwise(values)):
        if mean <= high:
            return row + max(0.0, (mean - low) / (high - low))
    return float(len(values) - 1)
