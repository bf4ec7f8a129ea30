"""TRADES: classify the natural images, and predict the same on the adversarial ones."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene
from robustkit.functional import kl_from_logits


@registry("loss").register("trades")
@spec
class Trades:
    """CE(f(x), y) + weight KL(f(x) || f(x_adv)), gradient through both (Zhang et al., ICML 2019).

    Its attack is `PGD(objective=KL(), start="gaussian")`. Natural and adversarial images are forwarded one after the
    other, each with its own batch statistics. Where the budget has a weight for each image, it multiplies that image's
    KL, too.
    """

    weight: float = setting(default=6.0, at_least=0)
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        weights = {} if budget.weight is None else {"weights": budget.weight}
        return Prepared({"natural": scene.batch.x, "adversarial": x_adv}, weights)

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        natural, adversarial = outputs["natural"], outputs["adversarial"]
        consistency = kl_from_logits(natural.logits, adversarial.logits)
        if "weights" in extras:
            consistency = extras["weights"] * consistency
        return {
            "cross-entropy": F.cross_entropy(natural.margined, batch.y),
            "consistency": self.weight * consistency.mean(),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2, parameter_backward=2)
