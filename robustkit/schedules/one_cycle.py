"""One cycle: up, then down, by cosine."""

from __future__ import annotations

import math

from robustkit.core.batch import Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Rates


@registry("schedule").register("one-cycle")
@spec
class OneCycle:
    """From lr / 25 up to lr and down to almost nothing, by cosine, step by step (Smith 2018).

    `cycle_momentum` moves the momentum 0.95 -> 0.85 -> 0.95 against it, as torch's OneCycleLR does by default and HAT's
    code inherits; false keeps the optimiser's.
    """

    warm_up: float = setting(default=0.25, above=0, below=1)
    cycle_momentum: bool = True
    start_divisor: float = setting(default=25.0, above=0)
    end_divisor: float = setting(default=25e4, above=0)
    base_momentum: float = setting(default=0.85, at_least=0, below=1)
    max_momentum: float = setting(default=0.95, at_least=0, below=1)

    def __call__(self, progress: Progress) -> Rates:
        last = max(1, progress.total_steps - 1)
        peak = max(0.0, self.warm_up * progress.total_steps - 1)
        base, top = self.base_momentum, self.max_momentum
        if progress.step <= peak:
            share = progress.step / peak if peak else 1.0
            lr, momentum = _cosine(1 / self.start_divisor, 1.0, share), _cosine(top, base, share)
        else:
            share = (progress.step - peak) / (last - peak) if last > peak else 1.0
            lr, momentum = _cosine(1.0, 1 / self.end_divisor, share), _cosine(base, top, share)
        return Rates(lr, momentum if self.cycle_momentum else None)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
