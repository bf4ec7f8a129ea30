"""One radius for all images, always."""

from __future__ import annotations

from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("epsilon").register("fixed")
@spec
class Fixed:
    """One radius for all images: `value`, or the threat model's.

    `step_fraction` sets the step size as a share of the radius: 0.2 gives the rule of the other schedules (1.6/255 at
    8/255); None leaves it to the attack (2/255 at 8/255). Arms of one ablation want one rule.
    """

    value: float | None = setting(default=None, above=0)
    step_fraction: float | None = setting(default=None, above=0)

    @property
    def sets_step_size(self) -> bool:
        return self.step_fraction is not None

    def __call__(self, scene: Scene) -> Budget:
        x = scene.batch.x
        epsilon = x.new_full((len(x),), scene.threat.epsilon if self.value is None else self.value)
        return Budget(epsilon, None if self.step_fraction is None else epsilon * self.step_fraction)

    def passes(self, progress: Progress) -> Passes:
        return Passes()
