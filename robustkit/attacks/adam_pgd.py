"""Projected ascent by Adam."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustkit.attacks.climb import repeatedly
from robustkit.attacks.pgd import refuse_misfits
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Objective, Predict, Reference, ThreatModel
from robustkit.objectives.cross_entropy import CrossEntropyObjective


@registry("attack").register("adam-pgd")
@spec
class AdamPGD:
    """Steps of Adam up the objective, each projected to the ball and the box (Gowal et al. 2020; Rebuffi et al. 2021).

    `lr` is in pixels, and the rate of the first `drop` steps; those after them have a tenth of it. Moments are of the
    gradients themselves, 0.9 and 0.999, and start anew for each batch. From a uniform point of the ball. A step size
    or a number of steps in the budget is not used.
    """

    steps: int = setting(default=10, at_least=1)
    lr: float = setting(default=0.1, above=0)
    drop: int = setting(default=5, at_least=0)
    objective: Objective = CrossEntropyObjective()
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0

    def check(self, recipe: Recipe) -> None:
        """Refuse an objective that compares with adversarial images that are not there yet."""
        refuse_misfits(self, self.objective, None, recipe)

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        with predict.using(self.mode) as predict:
            reference = Reference()
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = Reference(natural=predict(x))

            def search(start: Tensor, x: Tensor, y: Tensor, reference: Reference, epsilon: Tensor) -> Tensor:
                x_adv = start
                first = second = torch.zeros_like(x)  # the moments
                for number in range(1, self.steps + 1):
                    with torch.enable_grad():
                        images = x_adv.detach().requires_grad_()
                        value = self.objective(predict(images), y, reference)
                        (gradient,) = torch.autograd.grad(value.sum(), images)
                    first, second = first.lerp(gradient, 0.1), second.lerp(gradient.square(), 0.001)
                    spread = (second / (1 - 0.999**number)).sqrt() + 1e-9  # gradients are small: as the authors' code
                    lr = self.lr if number <= self.drop else self.lr / 10
                    x_adv = threat.project(x_adv.detach() + lr * first / (1 - 0.9**number) / spread, x, epsilon)
                return x_adv.detach()

            start = threat.random(x, budget.epsilon, generator)
            found = (start, x, y, reference, budget.epsilon)
            return repeatedly(predict, ("adam-pgd", self, threat), search, found)

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps + self.objective.needs_reference, input_backward=self.steps)
