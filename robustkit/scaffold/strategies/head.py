"""New strategy: how do features become logits?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import registry, setting, spec
from robustkit.core.batch import Output, Progress

__all__ = ["NewStrategy"]


@registry("head").register("new-strategy")
@spec
class NewStrategy:
    """Logits are `scale` times the cosine between the features and a direction for each class."""

    scale: float = setting(default=10.0, above=0)

    def build(self, width: int, classes: int) -> Cosine:
        return Cosine(width, classes, self.scale)

    def penalty_weight(self, progress: Progress) -> float:
        return 0.0

    def parameter_options(self) -> dict[str, float]:
        return {}


class Cosine(nn.Module):
    """State: a direction for each class (K, D)."""

    def __init__(self, width: int, classes: int, scale: float) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.empty(classes, width))
        self.scale = scale
        nn.init.xavier_uniform_(self.directions)

    def forward(self, features: Tensor, y: Tensor | None = None) -> Output:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits = self.scale * F.normalize(features, dim=1) @ F.normalize(self.directions.float(), dim=1).T
        return Output(logits, logits, features, features.new_zeros(len(features)))
