"""What finished runs report in common, in results.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from robustkit.core.errors import UserError
from robustkit.reporting.comparison import in_order
from robustkit.reporting.paper.finished import FinishedRun


def common_attacks(runs: Sequence[FinishedRun]) -> list[str]:
    """Keys of all that all runs have besides "clean", as tables show them; those of another ball ("l2/...") are not.

    Raises:
        UserError: there are none, or "clean" is missing.
    """
    common = set.intersection(*(set(run.results) for run in runs))
    common = {key for key in common if "/" not in key}
    if "clean" not in common or len(common) < 2:
        lacking = next((run for run in runs if not {"clean"} < set(run.results)), runs[-1])
        remedy = f"robustkit eval {lacking.folder} --suite standard"
        raise UserError("the runs have no clean and robust measure in common", place=str(lacking.folder), remedy=remedy)
    return in_order(common - {"clean"})


def hardest(runs: Sequence[FinishedRun], keys: Iterable[str]) -> str:
    """The measure that leaves the least, on average over the runs."""
    return min(keys, key=lambda key: statistics.fmean(run.results[key]["accuracy"] for run in runs))


def entry_of(run: FinishedRun, key: str) -> dict[str, Any]:
    """Accuracy, number of images and 95 % interval."""
    entry = run.results[key]
    return {name: entry[name] for name in ("accuracy", "n", "ci95")}
