"""What it cost: passes of a step by their count, images a second and seconds as they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from robustkit.reporting import formats
from robustkit.reporting.composition import phases
from robustkit.reporting.report.html import Html, folded, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun
from robustkit.reporting.tables import columns, position


def section(runs: Sequence[StoredRun]) -> Html:
    every = [one for run in runs for one in (run, run.control) if one is not None]
    rows = [[one.name, *_training(one)] for one in every]
    headings = ("Run", "Units a step", "Images a second", "Epochs", "Training", "Evaluation")
    caption = "Cost: a unit is one forward of the batch; images a second are the median of the epochs"
    whole = [_passes(run, f" of {run.name}" if len(runs) > 1 else "") for run in runs]
    return joined([table(headings, rows, caption=caption, numbers=True), _evaluation(every), *whole])


def _training(run: StoredRun) -> list[str]:
    units = " / ".join(f"{phase.total.units:.4g}" for phase in phases(run.recipe))
    speeds = [report["images_per_second"] for report in run.reports if report.get("images_per_second") is not None]
    seconds = [report["seconds"] for report in run.reports if report.get("seconds") is not None]
    judged = [entry["seconds"] for column in columns("", run.results) for entry in column.results.values()]
    return [
        units,
        f"{median(speeds):,.0f}" if speeds else "",
        f"{len(run.reports)} of {run.recipe.epochs}",
        formats.duration(sum(seconds)) if seconds else "",
        formats.duration(sum(judged)) if judged else "",
    ]


def _evaluation(runs: Sequence[StoredRun]) -> Html:
    rows = []
    for run in runs:
        for column in columns(run.name, run.results):
            for key in sorted(column.results, key=position):
                entry = column.results[key]
                where = f"{run.name}, {column.checkpoint}, {key}"
                rows.append([where, f"{entry['n']}", f"{entry['seconds']:.1f}", entry.get("path") or ""])
    if not rows:
        return missing("Nothing has been measured: evaluation has cost nothing yet.")
    headings = ("Measure", "Test images", "Seconds", "Forwarded in")
    return folded("Seconds by measure", table(headings, rows, caption="Seconds by measure", numbers=True))


def _passes(run: StoredRun, whose: str) -> Html:
    rows = []
    for phase in phases(run.recipe):
        epochs = f"epochs {phase.first} to {phase.last}" if phase.last > phase.first else f"epoch {phase.first}"
        for name, passes in [*phase.parts.items(), ("all", phase.total)]:
            if passes.units or name == "all":
                counts = (passes.forward, passes.input_backward, passes.parameter_backward, passes.units)
                rows.append([f"{epochs}, {name}", *(f"{count:.4g}" for count in counts)])
    headings = ("Part", "Forward", "Input backward", "Parameter backward", "Units")
    caption = f"Passes over the batch in one step{whose}"
    return folded(caption, table(headings, rows, caption=caption, numbers=True), tag("p"))
