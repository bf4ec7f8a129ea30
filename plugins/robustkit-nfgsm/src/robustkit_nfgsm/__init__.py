"""N-FGSM for robustkit: one step from a noisier image, and no clipping afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.rng import Generator
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.functional import per_image
from robustkit.objectives import CrossEntropyObjective

__all__ = ["NFGSM"]
__version__ = "0.1.0"


@registry("attack").register("n-fgsm")
@spec
class NFGSM:
    """One sign step from a noisy image, not clipped to the ball (N-FGSM, de Jorge et al., NeurIPS 2022).

    x' = clamp(x + U(-`noise` eps, `noise` eps)), then clamp(x' + `step` eps sign(gradient of the cross-entropy at x')),
    both clamps to the box [0, 1] alone: the result lies up to `noise` + `step` epsilon from x. Both are multiples of
    the image's own epsilon, so a step size in the budget is not used. `mode` is the model's mode in the one pass; as in
    the authors' code it is "train", which moves BatchNorm statistics a second time in each step.
    """

    noise: float = setting(default=2.0, at_least=0)
    step: float = setting(default=1.0, above=0)
    mode: Mode = "train"

    @property
    def reach(self) -> float:
        return self.noise + self.step

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        noisy = threat.random(x, self.noise * budget.epsilon, generator)
        with torch.enable_grad(), predict.using(self.mode) as predict:
            noisy.requires_grad_()
            value = CrossEntropyObjective()(predict(noisy), y, Reference())
            (gradient,) = torch.autograd.grad(value.sum(), noisy)
        move = threat.ascend(gradient) * per_image(self.step * budget.epsilon, x)
        return (noisy.detach() + move).clamp(0, 1)

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, input_backward=1)
