"""Gradients that leap: how long those of an epoch were, and whether one was out of all proportion."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

LEAP = 5.0
"""Twice what sound trainings reached, half of what one at two hundred times its rate did (docs/reliability.md)."""


def lengths(norms: Sequence[float], last: int, course: dict[str, Any]) -> dict[str, Any]:
    """An epoch's largest gradient norm, its step (counted from 1), and the median; "leap" where one is warned of.

    A leap is a norm of more than LEAP times the usual one: the highest median of the epochs before, or in the first its
    own. Not that of the moment: a net that fits its images has hardly a gradient on most batches, and one on some.

    Args:
        norms: one for each step of the epoch, 0 where none was made.
        last: the number of the epoch's last step.
        course: what is remembered from epoch to epoch; "leap" becomes the last step of the first epoch with a warning.
    """
    made = [norm for norm in norms if norm > 0]
    if not made:
        return {"largest": 0.0, "median": 0.0, "step": last}
    largest, middle = max(made), median(made)
    report = {"largest": largest, "median": middle, "step": last - len(norms) + 1 + norms.index(largest)}
    usual = course.get("usual", middle)
    if largest > LEAP * usual:
        report["leap"] = largest / usual
        course.setdefault("leap", last)
    course["usual"] = max(usual, middle)
    return report
