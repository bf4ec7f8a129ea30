"""What is exported: a run's checkpoint and all that is known of it, and what every form says of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from robustkit.core import checkpoint as checkpoints
from robustkit.core.errors import CheckpointError, UserError
from robustkit.core.reading import read_object
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.registry import registry
from robustkit.core.spec import digest
from robustkit.folder import read_outcomes, read_results
from robustkit.loading import read
from robustkit.opening import recipe_of


@attrs.frozen
class Source:
    """A run's checkpoint and all that is known of it."""

    name: str
    recipe: Recipe
    state: dict[str, Tensor]
    facts: dict[str, Any]
    results: dict[str, Any]
    images: dict[str, str]  # measure -> fingerprint of the test images it was taken on
    environment: dict[str, Any]

    @property
    def radius(self) -> str:
        """The threat model's radius as papers write it: 8/255 in L-infinity, else 0.5."""
        threat = self.recipe.threat
        units = threat.epsilon * 255
        return (
            f"{round(units)}/255"
            if threat.norm == "Linf" and abs(units - round(units)) < 1e-6
            else f"{threat.epsilon:g}"
        )

    @property
    def data(self) -> str:
        return registry("dataset").name_of(type(self.recipe.data)) or type(self.recipe.data).__name__

    @property
    def unfinished(self) -> bool:
        return bool(self.facts["checkpoint"] == "last" and self.facts["epoch"] < self.recipe.epochs)


def source_of(run: Path, checkpoint: str) -> Source:
    if not (run / "recipe.json").is_file():
        raise UserError("is not a run folder: it has no recipe.json", place=str(run))
    state, facts = read(run, checkpoint)
    checkpoints.facts_of(run / "checkpoints" / f"{checkpoint}.safetensors", step=int, epoch=int, best=dict)
    recipe = recipe_of(run)
    if facts["digest"] != digest(recipe):
        raise CheckpointError("belongs to another recipe than recipe.json", place=f"{run}, checkpoint '{checkpoint}'")
    environment = read_object(run / "environment.json")
    found = read_results(run).get(checkpoint, {})
    keys = [result_key(suite, measure) for suite, measure in recipe.measures()]
    results = {key: found[key] for key in dict.fromkeys([*keys, *found]) if key in found}  # in the recipe's order
    images = {key: entry["images"] for key, entry in read_outcomes(run).get(checkpoint, {}).items()}
    return Source(run.resolve().name, recipe, state, facts, results, images, environment)


def results_text(source: Source) -> str:
    if not source.results:
        return "None: this checkpoint was not measured. `robustkit eval RUN` measures it."
    lines = ["| measure | accuracy % (95 % interval) | test images |", "|---|---|---|"]
    notes = []
    for key, entry in source.results.items():
        low, high = (100 * bound for bound in entry["ci95"])
        lines.append(f"| {key} | {100 * entry['accuracy']:.2f} ({low:.1f}-{high:.1f}) | {entry['n']:,} |")
        if entry.get("breakdown"):
            stages = ", ".join(f"{name} {100 * share:.2f}" for name, share in entry["breakdown"].items())
            notes.append(f"- {key}, accuracy after each stage: {stages}")
        notes += [f"- {key}: {note}" for note in entry.get("notes", ())]
    most = max(entry["n"] for entry in source.results.values())
    if any(entry["n"] < most for entry in source.results.values()):
        notes.append("- measures on fewer images took a fixed random part of the test images")
    notes.append("- intervals (Wilson, 95 %) cover the choice of test images, not that of the seed")
    return "\n".join([*lines, "", *notes])


def selection_text(source: Source) -> str:
    """How the checkpoint was chosen."""
    recipe, facts = source.recipe, source.facts
    collapse = facts["best"].get("collapse")
    remark = "" if collapse is None else f"; robustness collapsed in epoch {collapse} (catastrophic overfitting)"
    if source.unfinished:
        return (
            f"Last checkpoint of a training that is not finished: epoch {facts['epoch']} of {recipe.epochs}, "
            f"step {facts['step']}{remark}"
        )
    if facts["checkpoint"] == "last":
        return f"Last checkpoint, after {recipe.epochs} epochs: nothing was selected{remark}"
    what = "natural" if recipe.attack is None or recipe.validation.attack is None else "robust"
    return (
        f"Best checkpoint, epoch {facts['best'].get('epoch')} of {recipe.epochs}: the highest {what} accuracy on "
        f"{recipe.validation.images:,} training images that were held out. Test images chose nothing"
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
