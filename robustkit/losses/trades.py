"""TRADES: classify the natural images, and predict the same on the adversarial ones."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
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

    As Rebuffi et al. (2021) train with it: `label_smoothing` of the cross-entropy for the `smoothed` images alone, and
    without `natural_statistics` only the adversarial images move running statistics.
    """

    weight: float = setting(default=6.0, at_least=0)
    label_smoothing: float = setting(default=0.0, at_least=0, below=1)
    smoothed: Literal["all", "synthetic"] = "all"
    natural_statistics: bool = True
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        extras = {} if budget.weight is None else {"weights": budget.weight}
        if self.label_smoothing and self.smoothed == "synthetic" and scene.world.own is not None:
            extras["synthetic"] = scene.batch.index >= scene.world.own
        untracked = frozenset() if self.natural_statistics else frozenset({"natural"})
        return Prepared({"natural": scene.batch.x, "adversarial": x_adv}, extras, untracked=untracked)

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
        classification = F.cross_entropy(natural.margined, batch.y, reduction="none")
        if self.label_smoothing:
            smooth = F.cross_entropy(natural.margined, batch.y, reduction="none", label_smoothing=self.label_smoothing)
            if self.smoothed == "all":
                classification = smooth
            elif "synthetic" in extras:
                classification = torch.where(extras["synthetic"], smooth, classification)
        return {
            "cross-entropy": classification.mean(),
            "consistency": self.weight * consistency.mean(),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2, parameter_backward=2)
