"""Attack images that take equally many steps together, apart from the others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Attack, Predict, ThreatModel


@registry("attack").register("grouped")
@spec
class Grouped:
    """Each group of images that take equally many steps in a call of `inner` of its own (as CAT does, IJCAI 2018).

    For budgets that give each image its number of steps: those that take none stay as they are, and nothing is computed
    for those that have stopped. In training mode a group has its own batch statistics. An image draws what it would
    draw in the whole batch. A budget without numbers of steps is `inner`'s as it stands.

    Who takes how many is asked of the device once per call.
    """

    inner: Attack = setting(default=PGD())
    waits: ClassVar[bool] = True

    def validate(self) -> None:
        if not hasattr(self.inner, "steps"):
            fault = f"must be an attack with a number of steps, {type(self.inner).__name__} has none"
            raise SpecError(fault, place="Grouped.inner", remedy="e.g. inner=pgd")

    def check(self, recipe: Recipe) -> None:
        """Refuse pieces of a batch in training mode."""
        if recipe.attack is self and self.mode != "eval" and recipe.accumulate > 1:
            raise RecipeError(
                "groups are attacked with their own batch statistics, and a piece of a batch has but a piece of each",
                place="accumulate",
                remedy="set accumulate=1, or attack.inner.mode=eval",
            )

    @property
    def reach(self) -> float:
        return self.inner.reach

    @property
    def mode(self) -> Mode:
        return getattr(self.inner, "mode", "eval")

    def at(self, progress: Progress) -> Grouped:
        return evolve(self, inner=self.inner.at(progress)) if hasattr(self.inner, "at") else self

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        if budget.steps is None:
            return self.inner(predict, x, y, budget, threat, generator)
        # Other processes may hold images of a group that has none here; its statistics are made by all of them.
        joins = self.mode != "eval" and len(x) < generator.part.total
        steps, x_adv = budget.steps.cpu(), x.clone()
        for count in range(1, budget.max_steps + 1):
            group = (steps == count).nonzero().squeeze(1).to(x.device, non_blocking=True)
            if len(group) or joins:
                attack, own = _taking(self.inner, count), _rows(budget, group)
                x_adv[group] = attack(predict, x[group], y[group], own, threat, generator.of(group))
        return x_adv

    def passes(self, progress: Progress) -> Passes:
        return self.inner.passes(progress)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """Nothing for parts of the batch that take no steps, few for those that take few."""
        if not hasattr(recipe.epsilon, "step_counts"):
            return self.passes(progress)
        counts: tuple[int, ...] = recipe.epsilon.step_counts
        groups = (_taking(self.inner, count).passes(progress) for count in counts if count)
        return sum(groups, Passes()) * (1 / len(counts))


def _taking(attack: Attack, steps: int) -> Attack:
    changes: dict[str, Any] = {"steps": steps}
    return evolve(attack, **changes)


def _rows(budget: Budget, rows: Tensor) -> Budget:
    """The budget of some images, that all take the attack's own number of steps."""
    values = (value[rows] if isinstance(value, Tensor) else value for value in budget)
    return Budget(*values)._replace(steps=None, max_steps=0)  # type: ignore[arg-type]
