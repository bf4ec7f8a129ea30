"""The rate drops at given epochs."""

from __future__ import annotations

import math

from robustkit.core.batch import Progress
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Rates


@registry("schedule").register("multi-step")
@spec
class MultiStep:
    """Times `factor` once so many epochs are done: each of `at` an epoch, or a fraction of training below 1.

    Each drop may have a `factor` of its own.
    """

    at: tuple[float, ...] = setting(default=(0.5, 0.75), above=0)
    factor: float | tuple[float, ...] = setting(default=0.1, above=0)

    def validate(self) -> None:
        if isinstance(self.factor, tuple) and len(self.factor) != len(self.at):
            fault = f"{len(self.at)} drops need as many factors, got {len(self.factor)}"
            raise SpecError(fault, place="MultiStep.factor", remedy="or give one for all, e.g. factor=0.1")

    def check(self, recipe: Recipe) -> None:
        """Refuse drops beyond the end."""
        late = [f"{at:g}" for at in self.at if at >= 1 and at > recipe.epochs]
        if late:
            raise RecipeError(
                f"drops at epoch {', '.join(late)}, but training ends after {recipe.epochs}",
                place="schedule.at",
                remedy="use fractions of training, e.g. schedule.at=0.9,0.95",
            )

    def __call__(self, progress: Progress) -> Rates:
        done = [progress.step >= self._step(at, progress) for at in self.at]
        if isinstance(self.factor, tuple):
            passed = [factor for factor, past in zip(self.factor, done, strict=True) if past]
            return Rates(math.prod(passed, start=1.0))
        return Rates(self.factor ** sum(done))

    def _step(self, at: float, progress: Progress) -> int:
        epochs = at * progress.epochs if at < 1 else at
        return int(epochs * progress.steps_per_epoch + 1e-6)  # 0.29 * 100 is a little less than 29
