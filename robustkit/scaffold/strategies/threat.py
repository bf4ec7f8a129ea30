"""New strategy: where may an image go?"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.rng import Generator
from robustkit.functional import per_image

__all__ = ["NewStrategy"]


@registry("threat").register("new-strategy")
@spec
class NewStrategy:
    """A frame: the `width` outermost pixels may move by at most epsilon each, those inside not at all."""

    epsilon: float = setting(default=8 / 255, above=0, at_most=1, remedy="pixels are in [0, 1]: write 8/255")
    width: int = setting(default=1, at_least=1)
    norm: ClassVar[Literal["Linf"]] = "Linf"

    def random(self, x: Tensor, epsilon: Tensor, generator: Generator) -> Tensor:
        noise = (2 * generator.uniform(x) - 1) * per_image(epsilon, x)
        return (x + self.framed(noise)).clamp(0, 1)

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        radius = per_image(epsilon, x)
        perturbation = torch.minimum(torch.maximum(x_adv - x, -radius), radius)
        return (x + self.framed(perturbation)).clamp(0, 1)

    def ascend(self, gradient: Tensor) -> Tensor:
        return self.framed(gradient.sign())

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.abs().flatten(1).amax(dim=1)

    def framed(self, perturbation: Tensor) -> Tensor:
        """`perturbation` (B, C, H, W) on the frame, zero inside it."""
        inside = torch.zeros_like(perturbation, dtype=torch.bool)
        inside[..., self.width : -self.width, self.width : -self.width] = True
        return perturbation.masked_fill(inside, 0)
