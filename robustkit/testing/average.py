"""What a weight average must do."""

from __future__ import annotations

from robustkit.core.strategy import WeightAverage
from robustkit.testing.common import name_of
from robustkit.testing.spec import check_spec


def check_average(average: WeightAverage) -> None:
    """A share of the old average between 0 and 1, whatever the step."""
    check_spec(average)
    for total in (1, 8, 1000):
        for step in {1, 2, max(1, total // 2), total}:
            decay = average.decay(step, total)
            assert 0 <= decay <= 1, f"{name_of(average)}: the old average keeps {decay} after step {step} of {total}"
