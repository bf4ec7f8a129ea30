"""ALP: classify both images of a pair, and give them the same logits."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("loss").register("alp")
@spec
class ALP:
    """CE(z, y) / 2 + CE(z_adv, y) / 2 + weight MSE(z, z_adv), gradient through both (Kannan et al. 2018).

    z are the logits; the squares are averaged over images and classes. `joint` forwards both halves in one batch, as
    the authors do. Its attack is `PGD()`.
    """

    weight: float = setting(default=0.5, at_least=0)
    label_smoothing: float = setting(default=0.0, at_least=0, below=1)
    joint: bool = True
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        return Prepared({"natural": scene.batch.x, "adversarial": x_adv}, joint=self.joint)

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        natural, adversarial = outputs["natural"], outputs["adversarial"]
        smooth = self.label_smoothing
        return {
            "natural": F.cross_entropy(natural.margined, batch.y, label_smoothing=smooth) / 2,
            "adversarial": F.cross_entropy(adversarial.margined, batch.y, label_smoothing=smooth) / 2,
            "pairing": self.weight * F.mse_loss(adversarial.logits, natural.logits),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2, parameter_backward=2)
