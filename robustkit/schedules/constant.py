"""The same rate throughout."""

from __future__ import annotations

from robustkit.core.batch import Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Rates


@registry("schedule").register("constant")
@spec
class Constant:
    """The optimiser's rate throughout."""

    def __call__(self, progress: Progress) -> Rates:
        return Rates(1.0)
