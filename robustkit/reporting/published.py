"""A run beside the row of a paper's table that it repeats: what was measured, what was published, what is not alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from robustkit.core.errors import UserError
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.spec import flatten, to_json, walk
from robustkit.datasets.location import locate
from robustkit.folder import noted
from robustkit.published import PublishedTable, Row
from robustkit.reporting import formats
from robustkit.reporting.comparison import Item, but_for_seed
from robustkit.reporting.tables import columns, plain_table

HOW = ("data", "threat", "optimizer", "schedule")
"""Strategies that do not say which method a recipe is, but how it is done; all others do."""
UNSAID = {"attack.objective": "cross-entropy", "epsilon": "fixed", "head": "linear", "weights": "still"}
"""What stands there in a method that does not name it."""
ORIGINALS = {
    "cifar10": ("ROBUSTKIT_CIFAR10_DIR", "cifar-10-batches-py"),
    "cifar100": ("ROBUSTKIT_CIFAR100_DIR", "cifar-100-python"),
    "svhn": ("ROBUSTKIT_SVHN_DIR", "test_32x32.mat"),
}
"""Where a data set's original files would be."""
TOLD = ("attack", "control", "data.per_class", "data.inner.per_class", "evaluation", "seed")
"""Settings that have lines of their own, or do not bear on the weights."""
OPEN = "not stated"


@attrs.frozen
class Entry:
    """One measure of one checkpoint; shares in [0, 1]. `inside`: the published value lies in the measured interval."""

    checkpoint: str
    key: str
    accuracy: float
    ci95: tuple[float, float]
    n: int
    published: float
    difference: float
    inside: bool


@attrs.frozen
class Deviation:
    """A condition that is not, or may not be, the paper's."""

    what: str
    here: str
    paper: str = OPEN


@attrs.frozen
class Beside:
    """A run and its row."""

    item: Item
    row: Row
    entries: tuple[Entry, ...]
    deviations: tuple[Deviation, ...]


def beside(items: Sequence[Item], table: PublishedTable, wanted: str | None = None) -> list[Beside]:
    """Each run beside its row of the table, which is found by its recipe, or is the one `wanted`.

    Raises:
        UserError: there are no accuracies in the table, an item has no results, or the row is not certain.
    """
    if not table.accuracies:
        raise UserError(f"holds no accuracies, but {table.columns[0].unit}", place=table.name)
    found = []
    for item in items:
        if not item.results:
            remedy = "give a run that is measured (robustkit eval RUN)"
            raise UserError("has no results to compare with a paper", place=item.path, remedy=remedy)
        row = match(item.recipe, table, wanted, place=item.path)
        entries = tuple(_entries(item, table, row))
        found.append(Beside(item, row, entries, tuple(_deviations(items, item, table, row, entries))))
    return found


