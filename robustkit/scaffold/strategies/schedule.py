"""New strategy: which learning rate, when?"""

from __future__ import annotations

from robustkit import registry, setting, spec
from robustkit.core.batch import Progress
from robustkit.core.strategy import Rates

__all__ = ["NewStrategy"]


@registry("schedule").register("new-strategy")
@spec
class NewStrategy:
    """The rate falls step by step as (1 - t)^`power`, t from 0 to 1 over training."""

    power: float = setting(default=2.0, above=0)

    def __call__(self, progress: Progress) -> Rates:
        return Rates((1 - progress.step / progress.total_steps) ** self.power)
