"""MART: press the wrong classes down, and mind most the images whose natural prediction is doubtful."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene


@registry("loss").register("mart")
@spec
class Mart:
    """CE(f(x_adv), y) - log(1 - p_adv[k]) + weight (1 - p[y]) KL(p || p_adv) (Wang et al., ICLR 2020).

    k is the likeliest wrong class of the adversarial image. Gradients flow through both predictions and through the
    factor (1 - p[y]). The small constants are those of the authors' code. Its attack is `PGD(start="gaussian")`.
    """

    weight: float = setting(default=5.0, at_least=0)
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        return Prepared({"natural": scene.batch.x, "adversarial": x_adv})

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        natural, adversarial, true = outputs["natural"], outputs["adversarial"], batch.y[:, None]
        p, p_adv = natural.logits.softmax(dim=1), adversarial.logits.softmax(dim=1)
        likeliest_wrong = p_adv.scatter(1, true, 0.0).max(dim=1).values
        doubt = 1.0000001 - p.gather(1, true)[:, 0]
        # log p from the logits: the log of a p that has underflown to 0 would have no finite gradient
        kl = (p * (F.log_softmax(natural.logits, dim=1) - (p_adv + 1e-12).log())).sum(dim=1)
        return {
            "cross-entropy": F.cross_entropy(adversarial.margined, batch.y),
            "margin": -(1.0001 - likeliest_wrong + 1e-12).log().mean(),
            "consistency": self.weight * (doubt * kl).mean(),
        }

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2, parameter_backward=2)
