"""Runs in TensorBoard, Weights & Biases, MLflow and others, by accelerate's trackers.

The run's folder stays the only source: a tracker is given the rows of metrics.jsonl and, at the end, what results.json
holds. `trackers.json` in the folder says how much it has. TensorBoard, W&B and MLflow go on with their run where a run
is resumed, and see no row twice; to the others it is a new run of theirs, which gets all rows from the first.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robustkit.core.checkpoint import write_text
from robustkit.core.errors import UserError
from robustkit.core.parts import Parts
from robustkit.core.reading import read_object
from robustkit.core.recipe import Recipe
from robustkit.core.registry import hint
from robustkit.core.spec import flatten, to_json
from robustkit.display import RunDisplay, Silent
from robustkit.folder import read_metrics, read_results
from robustkit.reporting.together import Together

PROJECT = "robustkit"
STATE = "trackers.json"
_CONTINUING = ("tensorboard", "wandb", "mlflow")
_PACKAGES = {"comet_ml": "comet-ml"}


def watched_by(display: RunDisplay, names: Sequence[str]) -> RunDisplay:
    """The display, and a tracker of each of those names beside it; on the first of several processes.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    trackers = [Tracker(name, display) for name in dict.fromkeys(names)]
    return Together(display, *trackers) if trackers and os.environ.get("RANK", "0") == "0" else display


class Tracker(Silent):
    """One tracker, of a run and then of its control. `display` is told what goes wrong: training goes on."""

    def __init__(self, name: str, display: RunDisplay) -> None:
        self.name, self._class, self._display = name, _class_of(name), display
        self._folder = Path()
        self._state: dict[str, Any] = {}
        self._tracker: Any = None

    def begin(self, recipe: Recipe, folder: Path, parts: Parts) -> None:
        """Raises UserError where the tracker refuses to begin (no network, nobody logged in, ...)."""
        self.end()
        self._folder = folder
        known = _read_state(folder).get(self.name) if self.name in _CONTINUING else None
        self._state = known or {"rows": 0, "results": [], "id": uuid.uuid4().hex if self.name == "wandb" else None}
        try:
            self._tracker = self._class(*self._arguments()[0], **self._arguments()[1])
            self._tracker.start()
            if known is None:
                self._tracker.store_init_configuration(_settings(recipe))
            if self.name == "mlflow":
                self._state["id"] = self._tracker.tracker.info.run_id
        except Exception as error:
            self._tracker = None
            fault = f"{self.name} does not begin: {type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(fault, place="--log-with", remedy="mend that, or leave it out") from error
        self._catch_up()

    def epoch(self, report: dict[str, Any]) -> None:
        self._catch_up()

    def end(self) -> None:
        if self._tracker is None:
            return
        self._catch_up()
        tracker, self._tracker = self._tracker, None
        try:
            tracker.finish()
        except Exception as error:
            self._complain(error)

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        run, identity = str(self._folder), self._state["id"]
        if self.name == "tensorboard":
            return [self.name, self._folder], {}
        if self.name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            return [project], {"name": run, "id": identity, "resume": "allow", "dir": run}
        if self.name == "mlflow":
            return [], {"experiment_name": PROJECT, "run_name": run, "run_id": identity}
        return [PROJECT, *([self._folder] if self._class.requires_logging_directory else [])], {}

    def _catch_up(self) -> None:
        """Gives it what the folder has and it has not; what it fails to take it is given the next time."""
        if self._tracker is None:
            return
        try:
            rows = read_metrics(self._folder)
            for row in rows[self._state["rows"] :]:
                self._tracker.log(dict(_numbers(row)), step=row["step"])
                self._state["rows"] += 1
            new = {
                f"test/{checkpoint}/{key}": entry["accuracy"]
                for checkpoint, entries in read_results(self._folder).items()
                for key, entry in entries.items()
                if f"test/{checkpoint}/{key}" not in self._state["results"]
            }
            if new and rows:
                self._tracker.log(new, step=rows[-1]["step"])
                self._state["results"] += sorted(new)
        except Exception as error:
            self._complain(error)
        write_text(self._folder / STATE, json.dumps(_read_state(self._folder) | {self.name: self._state}) + "\n")

    def _complain(self, error: Exception) -> None:
        self._display.say(f"{self.name}: {type(error).__name__}: {error}; the run's folder has everything")


def _class_of(name: str) -> Any:
    tracking = importlib.import_module("accelerate.tracking")
    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise UserError(f"there is no tracker '{name}'", place="--log-with", remedy=hint(name, known))
    if name not in [available.value for available in tracking.get_available_trackers()]:
        remedy = f"pip install {_PACKAGES.get(name, name)}"
        raise UserError(f"{name} is not installed", place="--log-with", remedy=remedy)
    return tracking.LOGGER_TYPE_TO_CLASS[name]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings by their dotted paths, as values that every tracker takes."""
    found = {path: value for path, value in flatten(to_json(recipe)).items() if not path.startswith("control.")}
    return {
        path: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for path, value in found.items()
    }


def _numbers(data: dict[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """{"train": {"objective": 1.2}} as ("train/objective", 1.2); only numbers that stand for themselves."""
    for key, value in data.items():
        if isinstance(value, dict) and key != "radii":
            yield from _numbers(value, f"{path}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}{key}", value


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / STATE)
    except UserError:
        return {}
