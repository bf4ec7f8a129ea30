"""How recipes and runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from robustkit.core.recipe import Recipe, load_recipe
from robustkit.core.spec import digest, flatten, to_json
from robustkit.folder import read_results
from robustkit.reporting import formats
from robustkit.reporting.tables import columns, plain_table, print_results
from robustkit.runs import recipe_of

ABSENT = "-"


@attrs.frozen
class Item:
    """A recipe, and what its run found, if it is a run."""

    path: str
    recipe: Recipe
    is_run: bool
    results: dict[str, Any]


def load_item(path: str) -> Item:
    """A run folder, a recipe file, or a recipe's JSON.

    Raises:
        UserError: it is none of these.
    """
    folder = Path(path)
    if folder.is_dir():
        return Item(path, recipe_of(folder), True, read_results(folder))
    return Item(path, load_recipe(path), False, {})


def differing(items: Sequence[Item]) -> dict[str, list[Any]]:
    """{setting: its value in each recipe} of those that are not the same in all.

    A recipe that has no such setting shows "-"; one that has a whole part there (a control), "given".
    """
    leaves = [flatten(to_json(item.recipe)) for item in items]

    def value(found: dict[str, Any], path: str) -> Any:
        return found.get(path, "given" if any(other.startswith(f"{path}.") for other in found) else ABSENT)

    paths = dict.fromkeys(path for found in leaves for path in found)
    table = {path: [value(found, path) for found in leaves] for path in paths}
    return {path: values for path, values in table.items() if any(value != values[0] for value in values)}


def _worth_a_row(path: str, found: dict[str, list[Any]]) -> bool:
    """False for a setting of a part that the other recipes do not have at all: the part's own row says so."""
    values = found[path]
    present = [value for value in values if value != ABSENT]
    if len(present) == len(values) or any(value != present[0] for value in present):
        return True
    for number, value in enumerate(values):
        ancestors = [other for other in found if path.startswith(f"{other}.")]
        if value == ABSENT and not any(found[other][number] in (None, ABSENT) for other in ancestors):
            return True
    return False


def to_data(items: Sequence[Item]) -> dict[str, Any]:
    """The comparison as JSON data."""
    return {
        "compared": [{"path": i.path, "digest": digest(i.recipe), "results": i.results} for i in items],
        "differing": differing(items),
    }


def print_comparison(console: Console, items: Sequence[Item]) -> None:
    """Settings that differ; then the results of those that are runs, side by side."""
    names = _short([item.path for item in items])
    found = differing(items)
    if found:
        table = plain_table("Setting", *names, title="Settings that differ")
        for path in (path for path in found if _worth_a_row(path, found)):
            values = found[path]
            table.add_row(path, *(formats.setting(path.rpartition(".")[2], value) for value in values))
        console.print(table)
    else:
        console.print("The recipes are equal.")
    if any(item.is_run for item in items):
        pairs = zip(names, items, strict=True)
        shown = [column for name, item in pairs for column in columns(name, item.results)]
        print_results(console, shown, title="Results")


def _short(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [str(Path(*p[shared:])) for p in parts]
