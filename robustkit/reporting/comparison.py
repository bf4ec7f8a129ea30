"""How recipes and runs differ: settings, results, and whether a difference in results is more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from rich.console import Console

from robustkit.core.recipe import Recipe, load_recipe, result_key
from robustkit.core.spec import canonical, digest, evolve, flatten, to_json
from robustkit.core.strategy import Measure, ThreatModel
from robustkit.evaluation import Clean, statistics
from robustkit.evaluation.statistics import LEVEL, Interval, Spread
from robustkit.folder import CHECKPOINTS, read_outcomes, read_results
from robustkit.opening import recipe_of
from robustkit.reporting import consoles, formats
from robustkit.reporting.tables import columns, plain_table, position, print_results
from robustkit.sweep import with_sweeps

ABSENT = "-"

Basis = Literal["same images", "different images", "seeds", "not alike"]
BASES: dict[Basis, str] = {
    "same images": "One seed each: the test is about these two networks on these images, not about the methods.",
    "different images": "No p: no outcomes of the same images are at hand; intervals take the two as independent.",
    "seeds": "Means over seeds, by Welch's t. One seed on a side, or no spread at all, resolves nothing.",
    "not alike": "Not alike: attacked in another ball, or in another way, so that the two say different things. "
    "`robustkit eval RUN --curves epsilon` measures both at equal radii.",
}
"""What a reader should know of each."""


@attrs.frozen
class Item:
    """A recipe, and what its run found, if it is a run."""

    path: str
    recipe: Recipe
    is_run: bool
    results: dict[str, Any]
    outcomes: dict[str, dict[str, dict[str, str]]] = attrs.field(factory=dict)

    @property
    def has_best(self) -> bool:
        """Whether the best checkpoint was measured and is not the last one."""
        best = self.results.get("best")
        return bool(best) and best != self.results.get("last")

    def entry(self, checkpoint: str, key: str) -> dict[str, Any]:
        """A measure's result; the best checkpoint's is the last one's where they are the same."""
        found: dict[str, Any] = self.results["best" if checkpoint == "best" and self.has_best else "last"][key]
        return found

    def keys(self, checkpoint: str) -> set[str]:
        return set(self.results.get("best" if checkpoint == "best" and self.has_best else "last") or ())

    def attacked(self, key: str) -> tuple[ThreatModel | None, Measure | None]:
        """In which ball a measure attacks, and how, whatever the number of images; None where that cannot be said.

        Clean images have no ball, and what `robustkit eval --suite` asked for is not in the recipe.
        """
        for suite, measure in self.recipe.measures():
            if result_key(suite, measure) == key:
                alike = evolve(measure, images=None) if hasattr(measure, "images") else measure
                return None if isinstance(measure, Clean) else suite.threat or self.recipe.threat, alike
        return None if key == "clean" or "/" in key else self.recipe.threat, None

    def right(self, checkpoint: str, key: str) -> tuple[str, str] | None:
        """Fingerprint of the images and outcome of each, if they belong to the result."""
        saved = self.outcomes.get("best" if checkpoint == "best" and self.has_best else "last", {}).get(key)
        entry = self.entry(checkpoint, key)
        if saved is None or (len(saved["right"]), saved["right"].count("1")) != (entry["n"], right_in(entry)):
            return None
        return saved["images"], saved["right"]


@attrs.frozen
class Group:
    """Runs of one recipe, each with its own seed."""

    name: str
    runs: tuple[Item, ...]

    def accuracies(self, checkpoint: str, key: str) -> list[float]:
        return [float(run.entry(checkpoint, key)["accuracy"]) for run in self.runs]


@attrs.frozen
class Difference:
    """First group minus second, in one measure of one checkpoint, and what that rests on.

    "same images": image by image, one network each (exact McNemar test, Tango's interval). "different images": two
    independent results (Newcombe's interval, no test). "seeds": means over seeds (Welch); no interval with one seed on
    a side. "not alike": they were attacked in different balls, or by different attacks; nothing but the difference.
    """

    first: Group
    second: Group
    checkpoint: str
    key: str
    basis: Basis
    value: float
    ci95: Interval | None
    p: float | None = None
    only_first: int | None = None
    only_second: int | None = None

    @property
    def verdict(self) -> str:
        """In words."""
        return "not alike" if self.basis == "not alike" else "resolved" if self.resolved else "not resolved"

    @property
    def resolved(self) -> bool:
        """Whether the data tell the two apart: p below 0.05; where there is no test, an interval without zero."""
        if self.p is not None:
            return self.p < LEVEL
        return self.ci95 is not None and not self.ci95[0] <= 0 <= self.ci95[1]


