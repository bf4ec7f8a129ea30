"""Projected gradient descent."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustkit.attacks.climb import climb, most_steps, repeatedly, step_sizes
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, setting, spec, walk
from robustkit.core.strategy import Attack, Objective, Predict, Reference, ThreatModel
from robustkit.objectives.cross_entropy import CrossEntropyObjective


@registry("attack").register("pgd")
@spec
class PGD:
    """Projected gradient ascent of an objective (Madry et al. 2018).

    `step_size` in pixels; None takes the budget's, else epsilon / 4. `start`: "uniform" in the ball and the box,
    "gaussian" (x + `noise` N(0, 1), unclipped: TRADES), or "clean". `start_epsilon` starts all images in a ball of that
    radius instead of their own, and `final_epsilon` clips the result (both: the code of ECAS-AWP). `mode` is the
    model's mode during the attack.
    """

    steps: int = setting(default=10, at_least=0)
    step_size: float | None = setting(default=None, above=0)
    objective: Objective = CrossEntropyObjective()
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    noise: float = setting(default=0.001, at_least=0)
    start_epsilon: float | None = setting(default=None, above=0)
    final_epsilon: float | None = setting(default=None, above=0)
    mode: Mode = "eval"

    @property
    def reach(self) -> float:
        return 1.0

    def check(self, recipe: Recipe) -> None:
        """Refuse two step sizes, and an objective that compares with adversarial images that are not there yet."""
        refuse_misfits(self, self.objective, self.step_size, recipe)

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        y: Tensor,
        budget: Budget,
        threat: ThreatModel,
        generator: Generator,
        *,
        reference: Reference | None = None,
    ) -> Tensor:
        """Adversarial images; `reference` where the caller has it already (inverse targets do)."""
        steps = self.steps if budget.steps is None else budget.max_steps
        with predict.using(self.mode) as predict:
            if reference is None:
                reference = Reference()
                if self.objective.needs_reference:
                    with torch.no_grad():
                        reference = Reference(natural=predict(x))

            def ascend(
                start: Tensor, x: Tensor, y: Tensor, reference: Reference, budget: Budget, step_size: Tensor
            ) -> Tensor:
                return climb(
                    lambda images: self.objective(predict(images), y, reference),
                    start,
                    x,
                    threat=threat,
                    epsilon=budget.epsilon,
                    step_size=step_size,
                    steps=steps,
                    steps_per_image=budget.steps,
                )

            found = (
                self._start(x, budget, threat, generator),
                x,
                y,
                reference,
                budget,
                step_sizes(self.step_size, budget),
            )
            result = repeatedly(predict, ("pgd", self, threat), ascend, found)
        if self.final_epsilon is not None:
            result = threat.project(result, x, budget.epsilon.clamp_max(self.final_epsilon))
        elif not steps:  # no step has brought the start into the ball and the box
            result = threat.project(result, x, budget.epsilon)
        return result

    def _start(self, x: Tensor, budget: Budget, threat: ThreatModel, generator: Generator) -> Tensor:
        if self.start == "gaussian":
            return x + self.noise * generator.normal(x)
        if self.start == "uniform":
            radius = budget.epsilon
            if self.start_epsilon is not None:
                radius = torch.full_like(radius, self.start_epsilon)
            return threat.random(x, radius, generator)
        return x.clone()

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps + self.objective.needs_reference, input_backward=self.steps)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """With as many steps as the epsilon schedule has it take at most, where it says."""
        return evolve(self, steps=most_steps(self.steps, recipe)).passes(progress)


def refuse_misfits(attack: Attack, objective: Objective, step_size: float | None, recipe: Recipe) -> None:
    """Raises RecipeError where `attack`, or the schedule of radii, says too much: see `PGD.check`."""
    if getattr(objective, "needs_adversarial", False):
        raise RecipeError(
            "the objective compares with adversarial images, which an attack has yet to find",
            place="attack.objective",
            remedy="another objective, e.g. attack.objective=cross-entropy",
        )
    path = next((path for path, part in walk(recipe.attack, "attack") if part is attack), "")
    if path and step_size is not None and recipe.epsilon.sets_step_size:
        raise RecipeError(
            "both the attack and the epsilon schedule set a step size",
            place=f"{path}.step_size",
            remedy=f"set {path}.step_size=none, or an epsilon schedule without step_fraction",
        )