def match(recipe: Recipe, table: PublishedTable, wanted: str | None = None, *, place: str = "recipe") -> Row:
    """The row of the recipe's data set and method; of several, the one whose differing conditions the recipe meets.

    `wanted` names a method, or a whole label ("UIAT, CIFAR-10"), instead of asking the recipe.

    Raises:
        UserError: no row is left, or more than one; the line lists them.
    """
    facts = settings_of(recipe)
    rows = [row for row in table.rows if any(column.key in row.values for column in table.accuracies)]
    if wanted is None:
        rows_left = [row for row in rows if _is_told(row) and _same_method(row, facts) and _same_data(row, facts)]
        fault = f"no row of {table.name} is certainly this recipe's"
    else:
        name = wanted.casefold()
        rows_left = [row for row in rows if row.label.casefold() == name]
        rows_left = rows_left or [row for row in rows if row.method.casefold() == name]
        if not rows_left:
            remedy = f"its rows: {' | '.join(row.label for row in rows)}"
            raise UserError(f"{table.name} has no row '{wanted}'", place="--row", remedy=remedy)
        if len(rows_left) == 1:
            return rows_left[0]
        rows, rows_left = rows_left, [row for row in rows_left if _same_data(row, facts)]
        fault = f"no '{wanted}' of {table.name} is certainly this recipe's"
    contested = _contested(rows_left)
    rows_left = [
        row for row in rows_left if all(_holds(row.conditions.get(path), facts.get(path)) for path in contested)
    ]
    if len(rows_left) != 1:
        remedy = f"name it with --row: {' | '.join(row.label for row in rows_left or rows)}"
        raise UserError(fault, place=place, remedy=remedy)
    return rows_left[0]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings by path, as tables give them: the step size of an attack at work, starts as fractions."""
    facts = flatten(to_json(recipe))
    if facts.get("attack.step_size", 0) is None and not recipe.epsilon.sets_step_size:
        facts["attack.step_size"] = recipe.threat.epsilon / 4
    for path, value in facts.items():
        if path.endswith(".start") and isinstance(value, (int, float)) and value > 1:
            facts[path] = value / recipe.epochs
    return facts


def _is_told(row: Row) -> bool:
    """Whether a recipe can be seen to be of this method."""
    return {"attack", "loss", "data"} <= row.conditions.keys()


def _same_method(row: Row, facts: dict[str, Any]) -> bool:
    return _composition(row.conditions) == _composition(facts)


def _same_data(row: Row, facts: dict[str, Any]) -> bool:
    """Whether test images are the same: those of the data set inside another one that adds training images."""
    expected, found = (given.get("data.inner", given.get("data")) for given in (row.conditions, facts))
    return _holds(expected, found)


def _composition(facts: dict[str, Any]) -> dict[str, str]:
    """Names of the strategies that make the method; what is as in plain training is left out."""
    parts = {path: value for path, value in facts.items() if _says_which(path) and isinstance(value, str)}
    return {path: value for path, value in parts.items() if value != UNSAID.get(path)}


def _says_which(path: str) -> bool:
    whole = "." not in path and path not in HOW
    return whole or path == "attack.objective" or re.fullmatch(r"(attack|target)(\.inner)+", path) is not None


def _contested(rows: Sequence[Row]) -> set[str]:
    """Conditions in which the rows differ."""
    paths = {path for row in rows for path in row.conditions}
    return {path for path in paths if any(r.conditions.get(path) != rows[0].conditions.get(path) for r in rows)}


def _holds(expected: Any, found: Any) -> bool:
    if isinstance(expected, str):
        return found in expected.split("|")
    if isinstance(expected, tuple):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_holds, expected, found))
    if isinstance(expected, bool) or not isinstance(expected, (int, float)):
        return bool(expected == found)
    return isinstance(found, (int, float)) and math.isclose(expected, found, rel_tol=1e-4)  # 0.30303 for 10/33


def _entries(item: Item, table: PublishedTable, row: Row) -> Iterator[Entry]:
    for _, checkpoint, results in columns(item.path, item.results):
        for column in table.accuracies:
            if column.key in results and column.key in row.values:
                entry, published = results[column.key], round(row.values[column.key] / 100, 6)
                low, high = entry["ci95"]
                difference = entry["accuracy"] - published
                yield Entry(
                    checkpoint,
                    column.key,
                    entry["accuracy"],
                    (low, high),
                    entry["n"],
                    published,
                    difference,
                    low <= published <= high,
                )


# What is not alike


def _deviations(
    items: Sequence[Item], item: Item, table: PublishedTable, row: Row, entries: Sequence[Entry]
) -> Iterator[Deviation]:
    """Everything known, the method first, then data, training, choice of the checkpoint, measurement."""
    recipe, facts = item.recipe, settings_of(item.recipe)
    yield from _settings(recipe, row, facts)
    yield from _data(facts, noted(Path(item.path), "data"))
    held = recipe.validation.images
    here = f"best on {held:,} training images held out" if held else "last"
    yield Deviation("checkpoint", here if not held else f"last, and {here}", table.selection or OPEN)
    yield from _measurement(recipe, table, row, entries)
    seeds = {other.recipe.seed for other in items if but_for_seed(other.recipe) == but_for_seed(recipe)}
    yield Deviation("seeds", "one" if len(seeds) == 1 else str(len(seeds)), table.seeds or OPEN)


def _settings(recipe: Recipe, row: Row, facts: dict[str, Any]) -> Iterator[Deviation]:
    """Parts that are others, then settings that are not the paper's, then those that it does not state."""
    ours, theirs = _composition(facts), _composition(row.conditions)
    candidates = {**theirs, **ours} if _is_told(row) else theirs
    parts = [path for path in candidates if theirs.get(path) != ours.get(path)]
    if not _is_told(row):
        yield Deviation("method", "cannot be told from the recipe", row.method)
    for path in parts:
        if not _below(path, parts):
            yield Deviation(path, _shown(path, facts.get(path)), _shown(path, theirs.get(path, UNSAID.get(path))))
    for path, expected in row.conditions.items():
        if not (path in parts or _below(path, parts) or _holds(expected, facts.get(path))):
            yield Deviation(path, _shown(path, facts.get(path)), _shown(path, expected))
            parts.append(path)
    for path, value in _chosen(recipe):
        if not (_below(path, parts) or path in row.conditions):
            yield Deviation(path, _shown(path, value))


def _below(path: str, parts: Sequence[str]) -> bool:
    """Whether a setting belongs to a part that is another one: that says enough."""
    return any(path.startswith(f"{part}.") for part in parts)


