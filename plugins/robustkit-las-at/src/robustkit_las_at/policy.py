"""The policy network: what it thinks of each image, and one draw from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from robustkit import Model
from robustkit.core.errors import SpecError
from robustkit.core.rng import derive
from robustkit.core.world import World
from robustkit.heads.linear import Linear, LinearHead


class Policy(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> one (B, n) for each of `sizes`: log-probabilities of n options.

    A trunk without stored weights, never normalised, and a linear layer for each. It computes in float32.
    """

    def __init__(self, backbone: str, sizes: Sequence[int], world: World) -> None:
        """
        Raises:
            SpecError: there is no such backbone, or it cannot take the data's images.
        """
        super().__init__()
        seed = derive(world.seed, "las-at")
        try:
            network = Model(backbone=backbone).build(Linear(), world.classes, world.image_shape, seed)
        except SpecError as error:
            raise SpecError(error.fault, place="epsilon.backbone", remedy=error.remedy) from error
        width = cast(LinearHead, network.head).linear.in_features
        self.trunk = network.backbone
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return [head(features).log_softmax(dim=1) for head in self.heads]


def pick(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B,) an option for each row of (B, n), from one uniform number each: the inverse of the cumulative sum."""
    below = log_probabilities.detach().exp().cumsum(dim=1) <= uniform[:, None]
    return below.sum(dim=1).clamp_max(log_probabilities.shape[1] - 1)
