"""Where a run comes from and how to repeat it: environment, seeds, commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustkit.core.spec import flatten
from robustkit.reporting import formats
from robustkit.reporting.report import words
from robustkit.reporting.report.html import Html, commands, joined, missing, table, tag
from robustkit.reporting.report.stored import StoredRun


def environment(runs: Sequence[StoredRun]) -> Html:
    found = [_flat(run.environment) for run in runs]
    keys = list(dict.fromkeys(key for facts in found for key in facts))
    if not keys:
        return missing("environment.json is not there, or cannot be read: versions and device are not known.")
    rows = [[key, *(facts.get(key, "") for facts in found)] for key in keys]
    return table(("What", *(run.name for run in runs)), rows, caption="Versions, device, data and command")


def _flat(facts: dict[str, Any]) -> dict[str, str]:
    """Facts as text; words of the command in one line."""
    said = {}
    for key, value in flatten(facts).items():
        if isinstance(value, list):
            said[key] = shlex.join(map(str, value))
        else:
            said[key] = formats.setting("", value) if value is not None else "none"
    return said


def seeds(runs: Sequence[StoredRun]) -> Html:
    rows = []
    for run in runs:
        rows.append([run.name, f"{run.recipe.seed}"])
        if run.recipe.control is not None:
            rows.append([f"{run.name}, control", f"{run.recipe.control.seed}"])
    said = "All that is drawn at random follows from the recipe's seed; a resumed run draws what it would have drawn."
    return joined([table(("Run", "Seed"), rows, caption="Seeds", numbers=True), tag("p", said, class_="note")])


def repeat(runs: Sequence[StoredRun]) -> Html:
    parts = []
    for run in runs:
        parts.append(tag("h3", run.name) if len(runs) > 1 else None)
        parts.append(commands(*_lines(run)))
    return joined(parts)


def _lines(run: StoredRun) -> list[str]:
    """From the recipe's file where that is known, and from the folder, which has all settings."""
    lines = []
    packages = run.environment.get("packages")
    versions = {name: v for name, v in packages.items() if isinstance(v, str)} if isinstance(packages, dict) else {}
    if versions:
        lines.append(shlex.join(["pip", "install", *(f"{name}=={version}" for name, version in versions.items())]))
    if isinstance(commit := run.environment.get("git_commit"), str):
        lines.append(shlex.join(["git", "checkout", commit]))
    source, overrides = run.environment.get("source"), run.environment.get("overrides")
    if isinstance(source, str):
        changes = [word for word in overrides if isinstance(word, str)] if isinstance(overrides, list) else []
        lines.append(words.command("run", source, *changes))
    again = str(Path(run.path).with_name(f"{Path(run.path).name}-again"))
    lines.append(f"{words.command('run', run.path, '--out', again)}  # the same from the folder's recipe.json")
    if not run.finished:
        lines.append(words.command("resume", run.path))
    lines.append(words.command("eval", run.path, "--again"))
    lines.append(words.command("audit", run.path))
    lines.append(words.command("report", run.path))
    return lines
