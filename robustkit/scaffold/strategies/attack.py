"""New strategy: how are adversarial images found?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.rng import Generator
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.functional import per_image
from robustkit.objectives import CrossEntropyObjective

__all__ = ["NewStrategy"]


@registry("attack").register("new-strategy")
@spec
class NewStrategy:
    """Sign steps that shrink: the first is epsilon long (or the budget's step size), the last one `steps`-th of it."""

    steps: int = setting(default=5, at_least=1)
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        steps = self.steps if budget.steps is None else budget.max_steps
        longest = budget.epsilon if budget.step_size is None else budget.step_size
        images = threat.random(x, budget.epsilon, generator)
        with predict.using(self.mode) as forward:
            for step in range(steps):
                size = longest * (1 - step / steps)
                if budget.steps is not None:  # images stop moving after theirs
                    size = size * (step < budget.steps)
                move = threat.ascend(self.gradient(forward, images, y)) * per_image(size, x)
                images = threat.project(images + move, x, budget.epsilon)
        return images

    def gradient(self, forward: Predict, images: Tensor, y: Tensor) -> Tensor:
        """That of the cross-entropy with respect to the images; parameters collect none."""
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            value = CrossEntropyObjective()(forward(images), y, Reference())
            (found,) = torch.autograd.grad(value.sum(), images)
        return found

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps, input_backward=self.steps)
