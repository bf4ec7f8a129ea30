"""Cross-entropy on the adversarial images."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("loss").register("cross-entropy")
@spec
class CrossEntropy:
    """Cross-entropy on the adversarial images: PGD-AT (Madry et al. 2018); natural training without an attack.

    `label_smoothing` s is torch's: 1/3 equals the 0.7-and-rest targets of the ECAS recipe at 10 classes, 0.30303 at
    100.
    """

    label_smoothing: float = setting(default=0.0, at_least=0, below=1)
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

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
        margined = outputs["adversarial"].margined
        return {"cross-entropy": F.cross_entropy(margined, batch.y, label_smoothing=self.label_smoothing)}

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, parameter_backward=1)