@attrs.frozen
class Comparison:
    """Recipes and runs side by side; a notebook shows it as `robustkit compare` prints it."""

    items: tuple[Item, ...]

    @property
    def differences(self) -> list[Difference]:
        """The first run minus each other one, in each measure that both have; runs of one recipe are taken together."""
        return list(differences(groups(self.items)))

    def to_json(self) -> dict[str, Any]:
        return to_data(self.items)

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(item.path for item in self.items)}"

    def _repr_html_(self) -> str:
        return consoles.as_html(lambda console: print_comparison(console, self.items))


def compare(*paths: str | Path) -> Comparison:
    """Run folders, recipe files or recipes' JSON, compared with the first; a sweep's folder stands for its runs.

    Raises:
        UserError: one is none of these, or a sweep has no run that was measured.
    """
    return Comparison(tuple(load_item(path) for path in with_sweeps([str(path) for path in paths])))


def load_item(path: str) -> Item:
    """A run folder, a recipe file, or a recipe's JSON.

    Raises:
        UserError: it is none of these.
    """
    folder = Path(path)
    if folder.is_dir():
        return Item(path, recipe_of(folder), True, read_results(folder), read_outcomes(folder))
    return Item(path, load_recipe(path), False, {})


def right_in(entry: dict[str, Any]) -> int:
    """How many images the model got right."""
    return round(float(entry["accuracy"]) * int(entry["n"]))


def but_for_seed(recipe: Recipe) -> str:
    """Equal for recipes that differ in their seed alone, whatever their controls."""
    return canonical(evolve(recipe, seed=0, control=None))


# Settings


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


def worth_a_row(path: str, found: dict[str, list[Any]]) -> bool:
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


# Results


def groups(items: Sequence[Item]) -> list[Group]:
    """Runs with results, those of one recipe but for its seed together. Of one recipe and seed the first run counts."""
    names = short_names([item.path for item in items])
    found: dict[str, dict[int, tuple[str, Item]]] = {}
    for name, item in zip(names, items, strict=True):
        if item.results:
            seeds = found.setdefault(but_for_seed(item.recipe), {})
            seeds.setdefault(item.recipe.seed, (name, item))
    made = []
    for seeds in found.values():
        (first, *others), runs = zip(*seeds.values(), strict=True)
        made.append(Group(f"{first} (+{len(others)})" if others else first, runs))
    return made


def spreads(group: Group) -> Iterator[tuple[str, str, Spread]]:
    """(checkpoint, key, spread) of each measure that all runs of a group have; nothing for one run."""
    if len(group.runs) > 1:
        for checkpoint, key in _common(group.runs):
            yield checkpoint, key, statistics.spread(group.accuracies(checkpoint, key))


def differences(found: Sequence[Group]) -> Iterator[Difference]:
    """The first group minus each other one, in each measure that both have."""
    for other in found[1:]:
        for checkpoint, key in _common([*found[0].runs, *other.runs]):
            yield _difference(found[0], other, checkpoint, key)


def _difference(first: Group, second: Group, checkpoint: str, key: str) -> Difference:
    balls, attacks = zip(*(run.attacked(key) for group in (first, second) for run in group.runs), strict=True)
    if any(len(set(known) - {None}) > 1 for known in (balls, attacks)):
        means = [statistics.spread(group.accuracies(checkpoint, key)).mean for group in (first, second)]
        return Difference(first, second, checkpoint, key, "not alike", means[0] - means[1], None)
    if len(first.runs) > 1 or len(second.runs) > 1:
        a, b = first.accuracies(checkpoint, key), second.accuracies(checkpoint, key)
        test = statistics.welch(a, b)
        value = statistics.spread(a).mean - statistics.spread(b).mean
        ci95, p = (None, None) if test is None else (test.ci95, test.p)
        return Difference(first, second, checkpoint, key, "seeds", value, ci95, p)
    one, two = (group.runs[0].entry(checkpoint, key) for group in (first, second))
    a_right, b_right = (group.runs[0].right(checkpoint, key) for group in (first, second))
    if a_right is not None and b_right is not None and a_right[0] == b_right[0]:
        pair = statistics.paired(a_right[1], b_right[1])
        counts = pair.only_first, pair.only_second
        return Difference(first, second, checkpoint, key, "same images", pair.difference, pair.ci95, pair.p, *counts)
    ci95 = statistics.independent(right_in(one), one["n"], right_in(two), two["n"])
    return Difference(first, second, checkpoint, key, "different images", one["accuracy"] - two["accuracy"], ci95)


