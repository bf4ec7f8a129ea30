"""FGSM from a random start."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from robustkit.attacks.climb import climb
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.objectives.cross_entropy import CrossEntropyObjective


@registry("attack").register("rs-fgsm")
@spec
class RSFGSM:
    """One long sign step from a random point of the ball, brought back into it (RS-FGSM, Wong et al., ICLR 2020).

    x' = clamp(x + U(-`noise` eps, `noise` eps)), then x' + `step` eps sign(gradient of the cross-entropy at x'),
    projected to the ball, then to the box. Both are multiples of the image's own epsilon, so a step size or a number of
    steps in the budget is not used. `mode` is the model's mode in the one pass; as in the authors' code it is "train",
    which moves BatchNorm statistics a second time in each step.

    With `noise` 0 and `step` 1 it is FGSM (Goodfellow et al. 2015); in L-inf a longer step then ends in the same point.
    """

    noise: float = setting(default=1.0, at_least=0)
    step: float = setting(default=1.25, above=0)
    mode: Mode = "train"
    reach: ClassVar[float] = 1.0

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        epsilon = budget.epsilon
        start = threat.random(x, self.noise * epsilon, generator) if self.noise else x.clone()
        with predict.using(self.mode) as predict:
            return climb(
                lambda images: CrossEntropyObjective()(predict(images), y, Reference()),
                start,
                x,
                threat=threat,
                epsilon=epsilon,
                step_size=self.step * epsilon,
                steps=1,
            )

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, input_backward=1)
