"""Accuracy against radius, steps and restarts, and class by class: what `robustkit eval --curves` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustkit.reporting import formats
from robustkit.reporting.report import charts, words
from robustkit.reporting.report.charts import COLOURS, Line, Mark
from robustkit.reporting.report.html import Html, folded, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun

ALONG = {"epsilon": "radius", "steps": "steps", "restarts": "restarts"}
WANTED = "epsilon,steps,restarts,classes"


def section(runs: Sequence[StoredRun]) -> Html:
    parts: list[Html | None] = []
    drawn = [_overlaid(name, held) for name in ALONG if (held := [run for run in runs if name in run.curves])]
    parts.append(charts.side_by_side(*drawn) if drawn else None)
    for run in runs:
        whose = f" of {run.name}" if len(runs) > 1 else ""
        for name in ALONG:
            if name in run.curves:
                parts.append(_numbers(run.curves[name], whose))
        if "classes" in run.curves:
            parts.append(_classes(run.curves["classes"], whose))
        absent = [name for name in WANTED.split(",") if name not in run.curves]
        if absent:
            command = words.command("eval", run.path, "--curves", ",".join(absent))
            parts.append(missing(f"Not measured{whose}: accuracy by {words.listed(absent)}.", command))
    return joined(parts)


def _overlaid(name: str, runs: Sequence[StoredRun]) -> Html:
    first = runs[0].curves[name]
    in_255ths = name == "epsilon" and first["norm"] == "Linf"
    lines = []
    for number, run in enumerate(runs):
        found = run.curves[name]
        across = [255 * value if in_255ths else value for value in found["values"]]
        points = [(value, 100 * share) for value, share in zip(across, found["accuracies"], strict=True)]
        tips = [f"{run.name}, {' '.join(cells)}" for cells in _rows(found)]
        band = [(100 * low, 100 * high) for low, high in found["ci95"]]
        label = f"{run.name}, " if len(runs) > 1 else ""
        label += f"{found['key']}, {found['n']:,} images, with its 95 % interval"
        lines.append(Line(label, points, tips, COLOURS[number % len(COLOURS)], number >= len(COLOURS), band))
    reported = words.radius(first["epsilon"], first["norm"])
    marks = [Mark(255 * first["epsilon"] if in_255ths else first["epsilon"], f"reported at {reported}")]
    x = f"{words.NORMS.get(first['norm'], first['norm'])} radius{' (1/255)' if in_255ths else ''}"
    return charts.line_chart(
        f"Accuracy by {ALONG[name]}",
        lines,
        x=x if name == "epsilon" else f"{name} of the attack, at {reported}",
        y="accuracy (%)",
        whole=True,
        marks=marks if name == "epsilon" else (),
        counted=name != "epsilon",
    )


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(at, accuracy) of each point, in words."""
    named = [words.radius(v, found["norm"]) if found["along"] == "epsilon" else f"{v:g}" for v in found["values"]]
    shares = zip(found["accuracies"], found["ci95"], strict=True)
    said = [f"{formats.percent(share)} ({words.interval(ci95)})" for share, ci95 in shares]
    return list(zip(named, said, strict=True))


def _numbers(found: dict[str, Any], whose: str) -> Html:
    name = ALONG.get(found["along"], found["along"])
    caption = f"Accuracy by {name}{whose}, {found['key']}, {found['n']:,} images"
    shown = table((name.capitalize(), "Accuracy % (95 %)"), _rows(found), caption=caption, numbers=True)
    return folded(f"{caption}: all numbers", shown)


def _classes(found: dict[str, list[dict[str, Any]]], whose: str) -> Html:
    """The least robust first."""
    keys = sorted(found, key=lambda key: key != "clean")
    order = sorted(range(len(found[keys[-1]])), key=lambda number: float(found[keys[-1]][number]["accuracy"]))
    rows = []
    for number in order:
        entries = [found[key][number] for key in keys]
        cells = [_bar(entry, number == len(keys) - 1) for number, entry in enumerate(entries)]
        rows.append([entries[0]["name"], f"{entries[0]['n']}", *cells])
    headings = ("Class", "Images", *(f"{key} % (95 %)" for key in keys))
    return table(headings, rows, caption=f"Accuracy by class{whose}, the least robust first")


def _bar(entry: dict[str, Any], attacked: bool) -> Html:
    if not entry["n"]:
        return Html("no images")
    width = f"width: {100 * entry['accuracy']:.1f}%"
    bar = tag("span", class_="bar attacked" if attacked else "bar", style=width, aria_hidden="true")
    return joined((words.accuracy(entry), bar))
