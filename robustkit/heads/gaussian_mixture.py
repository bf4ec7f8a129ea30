"""One Gaussian of unit covariance for each class, around a learnt centre."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.core.batch import Output, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec


@registry("head").register("gaussian-mixture")
@spec
class GaussianMixture:
    """Posterior under one unit Gaussian per class (LDAT, CMC 2024, Eq. 6 and 7; margin after L-GM, CVPR 2018).

    Logits are -|f - mu_k|^2 / 2. In training the true class's squared distance is multiplied by 1 + `margin` for the
    classification loss, and `likelihood` times the mean squared distance to the true centre is added to the objective,
    growing linearly to that weight ("up": t / T), falling from it ("down": 1 - (t - 1) / T) or "constant": the paper
    argues for the first and sets the second. Distances are taken in float32 whatever the precision.
    """

    margin: float = setting(default=0.1, at_least=0)
    likelihood: float = setting(default=1.0, at_least=0)
    likelihood_schedule: Literal["up", "down", "constant"] = "up"
    centre_lr_scale: float = setting(default=1.0, at_least=0)
    centre_weight_decay: float | None = setting(default=None, at_least=0)

    def build(self, width: int, classes: int) -> GaussianMixtureHead:
        return GaussianMixtureHead(width, classes, self.margin)

    def penalty_weight(self, progress: Progress) -> float:
        share = {
            "up": (progress.epoch + 1) / progress.epochs,
            "down": 1 - progress.epoch / progress.epochs,
            "constant": 1.0,
        }
        return self.likelihood * share[self.likelihood_schedule]

    def parameter_options(self) -> dict[str, float]:
        options = {"lr_scale": self.centre_lr_scale}
        return options if self.centre_weight_decay is None else options | {"weight_decay": self.centre_weight_decay}


class GaussianMixtureHead(nn.Module):
    """State: centres (K, D)."""

    def __init__(self, width: int, classes: int, margin: float) -> None:
        super().__init__()
        self.margin = margin
        self.centres = nn.Parameter(torch.empty(classes, width))
        nn.init.xavier_uniform_(self.centres)  # N(0, 1) would saturate the softmax at the start

    def forward(self, features: Tensor, y: Tensor | None = None) -> Output:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            centres = self.centres.float()
            squared = (
                features.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1) - 2 * features @ centres.T
            )
            logits = -squared / 2
            if y is None:
                return Output(logits, logits, features, features.new_zeros(len(features)))
            true = squared.gather(1, y[:, None])
            margined = logits.scatter(1, y[:, None], -(1 + self.margin) * true / 2)
            return Output(logits, margined, features, true.squeeze(1))
