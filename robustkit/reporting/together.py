"""Several displays of one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.core.batch import Progress
from robustkit.core.parts import Parts, Totals
from robustkit.core.recipe import Recipe
from robustkit.display import RunDisplay

if TYPE_CHECKING:
    from robustkit.evaluation.evaluate import News


class Together:
    """Tells all of `displays` what a run does, in their order."""

    def __init__(self, *displays: RunDisplay) -> None:
        self.displays = displays

    def begin(self, recipe: Recipe, folder: Path, parts: Parts) -> None:
        for display in self.displays:
            display.begin(recipe, folder, parts)

    def step(self, progress: Progress, totals: Totals) -> None:
        for display in self.displays:
            display.step(progress, totals)

    def epoch(self, report: dict[str, Any]) -> None:
        for display in self.displays:
            display.epoch(report)

    def measuring(self, checkpoint: str, key: str, news: News) -> None:
        for display in self.displays:
            display.measuring(checkpoint, key, news)

    def say(self, text: str) -> None:
        for display in self.displays:
            display.say(text)

    def end(self) -> None:
        for display in self.displays:
            display.end()
