"""Accuracy on the images as they are."""

from __future__ import annotations

from torch import Tensor, nn

from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Outcomes, Predict, ThreatModel
from robustkit.evaluation.logits import is_right


@registry("measure").register("clean")
@spec
class Clean:
    """Accuracy on unperturbed images ("natural" in many papers)."""

    images: int | None = setting(default=None, at_least=1)

    @property
    def key(self) -> str:
        return "clean"

    def outcomes(
        self, predict: Predict, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int
    ) -> Outcomes:
        with predict.using("eval") as predict:
            return Outcomes(is_right(predict(x).logits, y))
