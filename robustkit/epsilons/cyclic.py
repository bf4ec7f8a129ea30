"""The radius runs through a list, again and again: a step each epoch, or each batch."""

from __future__ import annotations

from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.errors import SpecError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene

ECAS_VALUES = tuple(k / 255 for k in range(3, 13))
"""3/255 ... 12/255, the set of ECAS-PGD-AT."""


@registry("epsilon").register("cyclic")
@spec
class Cyclic:
    """`values[epoch mod L]` for all images: a sawtooth (ECAS, BMVC 2023, Eq. 2, as its code reads it)."""

    values: tuple[float, ...] = setting(default=ECAS_VALUES, at_least=0)
    step_fraction: float = setting(default=0.2, above=0)

    def validate(self) -> None:
        _refuse_empty(self.values, type(self).__name__)

    @property
    def sets_step_size(self) -> bool:
        return True

    def value(self, progress: Progress) -> float:
        """The radius of the epoch that `progress` stands in."""
        return self.values[progress.epoch % len(self.values)]

    def __call__(self, scene: Scene) -> Budget:
        x = scene.batch.x
        epsilon = x.new_full((len(x),), self.value(scene.progress))
        return Budget(epsilon, epsilon * self.step_fraction)

    def passes(self, progress: Progress) -> Passes:
        return Passes()


@registry("epsilon").register("cyclic-batch")
@spec
class CyclicBatch:
    """`values[step mod L]` for all images, the step counted over the whole run (ECAS, BMVC 2023, section 4.1)."""

    values: tuple[float, ...] = setting(default=ECAS_VALUES, at_least=0)
    step_fraction: float = setting(default=0.2, above=0)

    def validate(self) -> None:
        _refuse_empty(self.values, type(self).__name__)

    @property
    def sets_step_size(self) -> bool:
        return True

    def value(self, progress: Progress) -> float:
        """The radius of the step that `progress` stands at."""
        return self.values[progress.step % len(self.values)]

    def __call__(self, scene: Scene) -> Budget:
        x = scene.batch.x
        epsilon = x.new_full((len(x),), self.value(scene.progress))
        return Budget(epsilon, epsilon * self.step_fraction)

    def passes(self, progress: Progress) -> Passes:
        return Passes()


def _refuse_empty(values: tuple[float, ...], name: str) -> None:
    if not values:
        raise SpecError("must hold at least one radius", place=f"{name}.values")
