"""MI-FGSM: gradient signs with a momentum."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustkit.attacks.climb import repeatedly
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.functional import per_image
from robustkit.objectives.cross_entropy import CrossEntropyObjective


@registry("attack").register("mi-fgsm")
@spec
class MIFGSM:
    """Iterated FGSM with momentum, made for transfer (MI-FGSM, Dong et al., CVPR 2018, Algorithm 1).

    From the image itself, `steps` times: g = `decay` g + gradient / |gradient|_1, a step along the sign of g (in other
    balls: its steepest direction), back into the ball and the box. Gradients are those of the cross-entropy.
    `step_size` in pixels; None: epsilon / `steps`, as in the paper. A step size or a number of steps in the budget is
    not used. `mode` is the model's mode during the attack.
    """

    steps: int = setting(default=10, at_least=1)
    decay: float = setting(default=1.0, at_least=0)
    step_size: float | None = setting(default=None, above=0)
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        with predict.using(self.mode) as predict:

            def search(x: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
                return self._search(predict, x, y, epsilon, threat)

            return repeatedly(predict, ("mi-fgsm", self, threat), search, (x, y, budget.epsilon))

    def _search(self, predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor, threat: ThreatModel) -> Tensor:
        sizes = epsilon / self.steps if self.step_size is None else torch.full_like(epsilon, self.step_size)
        stride, tiny = per_image(sizes, x), torch.finfo(x.dtype).tiny
        x_adv, momentum = x, torch.zeros_like(x)
        for _ in range(self.steps):
            with torch.enable_grad():
                images = x_adv.detach().requires_grad_()
                value = CrossEntropyObjective()(predict(images), y, Reference())
                (gradient,) = torch.autograd.grad(value.sum(), images)
            length = gradient.abs().flatten(1).sum(dim=1).clamp_min(tiny)  # of an image without a gradient: no move
            momentum = self.decay * momentum + gradient / per_image(length, x)
            x_adv = threat.project(x_adv.detach() + threat.ascend(momentum) * stride, x, epsilon)
        return x_adv

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps, input_backward=self.steps)
