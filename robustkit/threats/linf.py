"""L-infinity: every pixel may move by epsilon."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.functional import per_image


@registry("threat").register("linf")
@spec
class Linf:
    """Every pixel may move by at most epsilon (Madry et al. 2018)."""

    epsilon: float = setting(default=8 / 255, above=0, at_most=1, remedy="pixels are in [0, 1]: write 8/255")
    norm: ClassVar[Literal["Linf"]] = "Linf"

    def random(self, x: Tensor, epsilon: Tensor, generator: Generator) -> Tensor:
        return (x + (2 * generator.uniform(x) - 1) * per_image(epsilon, x)).clamp_(0, 1)

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        radius = per_image(epsilon, x)
        return torch.minimum(torch.maximum(x_adv, x - radius), x + radius).clamp_(0, 1)

    def ascend(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.abs().flatten(1).amax(dim=1)
