"""Who watches a run: what a display is told, and one that shows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from robustkit.core.batch import Progress
from robustkit.core.loop import Display
from robustkit.core.parts import Parts, Totals
from robustkit.core.recipe import Recipe

if TYPE_CHECKING:
    from robustkit.evaluation.evaluate import News


class RunDisplay(Display, Protocol):
    """Who watches a run."""

    def begin(self, recipe: Recipe, folder: Path, parts: Parts) -> None: ...

    def measuring(self, checkpoint: str, key: str, news: News) -> None: ...

    def say(self, text: str) -> None: ...

    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, recipe: Recipe, folder: Path, parts: Parts) -> None: ...

    def step(self, progress: Progress, totals: Totals) -> None: ...

    def epoch(self, report: dict[str, Any]) -> None: ...

    def measuring(self, checkpoint: str, key: str, news: News) -> None: ...

    def say(self, text: str) -> None: ...

    def end(self) -> None: ...
