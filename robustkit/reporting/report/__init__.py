"""The report: one page in one file about finished or unfinished runs, made of what their folders hold.

Nothing is trained or attacked for it, nothing is fetched by it, and it needs no script: it opens from the disk, and all
its numbers are text. One module is one section; `stored` reads the folders, `html`, `charts` and `words` say what is
found, `remarks` is the verdict as data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import robustkit
from robustkit.core.checkpoint import write_text
from robustkit.reporting.report import (
    composition,
    cost,
    learning,
    origin,
    papers,
    pictures,
    radii,
    strength,
    verdict,
)
from robustkit.reporting.report.html import Html, joined, tag
from robustkit.reporting.report.remarks import remarks, sentence
from robustkit.reporting.report.stored import StoredRun, read_runs
from robustkit.reporting.report.words import listed

__all__ = ["SECTIONS", "Section", "StoredRun", "page", "read_runs", "to_data", "write_report"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing but pictures that are in it. It runs no script."""


class Section(NamedTuple):
    """A heading, and what stands below it."""

    name: str
    title: str
    content: Callable[[Sequence[StoredRun]], Html]


SECTIONS = (
    Section("verdict", "Verdict", verdict.section),
    Section("learning", "Learning curves", learning.section),
    Section("strength", "Accuracy by attack strength and by class", strength.section),
    Section("pictures", "Pictures", pictures.section),
    Section("radii", "Radii of training", radii.section),
    Section("composition", "Composition", composition.section),
    Section("papers", "Published numbers", papers.section),
    Section("cost", "Cost", cost.section),
    Section("environment", "Environment", origin.environment),
    Section("seeds", "Seeds", origin.seeds),
    Section("repeat", "Commands to repeat it", origin.repeat),
)


def write_report(runs: Sequence[StoredRun], out: Path | None = None) -> Path:
    """Writes the page, by default into the first run's folder: report.html, or comparison.html of several runs.

    The same folders give the same page, byte for byte, with the same versions.
    """
    if out is None:
        out = Path(runs[0].path, "report.html" if len(runs) == 1 else "comparison.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(runs) + "\n")
    return out


def page(runs: Sequence[StoredRun]) -> Html:
    """The whole page."""
    title = listed([run.name for run in runs]) if len(runs) <= 4 else f"{len(runs)} runs"
    state = time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(run.changed for run in runs)))
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    links = [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in SECTIONS]
    parts = [tag("section", tag("h2", section.title), section.content(runs), id=section.name) for section in SECTIONS]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", f"{title}: robustkit report"),
        tag("style", Html(style)),
    ]
    body = [
        tag("header", tag("h1", title), tag("nav", tag("ul", *links), aria_label="sections")),
        tag("main", *parts),
        tag("footer", f"Of what was stored at {state} UTC. robustkit {robustkit.__version__}."),
    ]
    whole = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return joined((Html("<!doctype html>\n"), whole))


def to_data(runs: Sequence[StoredRun]) -> list[dict[str, Any]]:
    """The verdicts as JSON data."""
    return [
        {
            "run": run.path,
            "verdict": sentence(run),
            "finished": run.finished,
            "remarks": [
                {"kind": one.kind, "title": one.title, "text": one.text, "command": one.command} for one in remarks(run)
            ],
        }
        for run in runs
    ]
