"""New strategy: how hard is each image attacked?"""

from __future__ import annotations

import math
from typing import ClassVar

from robustkit import registry, setting, spec
from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.strategy import Scene

__all__ = ["NewStrategy"]


@registry("epsilon").register("new-strategy")
@spec
class NewStrategy:
    """The radius rises along half a cosine from `start` times the threat model's to all of it, step by step."""

    start: float = setting(default=0.25, at_least=0, at_most=1)
    sets_step_size: ClassVar[bool] = False

    def __call__(self, scene: Scene) -> Budget:
        radius = scene.threat.epsilon * self.share(scene.progress)
        return Budget(scene.batch.x.new_full((len(scene.batch.x),), radius))

    def share(self, progress: Progress) -> float:
        """How much of the radius there is at this point of training."""
        risen = (1 - math.cos(math.pi * progress.step / max(1, progress.total_steps - 1))) / 2
        return self.start + (1 - self.start) * risen

    def passes(self, progress: Progress) -> Passes:
        return Passes()
