"""Learning curves: of one run accuracies, loss and rate; of several, one line for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkit.reporting import formats
from robustkit.reporting.report import charts, words
from robustkit.reporting.report.charts import BLUE, COLOURS, GREEN, PURPLE, VERMILLION, Line, Mark
from robustkit.reporting.report.html import Html, folded, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun

PARTS = {"validation": "held out", "training": "training"}
KINDS = {"natural": BLUE, "robust": VERMILLION, "fgsm": PURPLE}
"""What every recipe's validation measures; others are in the table alone."""
TERMS = (GREEN, PURPLE, "#E69F00", "#56B4E9", BLUE, VERMILLION)


def section(runs: Sequence[StoredRun]) -> Html:
    if len(runs) > 1:
        return joined([_overlaid(runs), *(_numbers(run, f"Epochs of {run.name}") for run in runs)])
    (run,) = runs
    parts = [_single(run, "")]
    if run.control is not None:
        parts += [tag("h3", "Control"), _single(run.control, " of the control")]
    return joined(parts)


def _single(run: StoredRun, whose: str) -> Html:
    if not run.reports:
        return missing("No epoch has ended yet.", words.command("resume", run.path))
    best = None if run.facts is None else run.facts["best"].get("epoch")
    marks = [] if best is None else [Mark(best, "best checkpoint")]
    drawn = [_accuracies(run, whose, marks), _losses(run, whose), _rates(run, whose)]
    return joined([charts.side_by_side(*drawn), _numbers(run, f"Epochs{whose}")])


def _accuracies(run: StoredRun, whose: str, marks: Sequence[Mark]) -> Html:
    lines = []
    for part, label in PARTS.items():
        for kind, colour in KINDS.items():
            points = _points(run.reports, part, kind)
            if points:
                tips = [f"epoch {epoch}: {kind}, {label} {value:.1f} %" for epoch, value in points]
                lines.append(Line(f"{kind}, {label}", points, tips, colour, part == "training"))
    if not lines:
        return missing("No images were held out: there are no accuracies by epoch.")
    return charts.line_chart(f"Accuracy by epoch{whose}", lines, x="epoch", y="accuracy (%)", whole=True, marks=marks)


def _points(reports: Sequence[dict[str, Any]], part: str, kind: str) -> list[tuple[float, float]]:
    return [(r["epoch"], 100 * r[part][kind]) for r in reports if kind in (r.get(part) or {})]


def _losses(run: StoredRun, whose: str) -> Html:
    names = dict.fromkeys(name for report in run.reports for name in _terms(report))
    lines = [_loss(run, "objective", "objective", COLOURS[6])]
    for number, name in enumerate(names if len(names) > 1 else ()):
        lines.append(_loss(run, name, name.removeprefix("term "), TERMS[number % len(TERMS)]))
    return charts.line_chart(f"Training loss{whose}", lines, x="epoch", y="nats")


def _terms(report: dict[str, Any]) -> list[str]:
    train = report["train"]
    return [key for key in train if key.startswith("term ") and isinstance(train[key], (int, float))]


def _loss(run: StoredRun, key: str, label: str, colour: str) -> Line:
    points = [(report["epoch"], report["train"][key]) for report in run.reports if key in report["train"]]
    return Line(label, points, [f"epoch {epoch}: {label} {value:.4g}" for epoch, value in points], colour)


def _rates(run: StoredRun, whose: str) -> Html:
    points = [(report["epoch"], report["lr"]) for report in run.reports]
    line = Line("at the end of the epoch", points, [f"epoch {e}: {rate:.4g}" for e, rate in points], COLOURS[6])
    return charts.line_chart(f"Learning rate{whose}", [line], x="epoch", y="learning rate")


def _overlaid(runs: Sequence[StoredRun]) -> Html:
    drawn = []
    for title, kind in (("Robust accuracy, held out", "robust"), ("Natural accuracy, held out", "natural")):
        lines = []
        for number, run in enumerate(runs):
            points = _points(run.reports, "validation", kind)
            if points:
                tips = [f"{run.name}, epoch {epoch}: {value:.1f} %" for epoch, value in points]
                dashed = number >= len(COLOURS)
                lines.append(Line(run.name, points, tips, COLOURS[number % len(COLOURS)], dashed))
        if lines:
            drawn.append(charts.line_chart(title, lines, x="epoch", y="accuracy (%)", whole=True))
    return charts.side_by_side(*drawn) if drawn else missing("No run has accuracies by epoch.")


def _numbers(run: StoredRun, caption: str) -> Html | None:
    if not run.reports:
        return None
    pairs = [(part, kind) for part in PARTS for kind in _kinds(run, part)]
    headings = ["Epoch", *(f"{kind}, {PARTS[part]} %" for part, kind in pairs), "objective", "learning rate", "time"]
    rows = [[f"{report['epoch']}", *_cells(report, pairs)] for report in run.reports]
    return folded(f"{caption}: all numbers", table(headings, rows, caption=caption, numbers=True))


def _kinds(run: StoredRun, part: str) -> list[str]:
    return list(dict.fromkeys(kind for report in run.reports for kind in report.get(part) or ()))


def _cells(report: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> list[str]:
    found = [(report.get(part) or {}).get(kind) for part, kind in pairs]
    shares = ["" if value is None else formats.percent(value) for value in found]
    seconds = report.get("seconds")
    took = "" if seconds is None else formats.duration(seconds)
    return [*shares, f"{report['train']['objective']:.4f}", f"{report['lr']:.3g}", took]
