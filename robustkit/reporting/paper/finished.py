"""A finished run as figures see it: what it was, what it found, and measures that are made once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from robustkit.core import checkpoint as checkpoints
from robustkit.core.errors import CheckpointError, UserError
from robustkit.core.recipe import Recipe
from robustkit.core.spec import digest, to_json
from robustkit.core.strategy import Measure, Subject, ThreatModel
from robustkit.core.world import World
from robustkit.data.images import Data
from robustkit.display import RunDisplay, Silent
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.evaluate import judge_slices, ledger_of, opened, rows_of
from robustkit.evaluation.ledger import Ledger
from robustkit.evaluation.sources import OwnImages
from robustkit.folder import read_metrics, read_results
from robustkit.loading import Classifier, load
from robustkit.lock import locked
from robustkit.opening import make_world, recipe_of
from robustkit.reporting.comparison import short_names
from robustkit.reporting.curves import stored
from robustkit.reporting.paper.panels import radius_in_words

SEED = 0
"""Of everything that is random: the one of `robustkit eval`."""


@attrs.frozen
class Judged:
    """Which test images a run got right: "1" for each that it did, and a fingerprint of the images in their order.

    `shares` are further shares of them, by stage, of measures that have some.
    """

    images: str
    right: str
    shares: dict[str, dict[str, float]] = attrs.field(factory=dict)


@attrs.define(eq=False, slots=False)
class FinishedRun:
    """A checkpoint of a run whose training is over. `name` is its path without what all runs share.

    `images` bounds how many test images are measured on (None: all of them).
    """

    folder: Path
    name: str
    recipe: Recipe
    checkpoint: str
    facts: dict[str, Any]
    images: int | None = None
    device: str | None = None
    display: RunDisplay = attrs.field(factory=Silent)

    @cached_property
    def data(self) -> Data:
        return self.recipe.data.load()

    @cached_property
    def model(self) -> Classifier:
        return load(self.folder, self.checkpoint, make_world(self.recipe, self.device).device)

    @property
    def results(self) -> dict[str, Any]:
        """Of this checkpoint, in results.json: {key: {"accuracy", "n", "ci95", ...}}."""
        return dict(read_results(self.folder).get(self.checkpoint) or {})

    def ball(self, usual: ThreatModel) -> ThreatModel:
        """The ball of that norm that its results are reported in; `usual` where they are in none."""
        suites = (suite.threat for suite in self.recipe.evaluation)
        balls = (ball for ball in (self.recipe.threat, *suites) if ball is not None)
        return next((ball for ball in balls if ball.norm == usual.norm), usual)

    def metrics(self) -> list[dict[str, Any]]:
        """The reports of its epochs, as metrics.jsonl has them."""
        return read_metrics(self.folder)

    def tensors(self) -> dict[str, Tensor]:
        """All that the checkpoint holds, strategies' state included, on the CPU."""
        return checkpoints.read(self.folder / "checkpoints" / f"{self.checkpoint}.safetensors")[0]

    @contextmanager
    def opened(self, threat: ThreatModel) -> Iterator[tuple[Subject, OwnImages, World]]:
        """The model as measures see it, and its test images."""
        source = OwnImages(self.data.test)
        with opened(self.model, source, threat, None) as (subject, world):
            yield subject, source, world

    def judged(self, measure: Measure, threat: ThreatModel) -> Judged:
        """What a measure finds in that ball. It is made once; one that was killed goes on where it was."""
        radius = "" if isinstance(measure, Clean) else f" at {radius_in_words(threat.norm, threat.epsilon)}"
        shown, key = f"{self.name}, {self.checkpoint}", f"{measure.key}{radius}"
        begun: list[Ledger] = []

        def judge() -> dict[str, Any]:
            with self.opened(threat) as (subject, source, world):
                rows, size = rows_of(measure, self.images, len(source)), self.recipe.batch_size
                weights, folder = self.facts["sha256"], self.folder / "evaluation"
                begun.append(ledger_of(folder, weights, measure, threat, rows, size, SEED, False, world))
                result = judge_slices(
                    measure,
                    subject,
                    source,
                    rows,
                    world,
                    seed=SEED,
                    batch_size=size,
                    ledger=begun[0],
                    watch=lambda _, news: self.display.measuring(shown, key, news),
                )
            assert result is not None  # nobody stops it
            shares = {"shares": result.shares} if result.shares else {}
            return {"threat": to_json(threat), "accuracy": result.accuracy} | result.outcomes_to_json() | shares

        found = self.remember(measure.key, [to_json(measure), to_json(threat)], judge)
        for ledger in begun:
            ledger.remove()
        return Judged(found["images"], found["right"], found.get("shares", {}))

    def remember(self, what: str, facts: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, which is JSON; kept in figures.json for this checkpoint, these images and `facts`.

        Raises:
            InUseError: it is to be made, and another process works on the run.
        """
        store = self.folder / "figures.json"
        key = digest([what, self.facts["sha256"], SEED, self.images, facts])
        held = stored(store)
        if not isinstance(held.get(key), dict):
            with locked(self.folder, self.display.say):
                held = stored(store) | {
                    key: {"what": what, "checkpoint": self.checkpoint, "limit": self.images, **make()}
                }
                checkpoints.write_text(store, json.dumps(held, indent=1, sort_keys=True) + "\n")
        kept: dict[str, Any] = held[key]
        return kept


def open_runs(
    paths: Sequence[str],
    *,
    checkpoint: str = "last",
    images: int | None = None,
    device: str | None = None,
    display: RunDisplay | None = None,
) -> tuple[FinishedRun, ...]:
    """The runs in those folders; neither data nor weights are loaded yet.

    Raises:
        UserError: one of them is no run, is not finished, or has no such checkpoint.
    """
    made = []
    for path, name in zip(paths, short_names(paths), strict=True):
        folder = Path(path)
        recipe = recipe_of(folder)
        last = checkpoints.facts_of(folder / "checkpoints" / "last.safetensors", epoch=int, best=dict)
        _refuse_unfinished(folder, recipe, last)
        file = folder / "checkpoints" / f"{checkpoint}.safetensors"
        if not file.is_file():
            remedy = "give --checkpoint last: without held-out images there is no best"
            raise CheckpointError(f"has no checkpoint '{checkpoint}'", place=path, remedy=remedy)
        facts = checkpoints.facts_of(file, sha256=str)
        made.append(FinishedRun(folder, name, recipe, checkpoint, facts, images, device, display or Silent()))
    return tuple(made)


def _refuse_unfinished(folder: Path, recipe: Recipe, last: dict[str, Any]) -> None:
    if last["epoch"] < recipe.epochs and not recipe.validation.ended_by(last["best"]):
        fault = f"training is not finished: {last['epoch']} of {recipe.epochs} epochs are done"
        raise UserError(fault, place=str(folder), remedy=f"robustkit resume {folder}")


def on_the_same_images(first: FinishedRun, one: Judged, second: FinishedRun, two: Judged) -> None:
    """Raises UserError where what was found of two runs was not found on the same test images."""
    if one.images != two.images:
        fault = f"is not judged on the test images of {first.folder}"
        raise UserError(fault, place=str(second.folder), remedy="give runs on the same data")


def on_the_same_data(runs: Sequence[FinishedRun]) -> None:
    """Raises UserError where runs cannot have the same test images: they differ in classes or in image shape."""
    first, *others = runs
    for other in others:
        for fact in ("classes", "image_shape"):
            if fact in first.facts and fact in other.facts and first.facts[fact] != other.facts[fact]:
                fault = f"is not on the data of {first.folder}: {fact.replace('_', ' ')} differ"
                raise UserError(fault, place=str(other.folder), remedy="give runs on the same data")
