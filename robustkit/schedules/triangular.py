"""Straight up, straight down."""

from __future__ import annotations

from robustkit.core.batch import Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Rates


@registry("schedule").register("triangular")
@spec
class Triangular:
    """From 0 straight up to lr at `peak` of training and down to 0, step by step (Wong et al. 2020).

    `cycle_momentum` moves the momentum 0.9 -> 0.8 -> 0.9 against it, as torch's CyclicLR does by default; false keeps
    the optimiser's.
    """

    peak: float = setting(default=0.5, above=0, below=1)
    cycle_momentum: bool = True
    base_momentum: float = setting(default=0.8, at_least=0, below=1)
    max_momentum: float = setting(default=0.9, at_least=0, below=1)

    def __call__(self, progress: Progress) -> Rates:
        share = progress.step / progress.total_steps
        height = share / self.peak if share <= self.peak else (1 - share) / (1 - self.peak)
        momentum = self.max_momentum - (self.max_momentum - self.base_momentum) * height
        return Rates(height, momentum if self.cycle_momentum else None)
