"""LDAT's attack: a perturbation grows while its image is still right, and shrinks while it is wrong."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.attacks.climb import repeatedly
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.rng import Generator, whole
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.functional import per_image
from robustkit.objectives.cross_entropy import CrossEntropyObjective
from robustkit.threats.l2 import L2


@registry("attack").register("ldat")
@spec
class LDAT:
    """Perturbations whose length follows the decision boundary (LDAT, CMC 2024, Algorithm 1; DDN, CVPR 2019).

    Each image's perturbation has an L2 length e of its own, 1 at first. A step multiplies e by 1 + `gamma` where the
    image is still right and by 1 - `gamma` where it is wrong, adds to the perturbation, and brings the sum to length e.
    What is added is the unit gradient of the cross-entropy ("unit": the paper's algorithm), or what Adam at rate `lr`
    makes of the unit gradients ("adam": its experiments). On the way images leave the box and the ball; the last one is
    projected to the ball, then to the box. An image without a gradient goes in a direction drawn once for all of them.

    The ball is the recipe's, or that of `Within`: the paper's is L2 1.5 on CIFAR-10, 1.0 on CIFAR-100. A step size or a
    number of steps in the budget is not used. The paper does not give `steps`.
    """

    steps: int = setting(default=10, at_least=1)
    step: Literal["adam", "unit"] = "adam"
    lr: float = setting(default=0.2, above=0)
    gamma: float = setting(default=0.2, at_least=0, below=1)
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        aimless = L2().ascend(whole(x[:1], 0, "ldat").normal(x[:1]))
        with predict.using(self.mode) as predict:

            def search(x: Tensor, y: Tensor, aimless: Tensor) -> Tensor:
                return self._search(predict, x, y, aimless)

            found = repeatedly(predict, ("ldat", self), search, (x, y, aimless))
        return threat.project(x + found, x, budget.epsilon)

    def _search(self, predict: Predict, x: Tensor, y: Tensor, aimless: Tensor) -> Tensor:
        """Perturbations like x (B, C, H, W), not projected; `aimless` (1, C, H, W) has unit length."""
        ball, found, length = L2(), torch.zeros_like(x), x.new_ones(len(x))
        first = second = torch.zeros_like(x)  # Adam's moments
        for number in range(1, self.steps + 1):
            with torch.enable_grad():
                images = (x + found).requires_grad_()
                output = predict(images)
                value = CrossEntropyObjective()(output, y, Reference())
                (gradient,) = torch.autograd.grad(value.sum(), images)
            right = output.logits.argmax(dim=1) == y
            length = torch.where(right, length * (1 + self.gamma), length * (1 - self.gamma))
            move = ball.ascend(gradient)
            move = torch.where(per_image(ball.size(move) == 0, x), aimless, move)
            if self.step == "adam":
                first, second = first.lerp(move, 0.1), second.lerp(move.square(), 0.001)
                spread = (second / (1 - 0.999**number)).sqrt() + 1e-8
                move = self.lr * first / (1 - 0.9**number) / spread
            found = ball.ascend(found + move) * per_image(length, x)
        return found

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps, input_backward=self.steps)
