"""L2: the perturbation's Euclidean length is at most epsilon."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.functional import per_image

_TINY = 1e-12


@registry("threat").register("l2")
@spec
class L2:
    """The perturbation's Euclidean length is at most epsilon."""

    epsilon: float = setting(default=0.5, above=0)
    norm: ClassVar[Literal["L2"]] = "L2"

    def random(self, x: Tensor, epsilon: Tensor, generator: Generator) -> Tensor:
        """A Gaussian direction, scaled by U(0, 1) epsilon (Rice et al. 2020)."""
        direction = self.ascend(generator.normal(x))
        length = generator.uniform(x[:, :1, :1, :1]) * per_image(epsilon, x)
        return (x + direction * length).clamp_(0, 1)

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        perturbation = x_adv - x
        shrink = (epsilon / self.size(perturbation).clamp_min(_TINY)).clamp_max(1)
        return (x + perturbation * per_image(shrink, x)).clamp_(0, 1)

    def ascend(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        scaled = gradient / per_image(largest, gradient)  # squares of tiny gradients would underflow
        return scaled / per_image(self.size(scaled).clamp_min(_TINY), scaled)

    def size(self, perturbation: Tensor) -> Tensor:
        return torch.linalg.vector_norm(perturbation.flatten(1), dim=1)  # type: ignore[no-any-return]
