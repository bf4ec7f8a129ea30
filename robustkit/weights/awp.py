"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustkit.core.batch import Passes, Progress, start_epoch
from robustkit.core.recipe import Recipe, refuse_late_start
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Gradients

_TINY = 1e-20


@registry("weights").register("awp")
@spec
class AWP:
    """Step from the weights that make this batch hardest (Wu et al., NeurIPS 2020).

    Each tensor w of more than one dimension whose name has "weight" in it moves by `gamma` |w| along its normalised
    gradient; biases, normalisation and the centres of a mixture head stay. The proxy network of the reference code is
    one more gradient here: its learning rate cancels in the normalisation. The displacement is subtracted after the
    optimiser's step, so the step survives. Active from epoch `start` on (a fraction of training, or an epoch counted
    from 1).
    """

    gamma: float = setting(default=0.01, at_least=0)
    start: float = setting(default=0.0, at_least=0)
    accumulates: ClassVar[bool] = False

    @contextmanager
    def displaced(self, model: nn.Module, gradients: Gradients, progress: Progress) -> Iterator[None]:
        if not self._active(progress):
            yield
            return
        named = model.named_parameters()
        weights: list[Tensor] = [p for name, p in named if "weight" in name and p.ndim > 1 and p.requires_grad]
        with torch.no_grad():
            moves = [
                g * (self.gamma * torch.linalg.vector_norm(w) / (torch.linalg.vector_norm(g) + _TINY))
                for w, g in zip(weights, gradients(weights), strict=True)
            ]
            torch._foreach_add_(weights, moves)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_sub_(weights, moves)

    def check(self, recipe: Recipe) -> None:
        """Refuse a start beyond the end."""
        refuse_late_start(self.start, recipe, "weights.start")

    def passes(self, progress: Progress, pure: Passes) -> Passes:
        return pure if self._active(progress) else Passes()

    def _active(self, progress: Progress) -> bool:
        return self.gamma > 0 and progress.epoch + 1 >= start_epoch(self.start, progress.epochs)
