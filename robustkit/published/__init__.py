"""What papers report: one readable file for each of their tables of results.

A file gives a title, its source, notes on what the paper leaves open, and columns by the names that measures have in
results.json. Each block of rows has something in common (a data set, a radius, a network): a row is a method and its
numbers, "-" where the paper has none. `conditions` and `methods` say under which settings the paper got them, in the
words of `robustkit run RECIPE path=value`: the table's, the block's, and each method's own. What the paper does not
say is not there; `a|b` is one of the two.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from robustkit.core.errors import UserError
from robustkit.core.override import literal
from robustkit.core.registry import hint

PERCENT = "%"


@attrs.frozen
class Column:
    """A measure: its key in results.json, the paper's word for it, its unit, its settings, what is open about it."""

    key: str
    paper: str
    unit: str = PERCENT
    settings: dict[str, Any] = attrs.field(factory=dict)
    note: str = ""


@attrs.frozen
class Row:
    """A method in one block: its settings in the paper by path, and its numbers by column key."""

    method: str
    block: str
    test_images: int | None
    conditions: dict[str, Any]
    values: dict[str, float]

    @property
    def label(self) -> str:
        """'UIAT, CIFAR-10': no other row of the table has it."""
        return f"{self.method}, {self.block}" if self.block else self.method


@attrs.frozen
class PublishedTable:
    """One table of a paper. `selection`: which checkpoint it reports; `seeds`: how many; "" where it does not say."""

    name: str
    title: str
    paper: str
    source: str
    selection: str
    seeds: str
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def accuracies(self) -> tuple[Column, ...]:
        """The columns that a run's results may have."""
        return tuple(column for column in self.columns if column.unit == PERCENT)


def tables() -> tuple[str, ...]:
    """The names of all tables."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.toml")))


@cache
def load(name: str) -> PublishedTable:
    """The table of that name.

    Raises:
        UserError: there is none; near misses are named.
    """
    if name not in tables():
        raise UserError(f"unknown table '{name}'", place="--paper", remedy=hint(name, tables()))
    data = tomllib.loads((Path(__file__).parent / f"{name}.toml").read_text(encoding="utf-8"))
    columns = tuple(Column(**column | {"settings": settings(column.get("settings", ""))}) for column in data["columns"])
    return PublishedTable(
        name=name,
        title=data["title"],
        paper=data["paper"],
        source=data["source"],
        selection=data.get("selection", ""),
        seeds=data.get("seeds", ""),
        notes=tuple(data["notes"]),
        columns=columns,
        rows=tuple(_row(line, block, data, columns) for block in data["blocks"] for line in block["rows"]),
    )


def settings(text: str) -> dict[str, Any]:
    """{path: value} of 'path=value path=value': numbers are numbers (8/255, too), all else is text."""
    found = {}
    for word in text.split():
        path, _, value = word.partition("=")
        try:
            found[path] = literal(value)
        except ValueError:
            found[path] = value
    return found


def _row(line: list[Any], block: dict[str, Any], data: dict[str, Any], columns: tuple[Column, ...]) -> Row:
    method, *numbers = line
    conditions = (
        part.get("methods", {}).get(method, "") if own else part.get("conditions", "")
        for own in (False, True)
        for part in (data, block)
    )
    return Row(
        method=method,
        block=block.get("name", ""),
        test_images=block.get("test_images"),
        conditions={path: value for text in conditions for path, value in settings(text).items()},
        values={column.key: n for column, n in zip(columns, numbers, strict=True) if n != "-"},
    )
