"""Any attack within a ball of its own: train on other perturbations than those that are judged."""

from __future__ import annotations

from torch import Tensor

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.recipe import Recipe, passes_in
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, spec
from robustkit.core.strategy import Attack, Predict, ThreatModel
from robustkit.threats.l2 import L2


@registry("attack").register("within")
@spec
class Within:
    """The attack `inner` in the ball of `threat` instead of the recipe's.

    An image whose budget is the recipe's epsilon gets the radius `threat.epsilon`, others as many times that as they
    have of the recipe's; so do step sizes of the budget. Settings of `inner` are in the unit of `threat`.
    """

    threat: ThreatModel = L2()
    inner: Attack = PGD()

    @property
    def reach(self) -> float:
        return self.inner.reach

    @property
    def mode(self) -> Mode:
        mode: Mode = getattr(self.inner, "mode", "eval")
        return mode

    @property
    def stops_early(self) -> bool:
        return bool(getattr(self.inner, "stops_early", False))

    def at(self, progress: Progress) -> Within:
        return evolve(self, inner=self.inner.at(progress)) if hasattr(self.inner, "at") else self

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        scale = self.threat.epsilon / threat.epsilon
        step_size = None if budget.step_size is None else scale * budget.step_size
        budget = budget._replace(epsilon=scale * budget.epsilon, step_size=step_size)
        return self.inner(predict, x, y, budget, self.threat, generator)

    def passes(self, progress: Progress) -> Passes:
        return self.inner.passes(progress)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """What `inner` costs there."""
        return passes_in(self.inner, recipe, progress)
