"""New strategy: where are the weights when we step?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit import registry, setting, spec
from robustkit.core.batch import Passes, Progress
from robustkit.core.strategy import Gradients

__all__ = ["NewStrategy"]

_TINY = 1e-12


@registry("weights").register("new-strategy")
@spec
class NewStrategy:
    """Step from the weights `rho` further up the gradient (sharpness-aware minimisation, Foret et al. 2021)."""

    rho: float = setting(default=0.05, above=0)
    accumulates: ClassVar[bool] = False

    @contextmanager
    def displaced(self, model: nn.Module, gradients: Gradients, progress: Progress) -> Iterator[None]:
        weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        found = gradients(weights)
        length = torch.stack([torch.linalg.vector_norm(g) for g in found]).norm()
        moves = [g * (self.rho / (length + _TINY)) for g in found]
        with torch.no_grad():
            torch._foreach_add_(weights, moves)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_sub_(weights, moves)

    def passes(self, progress: Progress, pure: Passes) -> Passes:
        return pure
