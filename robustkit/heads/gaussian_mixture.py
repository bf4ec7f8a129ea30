"""One Gaussian of unit covariance for each class, around a centre."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from robustkit.core.batch import Output, Progress
from robustkit.core.errors import SpecError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec


@registry("head").register("gaussian-mixture")
@spec
class GaussianMixture:
    """Posterior under one unit Gaussian per class (LDAT, CMC 2024, Eq. 6 and 7; margin after L-GM, CVPR 2018).

    Logits are -|f - mu_k|^2 / 2. In training the true class's squared distance is multiplied by 1 + `margin` for the
    classification loss, and `likelihood` times the mean squared distance to the true centre is added to the objective,
    growing linearly to that weight ("up": t / T), falling from it ("down": 1 - (t - 1) / T) or "constant": the paper
    argues for the first and sets the second. In runs of few epochs the weight must be smaller, or features stay in one
    point (docs/methods/ldat.md). Distances are taken in float32 whatever the precision.

    `centres` are learnt and start by Xavier's uniform rule or the normal one of He et al. ("msra": L-GM), or they are
    fixed: the corners of a "simplex", of length `centre_norm` and equally far apart (Pang et al., ICLR 2020).
    """

    margin: float = setting(default=0.1, at_least=0)
    likelihood: float = setting(default=1.0, at_least=0)
    likelihood_schedule: Literal["up", "down", "constant"] = "up"
    centres: Literal["xavier", "msra", "simplex"] = "xavier"
    centre_norm: float = setting(default=10.0, above=0)
    centre_lr_scale: float = setting(default=1.0, at_least=0)
    centre_weight_decay: float | None = setting(default=None, at_least=0)

    def build(self, width: int, classes: int) -> GaussianMixtureHead:
        if self.centres == "simplex":
            return GaussianMixtureHead(simplex(classes, width, self.centre_norm), self.margin)
        centres = nn.Parameter(torch.empty(classes, width))
        start = nn.init.xavier_uniform_ if self.centres == "xavier" else nn.init.kaiming_normal_
        start(centres)  # N(0, 1) would saturate the softmax at the start
        return GaussianMixtureHead(centres, self.margin)

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


def simplex(classes: int, width: int, norm: float) -> Tensor:
    """(K, D) points of length `norm` with inner products -norm^2 / (K - 1): as far from each other as can be.

    Raises:
        SpecError: there are fewer dimensions than points.
    """
    if width < classes:
        fault = f"{classes} centres of a simplex need as many features, the network has {width}"
        raise SpecError(fault, place="head.centres", remedy="set head.centres=xavier, or a wider network")
    corners = torch.zeros(classes, width)
    corners[:, :classes] = torch.eye(classes) - 1 / classes
    return corners * (norm * math.sqrt(classes / (classes - 1)))


class GaussianMixtureHead(nn.Module):
    """State: centres (K, D), a buffer where they are fixed."""

    centres: Tensor

    def __init__(self, centres: Tensor, margin: float) -> None:
        super().__init__()
        self.margin = margin
        if isinstance(centres, nn.Parameter):
            self.centres = centres
        else:
            self.register_buffer("centres", centres)

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
