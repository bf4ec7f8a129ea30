"""What a learning-rate schedule must do."""

from __future__ import annotations

import math

from robustkit.core.batch import Progress
from robustkit.core.strategy import Schedule
from robustkit.testing.common import name_of
from robustkit.testing.spec import check_spec


def check_schedule(schedule: Schedule) -> None:
    """Finite rates, a function of progress alone."""
    check_spec(schedule)
    who = name_of(schedule)
    for epochs, steps in ((1, 1), (4, 3), (110, 390)):
        for step in sorted({0, 1, epochs * steps // 2, epochs * steps - 1} & set(range(epochs * steps))):
            progress = Progress.at(step, epochs, steps)
            rates = schedule(progress)
            assert rates == schedule(progress), (
                f"{who}: asked twice, it gives two rates; let it depend on progress alone"
            )
            assert math.isfinite(rates.lr_scale) and rates.lr_scale >= 0, f"{who}: lr_scale {rates.lr_scale}"
            momentum = rates.momentum
            assert momentum is None or 0 <= momentum < 1, f"{who}: momentum {momentum}"
