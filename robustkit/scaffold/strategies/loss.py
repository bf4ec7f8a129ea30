"""New strategy: what is minimised?"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.strategy import Scene

__all__ = ["NewStrategy"]


@registry("loss").register("new-strategy")
@spec
class NewStrategy:
    """Focal loss on the adversarial images (Lin et al. 2017): (1 - p)^gamma times the cross-entropy.

    p is the probability of the true class, so that images which resist already count less.
    """

    gamma: float = setting(default=2.0, at_least=0)
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
        value = F.cross_entropy(outputs["adversarial"].margined, batch.y, reduction="none")
        doubt = (1 - (-value).exp()) ** self.gamma
        return {"focal": (doubt * value).mean()}

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1, parameter_backward=1)
