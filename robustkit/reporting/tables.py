"""Tables of results: models side by side, measures one below the other, never an accuracy without its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from robustkit.core.errors import visible
from robustkit.reporting import consoles, formats

ORDER = ("clean", "pgd-20", "cw", "autoattack")
"""Measures in the order in which they are shown; others follow by name."""


class Column(NamedTuple):
    """One checkpoint of one model: `results` is {key: {"accuracy", "n", "ci95", "seconds", ...}}."""

    model: str
    checkpoint: str
    results: dict[str, Any]


def columns(model: str, results: dict[str, Any]) -> list[Column]:
    """The checkpoints in results.json's data; one column where best and last are the same weights."""
    last, best = results.get("last"), results.get("best")
    if last and last == best:
        return [Column(model, "last = best", last)]
    return [Column(model, name, results[name]) for name in ("last", "best") if results.get(name)]


def with_control(results: dict[str, Any], control: dict[str, Any] | None) -> list[Column]:
    """A run's checkpoints, and beside them its control's."""
    return columns("model" if control is None else "robust", results) + columns("control", control or {})


def as_html(table: Table) -> str:
    """The table as a notebook shows it."""
    return consoles.as_html(lambda console: console.print(table))


def results_as_html(shown: Sequence[Column], *, title: str = "", remarks: Sequence[str] = ()) -> str:
    """What `print_results` prints, and further remarks, as a notebook shows it."""

    def show(console: Console) -> None:
        print_results(console, shown, title=title)
        for remark in remarks:
            console.print(remark)

    return consoles.as_html(show)


def print_results(console: Console, shown: Sequence[Column], *, title: str = "") -> None:
    """Prints all columns side by side in one table; where the console is too narrow, one below the other in one."""
    if not shown:
        console.print("No results yet.")
        return
    table = results_table(shown, title=title)
    console.print(table if _width(console, table) <= console.width else stacked_table(shown, title=title))
    for note in notes(shown):
        console.print(note, style="dim")


def results_table(shown: Sequence[Column], *, title: str = "") -> Table:
    """A row for each measure; for each column its accuracy with the 95 % interval, and the seconds it took."""
    table = plain_table(title=title)
    table.add_column("Measure")
    table.add_column("Test images", justify="right")
    for column in shown:
        table.add_column(f"{column.model}, {column.checkpoint}\nAccuracy %  (95 %)", justify="right")
        table.add_column("\ns", justify="right", style="dim")
    entries = [entry for column in shown for entry in column.results.values()]
    most = max((entry["n"] for entry in entries), default=0)
    for key in sorted({key for column in shown for key in column.results}, key=position):
        found = [column.results.get(key) for column in shown]
        cells = [cell for entry in found for cell in _cells(entry)]
        table.add_row(key, _images([entry["n"] for entry in found if entry], most), *cells)
    return table


def stacked_table(shown: Sequence[Column], *, title: str = "") -> Table:
    """The same for narrow consoles: a section for each column, a row for each measure."""
    table = plain_table(title=title)
    table.add_column("Model")
    table.add_column("Measure")
    table.add_column("Test images", justify="right")
    for heading in ("Accuracy %  (95 %)", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    most = max((entry["n"] for column in shown for entry in column.results.values()), default=0)
    for column in shown:
        names = [f"{column.model}, {column.checkpoint}"]
        for key in sorted(column.results, key=position):
            entry = column.results[key]
            table.add_row(names.pop() if names else "", key, _images([entry["n"]], most), *_cells(entry))
        table.add_section()
    return table


def notes(shown: Sequence[Column]) -> Iterator[str]:
    """What the numbers alone do not say."""
    for column in shown:
        where = f"{column.model}, {column.checkpoint}"
        if column.checkpoint == "last = best":
            yield f"{column.model}: the best checkpoint is the last one, evaluated once."
        for key in sorted(column.results, key=position):
            entry = column.results[key]
            if entry.get("breakdown"):
                parts = ", ".join(f"{name} {formats.percent(share)}" for name, share in entry["breakdown"].items())
                yield f"{where}: {key}, accuracy after {parts}."
            for stage, shares in entry.get("shares", {}).items():
                parts = ", ".join(f"{name} {formats.percent(share)}" for name, share in shares.items())
                yield f"{where}: {key}, {stage}: {parts}."
            for note in entry.get("notes", ()):
                yield f"{where}: {note.removesuffix('.')}."


def plain_table(*headings: str, title: str = "") -> Table:
    """The one look of all tables."""
    words = Text(visible(title), style="bold") if title else None  # no markup, whatever console prints it
    table = Table(box=box.SIMPLE_HEAD, title=words, title_justify="left", pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _width(console: Console, table: Table) -> int:
    """Columns that the table would like to have."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _cells(entry: dict[str, Any] | None) -> tuple[str, str]:
    if entry is None:
        return "", ""
    low, high = (formats.percent(share) for share in entry["ci95"])
    interval = f"({low}-{high})"
    return f"{formats.percent(entry['accuracy'])}  {interval:>12}", f"{entry['seconds']:.1f}"


def _images(counts: Sequence[int], most: int) -> str:
    """'360', or '128 of 360' for a fixed part of the test images."""
    return " / ".join(f"{count}" if count == most else f"{count} of {most}" for count in sorted(set(counts)))


def position(key: str) -> tuple[str, int, str]:
    """Where a measure stands among others: by its suite, then in `ORDER`, then by name."""
    suite, _, name = key.rpartition("/")
    return suite, ORDER.index(name) if name in ORDER else len(ORDER), name
