"""Which learning rate, when?

A schedule maps progress to a factor on the optimiser's `lr` (and, for some, a momentum), before every step. It keeps
no state, so a resumed run has the right rate by construction.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Rates, Schedule
from robustkit.schedules.constant import Constant
from robustkit.schedules.cosine import Cosine
from robustkit.schedules.multi_step import MultiStep
from robustkit.schedules.one_cycle import OneCycle
from robustkit.schedules.triangular import Triangular

registry = _registry("schedule")

__all__ = ["Constant", "Cosine", "MultiStep", "OneCycle", "Rates", "Schedule", "Triangular", "registry"]
