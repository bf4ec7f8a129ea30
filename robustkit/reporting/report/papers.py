"""Published numbers beside the measured ones, for each table of a paper with a row that is certainly the recipe's."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit import published as tables
from robustkit.core.errors import UserError
from robustkit.published import PublishedTable
from robustkit.reporting import formats, published
from robustkit.reporting.comparison import but_for_seed
from robustkit.reporting.published import Beside
from robustkit.reporting.report import words
from robustkit.reporting.report.html import Html, folded, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun


def section(runs: Sequence[StoredRun]) -> Html:
    parts: list[Html] = []
    for run in runs:
        found = _found(runs, run)
        parts += [_beside(run, one, paper) for one, paper in found]
        if not found and run.results:
            text = f"No published number is certainly one of {run.name}'s recipe. A row can be named:"
            command = words.command("compare", run.path, "--paper", "TABLE", "--row", "METHOD")
            parts.append(tag("p", text, " ", tag("code", command), class_="missing"))
        elif not run.results:
            parts.append(missing(f"{run.name} has no results to compare.", words.command("eval", run.path)))
    return joined(parts)


def _found(runs: Sequence[StoredRun], run: StoredRun) -> list[tuple[Beside, PublishedTable]]:
    """Each table that has a row for the run's recipe, and a measure in common with it."""
    found = []
    alike = [other.item for other in runs if but_for_seed(other.recipe) == but_for_seed(run.recipe)]
    seeds = [item for item in alike if item is not run.item and item.results]
    for name in tables.tables() if run.results else ():
        paper = tables.load(name)
        try:
            one, *_ = published.beside([run.item, *seeds], paper)
        except UserError:
            continue
        if one.entries:
            found.append((one, paper))
    return found


def _beside(run: StoredRun, one: Beside, paper: PublishedTable) -> Html:
    caption = f"{run.name} beside '{one.row.label}' of {paper.source}, %"
    rows = [
        [
            f"{entry.checkpoint}, {entry.key}",
            f"{entry.n}",
            f"{formats.percent(entry.accuracy)} ({words.interval(entry.ci95)})",
            f"{100 * entry.published:.2f}",
            f"{100 * entry.difference:+.1f}",
            "in the interval" if entry.inside else "outside",
        ]
        for entry in one.entries
    ]
    headings = ("Measure", "Test images", "Measured (95 %)", "Published", "Difference", "Published value")
    deviations = [[deviation.what, deviation.here, deviation.paper] for deviation in one.deviations]
    unlike = table(("What", "here", "in the paper"), deviations, caption="Not alike, or not known to be")
    said = [*(f"{column.key}: {column.note}" for column in paper.accuracies if column.note), *paper.notes]
    notes = tag("ul", *(tag("li", text) for text in said))
    shown = table(headings, rows, caption=caption, numbers=True)
    count = f"{len(deviations)} conditions that are not alike, or not known to be"
    return joined([shown, folded(count, unlike, tag("p", f"On {paper.source}:"), notes)])
