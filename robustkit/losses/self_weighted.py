"""Cross-entropy that minds most the images on which it is largest."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Scene


@registry("loss").register("self-weighted")
@spec
class SelfWeighted:
    """Cross-entropy on the adversarial images, each image's times its own value (the code of DAT; not in its paper).

    From the second epoch on; in the first it is plain. The weight is the value before the step, a constant, read in a
    forward of its own, whose `mode` is the setting.
    """

    mode: Mode = "eval"
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        views = {"adversarial": x_adv}
        if scene.progress.epoch == 0:
            return Prepared(views)
        with torch.no_grad(), scene.predict.using(self.mode) as predict:
            return Prepared(views, {"weight": F.cross_entropy(predict(x_adv).logits, scene.batch.y, reduction="none")})

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        value = F.cross_entropy(outputs["adversarial"].margined, batch.y, reduction="none")
        if "weight" in extras:
            value = extras["weight"] * value
        return {"cross-entropy": value.mean()}

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, parameter_backward=1)

    def preparation(self, progress: Progress) -> Passes:
        """The forward that reads the weights."""
        return Passes(forward=min(1, progress.epoch))
