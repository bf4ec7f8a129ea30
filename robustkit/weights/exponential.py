"""Exponential weight averaging."""

from __future__ import annotations

from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec


@registry("average").register("exponential")
@spec
class Exponential:
    """Exponential moving average of the weights (Rebuffi et al. 2021).

    After step s the old average keeps the share min(`rate`, (1 + s - w) / (10 + s - w)), and nothing while s < w; w is
    `warm_up` as a fraction of all steps. BatchNorm statistics are copied from the trained weights.
    """

    rate: float = setting(default=0.995, at_least=0, below=1)
    warm_up: float = setting(default=0.0, at_least=0, at_most=1)

    def decay(self, step: int, total_steps: int) -> float:
        since = step - int(self.warm_up * total_steps)
        return 0.0 if since < 0 else min(self.rate, (1 + since) / (10 + since))
