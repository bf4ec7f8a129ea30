"""What was composed: every setting of a run, and where it differs; of several runs their differences alone."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.core.errors import UserError
from robustkit.core.spec import digest
from robustkit.reporting import comparison, formats
from robustkit.reporting.comparison import Item
from robustkit.reporting.composition import Row, parameter_count, rows
from robustkit.reporting.report.html import Html, folded, joined, table, tag
from robustkit.reporting.report.shipped import shipped
from robustkit.reporting.report.stored import StoredRun


def section(runs: Sequence[StoredRun]) -> Html:
    if len(runs) > 1:
        different = _differing([run.item for run in runs], [run.name for run in runs], "Settings that differ")
        return different or tag("p", "The recipes are equal.")
    (run,) = runs
    own = rows(run.recipe, run.recipe)
    every = [[_indented(row), row.value, row.note] for row in own]
    caption = f"All settings of recipe {digest(run.recipe)}"
    whole = table(("Setting", "Value", "Otherwise"), every, caption=caption)
    return joined([_size(run), _from_shipped(run), folded(f"All {len(every)} settings", whole)])


def _size(run: StoredRun) -> Html:
    try:
        parameters = parameter_count(run.recipe)
    except UserError:  # a backbone that is not installed here
        parameters = None
    size = "" if parameters is None else f", {parameters:,} parameters"
    return tag("p", "Recipe ", tag("code", digest(run.recipe)), f": {run.recipe.model.backbone}{size}.")


def _from_shipped(run: StoredRun) -> Html:
    """What differs from the recipe that robustkit ships under this name; without one, from all defaults."""
    found = shipped(run)
    if found is None:
        own = [[_indented(row), row.value, row.note] for row in rows(run.recipe, run.recipe) if row.origin == "set"]
        text = "No recipe that robustkit ships is known to be this one's origin; these settings are not the defaults."
        return joined([tag("p", text), table(("Setting", "Value", "Otherwise"), own, caption="Not the defaults")])
    address, recipe = found
    items = [run.item, Item(address, recipe, False, {})]
    different = _differing(items, ["this run", address], f"Settings that differ from {address}")
    return different or tag("p", "All settings are those of ", tag("code", address), ".")


def _differing(items: Sequence[Item], names: Sequence[str], caption: str) -> Html | None:
    found = comparison.differing(items)
    shown = [
        [path, *(formats.setting(path.rpartition(".")[2], value) for value in found[path])]
        for path in found
        if comparison.worth_a_row(path, found)
    ]
    return table(("Setting", *names), shown, caption=caption) if shown else None


def _indented(row: Row) -> Html:
    return tag("span", row.name, style=f"padding-left: {row.depth}em")
