"""A sweep's trials side by side: what they found, whether it is more than chance, and a figure for each setting."""

from __future__ import annotations

import statistics as plain
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from robustkit.core.errors import UserError
from robustkit.evaluation import statistics
from robustkit.reporting import comparison, formats
from robustkit.reporting.comparison import Item, load_item
from robustkit.reporting.paper import make
from robustkit.reporting.paper.finished import open_runs
from robustkit.reporting.tables import columns, plain_table, position, print_results
from robustkit.sweep.folder import Sweep, Trial, held_out


@attrs.frozen
class Seen:
    """A trial, what sets it apart, its best accuracy on held-out images, and its run, once that was judged."""

    trial: Trial
    values: dict[str, str]
    epochs: int
    held_out: float | None
    run: Item | None


def seen(sweep: Sweep) -> list[Seen]:
    """The trials of a sweep: of a grid in its order, of a search the best one first."""
    found = [_seen(sweep, trial) for trial in sweep.trials()]
    if sweep.search is not None:
        found.sort(key=lambda s: (s.trial.ended in ("done", "collapse"), s.held_out or 0.0), reverse=True)
    return found


def _seen(sweep: Sweep, trial: Trial) -> Seen:
    folder = sweep.path(trial)
    scores = held_out(folder, sweep.recipe(trial))
    item = load_item(str(folder)) if (folder / "recipe.json").is_file() else None
    judged = item if item is not None and any(item.results.values()) else None
    return Seen(trial, sweep.values(trial), max(scores, default=0), max(scores.values(), default=None), judged)


def to_data(sweep: Sweep) -> dict[str, Any]:
    """The sweep as JSON data: its trials, and the comparison of those that were judged."""
    found = seen(sweep)
    return {
        "folder": str(sweep.folder),
        "search": None if sweep.search is None else attrs.asdict(sweep.search),
        "trials": [
            {
                "number": s.trial.number,
                "folder": str(sweep.path(s.trial)),
                "values": s.values,
                "ended": s.trial.ended,
                "line": s.trial.line,
                "epochs": s.epochs,
                "held_out": s.held_out,
                "results": {} if s.run is None else s.run.results,
            }
            for s in found
        ],
        "comparison": comparison.to_data([s.run for s in found if s.run is not None]),
    }


def print_sweep(console: Console, sweep: Sweep) -> None:
    """The table of trials; of a grid also which differences the data resolve, of a search the results of the best."""
    found = seen(sweep)
    if sweep.search is None:
        items = [s.run for s in found if s.run is not None]
        _print_grid(console, found)
        comparison.print_differences(console, list(comparison.differences(comparison.groups(items))))
    else:
        _print_search(console, found)
        shown = [column for s in found if s.run is not None for column in columns(s.trial.name, s.run.results)]
        if shown:
            print_results(console, shown, title="The best trial on test images")
    for s in found:
        if s.trial.ended != "done":
            words = {"": "not finished", "collapse": "robustness collapsed"}.get(s.trial.ended, s.trial.ended)
            if s.trial.ended != "pruned":
                console.print(f"{s.trial.name}: {words}{f': {s.trial.line}' if s.trial.line else ''}")


def _print_grid(console: Console, found: Sequence[Seen]) -> None:
    """A row for each combination but for seeds, and each checkpoint; intervals are of the images, or of the seeds."""
    groups: dict[tuple[str, ...], list[Seen]] = {}
    settings = [path for path in (found[0].values if found else ()) if path != "seed"]
    for s in found:
        if s.run is not None:
            groups.setdefault(tuple(s.values[path] for path in settings), []).append(s)
    keys = sorted({key for s in found if s.run for key in s.run.keys("last")}, key=position)
    table = plain_table(title="Trials")
    for setting in settings:
        table.add_column(setting, overflow="fold")  # whole, on however narrow a terminal
    table.add_column("Weights", no_wrap=True)
    for heading in ("Seeds", "Held\nout %", *(f"{key} %\n(95 %)" for key in keys)):
        table.add_column(heading, justify="right", no_wrap=True)
    for values, members in groups.items():
        for checkpoint in _checkpoints(members):
            scores = [s.held_out for s in members if s.held_out is not None]
            held = formats.percent(plain.fmean(scores)) if scores and checkpoint != "last" else ""
            cells = [_cell([s.run for s in members if s.run is not None], checkpoint, key) for key in keys]
            table.add_row(*values, checkpoint, str(len(members)), held, *cells)
    if table.row_count:
        console.print(table)
        console.print("Held out: the best epoch's accuracy on training images that were held out.", style="dim")


def _checkpoints(members: Sequence[Seen]) -> Iterator[str]:
    """The best one apart only where it is not the last one in all of them."""
    if any(s.run is not None and s.run.has_best for s in members):
        yield from ("last", "best")
    else:
        yield "last = best" if any(s.run is not None and "best" in s.run.results for s in members) else "last"


def _cell(runs: Sequence[Item], checkpoint: str, key: str) -> str:
    which = "best" if checkpoint == "best" else "last"
    entries = [run.entry(which, key) for run in runs if key in run.keys(which)]
    if not entries:
        return ""
    spread = statistics.spread([float(entry["accuracy"]) for entry in entries])
    mean = formats.percent(spread.mean)
    if spread.sd is None:
        return f"{mean}\n({'-'.join(map(formats.percent, entries[0]['ci95']))})"
    interval = "" if spread.ci95 is None else f"\n({' to '.join(map(formats.percent, spread.ci95))})"
    return f"{mean} ± {100 * spread.sd:.2f}{interval}"


def _print_search(console: Console, found: Sequence[Seen]) -> None:
    table = plain_table(*(found[0].values if found else ()), title="Trials")
    table.add_column("Held out %", justify="right")
    table.add_column("Epochs", justify="right")
    table.add_column("Ended")
    for s in found:
        held = "" if s.held_out is None else formats.percent(s.held_out)
        table.add_row(*s.values.values(), held, str(s.epochs), s.trial.ended or "not yet")
    console.print(table)
    console.print(
        "Held out: the best epoch's accuracy on training images that were held out; it chose the best trial, "
        "so it flatters that one.",
        style="dim",
    )


def draw_figures(sweep: Sweep) -> Iterator[tuple[str, Path | str]]:
    """Of a grid, for each setting but the seed: accuracy against it, and where it was drawn, or why it was not."""
    folders = [str(sweep.path(trial)) for trial in sweep.trials() if trial.ended in ("done", "collapse")]
    for axis in sweep.axes if sweep.search is None else ():
        if axis.varies and axis.path != "seed":
            try:
                _, figure = make("sweep", open_runs(folders), setting=axis.path)
            except UserError as error:
                yield axis.path, str(error)
                continue
            path = sweep.folder / f"sweep-{axis.path}.png"
            figure.savefig(path)
            yield axis.path, path
