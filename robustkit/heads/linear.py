"""An affine map."""

from __future__ import annotations

from torch import Tensor, nn

from robustkit.core.batch import Output, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec


@registry("head").register("linear")
@spec
class Linear:
    """An affine map. `zero_bias` starts the bias at 0, as Wide ResNets do."""

    zero_bias: bool = False

    def build(self, width: int, classes: int) -> LinearHead:
        return LinearHead(width, classes, self.zero_bias)

    def penalty_weight(self, progress: Progress) -> float:
        return 0.0

    def parameter_options(self) -> dict[str, float]:
        return {}


class LinearHead(nn.Module):
    def __init__(self, width: int, classes: int, zero_bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        if zero_bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, y: Tensor | None = None) -> Output:
        logits = self.linear(features)
        return Output(logits, logits, features, features.new_zeros(len(features)))