def _chosen(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Settings that are not robustkit's own defaults, but for those that other lines tell of."""
    for where, part in walk(recipe):
        if where.partition(".")[0] in ("evaluation", "validation", "control"):
            continue
        for field in attrs.fields(type(part)):
            path, value, default = f"{where}.{field.name}".lstrip("."), getattr(part, field.name), field.default
            if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
                default = default.factory()
            told = path in TOLD or bool(field.metadata.get("location"))
            if not (told or attrs.has(type(value)) or value == default):
                yield path, to_json(value)


def _data(facts: dict[str, Any], copy: str | None) -> Iterator[Deviation]:
    at = "data.inner" if "data.inner" in facts else "data"
    if facts.get(f"{at}.per_class") is not None:
        yield Deviation("training images", f"the first {facts[f'{at}.per_class']:,} of each class", "all")
    if facts[at] in ORIGINALS and copy is not None:
        if copy != "the original files":
            yield Deviation("data", copy, "the original files")
    elif facts[at] in ORIGINALS:  # a run that did not note what it read
        variable, original = ORIGINALS[facts[at]]
        folder: Path = locate(facts.get(f"{at}.root"), variable)
        if (folder / original).exists():
            return
        here = "an image folder" if (folder / "train").is_dir() else "unknown: no files are there"
        yield Deviation("data", f"{here} (today, in {folder})", "the original files")


def _measurement(recipe: Recipe, table: PublishedTable, row: Row, entries: Sequence[Entry]) -> Iterator[Deviation]:
    measured = {result_key(suite, measure): (suite, measure) for suite, measure in recipe.measures()}
    for n in sorted({entry.n for entry in entries}):
        if row.test_images is not None and n != row.test_images:
            keys = dict.fromkeys(entry.key for entry in entries if entry.n == n)
            yield Deviation(f"test images of {', '.join(keys)}", f"{n:,}", f"{row.test_images:,}")
    for column in table.accuracies:
        if column.key in measured and any(entry.key == column.key for entry in entries):
            suite, measure = measured[column.key]
            threat = recipe.threat if suite.threat is None else suite.threat
            facts = flatten(to_json(measure) | {"threat": to_json(threat)})
            if facts.get("step_size", 0) is None:
                facts["step_size"] = threat.epsilon / 4
            expectations = dict(column.settings)
            if suite.threat is not None and column.key != "clean":  # else the recipe's own has been compared
                expectations = {p: v for p, v in row.conditions.items() if p.startswith("threat")} | expectations
            for path, expected in expectations.items():
                if not _holds(expected, facts.get(path)):
                    yield Deviation(f"{column.key}: {path}", _shown(path, facts.get(path)), _shown(path, expected))


def _shown(path: str, value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return formats.setting(path.rpartition(".")[2], float(value) if _is_radius(path, value) else value)


def _is_radius(path: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and path.endswith(("epsilon", "radius"))


# Output


def to_data(found: Sequence[Beside], table: PublishedTable) -> dict[str, Any]:
    """The comparison as JSON data."""
    return {
        "paper": {"table": table.name, "title": table.title, "source": table.source, "notes": list(table.notes)},
        "runs": [
            {
                "path": one.item.path,
                "row": one.row.label,
                "measures": [attrs.asdict(entry) for entry in one.entries],
                "deviations": [attrs.asdict(deviation) for deviation in one.deviations],
            }
            for one in found
        ],
    }


def print_beside(console: Console, found: Sequence[Beside], table: PublishedTable) -> None:
    """For each run a table of measured and published, and a list of what is not alike; the table's notes at the end."""
    for one in found:
        title = f"{one.item.path} beside '{one.row.label}' of {table.source}"
        if one.entries:
            shown = plain_table("Checkpoint", "Measure", title=title)
            for heading in ("Test images", "Measured %  (95 %)", "Published", "Difference"):
                shown.add_column(heading, justify="right")
            shown.add_column("Published value")
            for entry in one.entries:
                low, high = (formats.percent(share) for share in entry.ci95)
                shown.add_row(
                    entry.checkpoint,
                    entry.key,
                    f"{entry.n}",
                    f"{formats.percent(entry.accuracy)}  {f'({low}-{high})':>12}",
                    f"{100 * entry.published:.2f}",
                    f"{100 * entry.difference:+.1f}",
                    "in the interval" if entry.inside else "outside",
                )
            console.print(shown)
        else:
            console.print(f"{title}: no measure in common (published: {', '.join(one.row.values)}).")
        listed = plain_table("Not alike, or not known to be", "here", "in the paper")
        for deviation in one.deviations:
            listed.add_row(deviation.what, deviation.here, deviation.paper)
        console.print(listed)
    console.print(f"On {table.source}:", style="dim")
    for note in (*(f"{column.key}: {column.note}" for column in table.accuracies if column.note), *table.notes):
        console.print(f"- {note}", style="dim")
