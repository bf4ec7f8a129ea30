"""The radius grows by the same amount each epoch."""

from __future__ import annotations

from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("epsilon").register("linear")
@spec
class Linear:
    """From `first` in the first epoch to `last` in the last (ECAS, BMVC 2023, section 4.1; end points: our choice)."""

    first: float = setting(default=3 / 255, at_least=0)
    last: float = setting(default=12 / 255, at_least=0)
    step_fraction: float = setting(default=0.2, above=0)

    @property
    def sets_step_size(self) -> bool:
        return True

    def value(self, progress: Progress) -> float:
        """The radius of the epoch that `progress` stands in."""
        return self.first + (self.last - self.first) * progress.epoch / max(1, progress.epochs - 1)

    def __call__(self, scene: Scene) -> Budget:
        x = scene.batch.x
        epsilon = x.new_full((len(x),), self.value(scene.progress))
        return Budget(epsilon, epsilon * self.step_fraction)

    def passes(self, progress: Progress) -> Passes:
        return Passes()
