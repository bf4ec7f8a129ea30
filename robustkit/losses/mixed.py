"""LDAT: cross-entropy on natural and adversarial images, mixed."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("loss").register("mixed")
@spec
class Mixed:
    """(1 - beta) CE(f(x), y) + beta CE(f(x_adv), y), the head's penalty shared likewise (LDAT, CMC 2024).

    `joint` forwards both halves in one batch, so that they share batch statistics (Kurakin et al. 2017).
    """

    beta: float = setting(default=0.5, at_least=0, at_most=1)
    joint: bool = True
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        views = {"natural": scene.batch.x, "adversarial": x_adv}
        return Prepared(views, shares={"natural": 1 - self.beta, "adversarial": self.beta}, joint=self.joint)

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        return {
            "natural": (1 - self.beta) * F.cross_entropy(outputs["natural"].margined, batch.y),
            "adversarial": self.beta * F.cross_entropy(outputs["adversarial"].margined, batch.y),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2, parameter_backward=2)
