"""UIAT: classify the adversarial images, and match a target distribution."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene
from robustkit.functional import kl_from_probabilities


@registry("loss").register("align")
@spec
class Align:
    """CE(f(x_adv), y) + weight KL(p || f(x_adv)) for a target p (UIAT, CVPR 2023, Eq. 8).

    `detach` keeps gradients out of p; the paper does not say, its costs say so.
    """

    weight: float = setting(default=3.5, at_least=0)
    label_smoothing: float = setting(default=0.0, at_least=0, below=1)
    detach: bool = True
    needs_target: ClassVar[bool] = True

    @property
    def detach_target(self) -> bool:
        return self.detach

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        return Prepared({"adversarial": x_adv})

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        assert target is not None
        output = outputs["adversarial"]
        return {
            "cross-entropy": F.cross_entropy(output.margined, batch.y, label_smoothing=self.label_smoothing),
            "alignment": self.weight * kl_from_probabilities(target, output.logits).mean(),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, parameter_backward=1)