def _common(runs: Sequence[Item]) -> Iterator[tuple[str, str]]:
    """(checkpoint, key) of what all runs have measured; best only where it is not the last everywhere."""
    for checkpoint in CHECKPOINTS:
        if checkpoint == "last" or any(run.has_best for run in runs):
            for key in in_order(set.intersection(*(run.keys(checkpoint) for run in runs))):
                yield checkpoint, key


def in_order(keys: set[str]) -> list[str]:
    """Keys as tables show them."""
    return sorted(keys, key=position)


def to_data(items: Sequence[Item]) -> dict[str, Any]:
    """The comparison as JSON data."""
    found = groups(items)
    return {
        "compared": [{"path": i.path, "digest": digest(i.recipe), "results": i.results} for i in items],
        "differing": differing(items),
        "seeds": [
            {"runs": _paths(group), "checkpoint": checkpoint, "measure": key, **attrs.asdict(spread)}
            for group in found
            for checkpoint, key, spread in spreads(group)
        ],
        "differences": [
            {
                "first": _paths(d.first),
                "second": _paths(d.second),
                "checkpoint": d.checkpoint,
                "measure": d.key,
                "basis": d.basis,
                "difference": d.value,
                "ci95": d.ci95,
                "p": d.p,
                "only_first": d.only_first,
                "only_second": d.only_second,
                "resolved": d.resolved,
            }
            for d in differences(found)
        ],
    }


def _paths(group: Group) -> list[str]:
    return [run.path for run in group.runs]


# Printing


def print_comparison(console: Console, items: Sequence[Item]) -> None:
    """Settings that differ; then, of those that are runs, the results side by side, over seeds, and their differences.

    Runs of one recipe but for the seed are one group.
    """
    names = short_names([item.path for item in items])
    found = differing(items)
    if found:
        table = plain_table("Setting", *names, title="Settings that differ")
        for path in (path for path in found if worth_a_row(path, found)):
            values = found[path]
            table.add_row(path, *(formats.setting(path.rpartition(".")[2], value) for value in values))
        console.print(table)
    else:
        console.print("The recipes are equal.")
    if any(item.is_run for item in items):
        pairs = zip(names, items, strict=True)
        shown = [column for name, item in pairs for column in columns(name, item.results)]
        print_results(console, shown, title="Results")
        _print_spreads(console, groups(items))
        print_differences(console, list(differences(groups(items))))


def _print_spreads(console: Console, found: Sequence[Group]) -> None:
    table = plain_table("Runs", "Measure", title="Over seeds")
    for heading in ("Seeds", "Mean and sd, %", "Interval of the mean (95 %)"):
        table.add_column(heading, justify="right")
    said = ""
    for group in found:
        for checkpoint, key, spread in spreads(group):
            assert spread.sd is not None
            runs, mean = f"{group.name}, {checkpoint}", f"{formats.percent(spread.mean)} ± {100 * spread.sd:.2f}"
            interval = "" if spread.ci95 is None else _interval(spread.ci95)
            table.add_row("" if runs == said else runs, key, str(spread.n), mean, interval)
            said = runs
    if table.row_count:
        console.print(table)


def print_differences(console: Console, found: Sequence[Difference]) -> None:
    """A row for each, and what it rests on."""
    if not found:
        return
    table = plain_table("First minus second", "Measure", title="Differences")
    for heading in ("Points  (95 %)", "Right in one only", "p"):
        table.add_column(heading, justify="right")
    table.add_column("Verdict")
    said = ""
    for d in found:
        runs = f"{d.first.name} - {d.second.name}, {d.checkpoint}"
        table.add_row(
            "" if runs == said else runs,
            d.key,
            f"{100 * d.value:+.1f}  {'' if d.ci95 is None else _interval(d.ci95):>14}",
            "" if d.only_first is None else f"{d.only_first} : {d.only_second}",
            "" if d.p is None else f"{d.p:#.3g}" if d.p >= 0.001 else "< 0.001",
            d.verdict,
        )
        said = runs
    console.print(table)
    for basis in dict.fromkeys(d.basis for d in found):
        console.print(BASES[basis], style="dim")


def _interval(shares: Interval) -> str:
    """'(-1.2 to 3.4)' in per cent."""
    return f"({formats.percent(shares[0])} to {formats.percent(shares[1])})"


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [str(Path(*p[shared:])) for p in parts]
