"""The verdict: a sentence for each run, what speaks for or against it, the table of results, tests between runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from robustkit.reporting import comparison, formats
from robustkit.reporting.comparison import Difference
from robustkit.reporting.report import words
from robustkit.reporting.report.html import Html, joined, missing, table, tag
from robustkit.reporting.report.remarks import Remark, remarks, sentence
from robustkit.reporting.report.stored import StoredRun
from robustkit.reporting.tables import Column, columns, position


def section(runs: Sequence[StoredRun]) -> Html:
    several = len(runs) > 1
    parts = []
    for run in runs:
        parts.append(tag("h3", run.name) if several else None)
        parts.append(tag("p", sentence(run), class_="verdict"))
        parts.append(tag("ul", *(_remark(remark) for remark in remarks(run)), class_="remarks"))
    tables = [_results(runs), _seeds(runs), _differences(runs)]
    return joined([*tables, *parts] if len(runs) > 4 else [*parts, *tables])  # of many, first how they compare


def _remark(remark: Remark) -> Html:
    command = None if remark.command is None else joined((" ", tag("code", remark.command)))
    return tag("li", tag("strong", remark.title), f" {remark.text}", command, class_=remark.kind)


def _results(runs: Sequence[StoredRun]) -> Html:
    shown: list[Column] = []
    for run in runs:
        shown += columns(run.name if len(runs) > 1 else "run", run.results)
        if run.control is not None:
            shown += columns(run.control.name if len(runs) > 1 else "control", run.control.results)
    if not shown:
        first = runs[0]
        return missing("No results yet.", words.command("eval" if first.finished else "resume", first.path))
    keys = sorted({key for column in shown for key in column.results}, key=position)
    rows = [[key, _images(shown, key), *(_accuracy(column, key) for column in shown)] for key in keys]
    headings = ["Measure", "Test images", *(f"{column.model}, {column.checkpoint}" for column in shown)]
    return table(headings, rows, caption="Accuracy in % with its 95 % interval", numbers=True)


def _images(shown: Sequence[Column], key: str) -> str:
    return " / ".join(f"{n}" for n in sorted({column.results[key]["n"] for column in shown if key in column.results}))


def _accuracy(column: Column, key: str) -> str:
    return words.accuracy(column.results[key]) if key in column.results else ""


def _seeds(runs: Sequence[StoredRun]) -> Html | None:
    """Means over runs of one recipe with several seeds."""
    rows = []
    for group in comparison.groups([run.item for run in runs]):
        for checkpoint, key, spread in comparison.spreads(group):
            sd = "" if spread.sd is None else f" ± {100 * spread.sd:.2f}"
            ends = "" if spread.ci95 is None else words.interval(spread.ci95)
            mean = f"{formats.percent(spread.mean)}{sd}"
            rows.append([f"{group.name}, {checkpoint}, {key}", f"{spread.n}", mean, ends])
    if not rows:
        return None
    headings = ("Runs", "Seeds", "Mean and sd, %", "Interval of the mean (95 %)")
    return table(headings, rows, caption="Over seeds", numbers=True)


def _differences(runs: Sequence[StoredRun]) -> Html | None:
    """Whether the first run differs from each other one by more than chance; see docs/comparing.md."""
    found = list(comparison.differences(comparison.groups([run.item for run in runs])))
    if not found:
        return None
    headings = ("First minus second", "Points", "95 %", "Right in one only", "p", "Verdict")
    rows = [list(_row(difference)) for difference in found]
    said = [tag("p", comparison.BASES[basis], class_="note") for basis in dict.fromkeys(d.basis for d in found)]
    return joined([table(headings, rows, caption="Differences", numbers=True), *said])


def _row(found: Difference) -> Iterator[str]:
    yield f"{found.first.name} - {found.second.name}, {found.checkpoint}, {found.key}"
    yield f"{100 * found.value:+.1f}"
    yield "" if found.ci95 is None else words.interval(found.ci95)
    yield "" if found.only_first is None else f"{found.only_first} : {found.only_second}"
    yield "" if found.p is None else f"{found.p:#.3g}" if found.p >= 0.001 else "< 0.001"
    yield found.verdict
