"""Robust overfitting: accuracy under attack falls on held-out images and rises on those trained on.

Ordinary in adversarial training (Rice et al., ICML 2020): the best checkpoint is not the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

WINDOW, STANDARD_ERRORS = 5, 2


class Seen(NamedTuple):
    """Accuracies under the validation attack, as shares: of held-out images, and of images trained on."""

    epoch: int
    robust: float
    training: float


def overfitting(report: dict[str, Any], images: int, training_images: int, course: dict[str, Any]) -> dict[str, Any]:
    """{"overfitting": ...} to add to the epoch's report where there is any, else {}.

    `course` is what is remembered from epoch to epoch; "overfitting" becomes the first epoch that is warned of.
    """
    now = Seen(report["epoch"], report["validation"]["robust"], report["training"]["robust"])
    course["recent"] = [*course.get("recent", ()), list(now)][-WINDOW:]
    if len(course["recent"]) < WINDOW:
        return {}
    now = mean([Seen(*seen) for seen in course["recent"]])
    best = Seen(*course.get("best", now))
    if now.robust >= best.robust:
        course["best"] = list(now)
    elif overfitted(now, best, images, training_images):
        course.setdefault("overfitting", now.epoch)
        return {"overfitting": {"best": best._asdict(), "now": now._asdict()}}
    return {}


def mean(recent: Sequence[Seen]) -> Seen:
    """Of several epochs, under the name of the last."""
    shares = [math.fsum(values) / len(recent) for values in zip(*recent, strict=True)]
    return Seen(recent[-1].epoch, *shares[1:])


def overfitted(now: Seen, best: Seen, images: int, training_images: int) -> bool:
    """Whether held-out accuracy has fallen since it was `best`, and training accuracy risen, by two standard errors.

    Both are means over WINDOW validated epochs: the best of many single epochs is the luckiest one, too. The errors are
    those of two accuracies on different images; on the same images, as here, differences have smaller ones.
    """
    falls, rises = best.robust - now.robust, now.training - best.training
    return falls > _error(now.robust, best.robust, images) and rises > _error(
        now.training, best.training, training_images
    )


def _error(one: float, other: float, images: int) -> float:
    return STANDARD_ERRORS * math.sqrt((one * (1 - one) + other * (1 - other)) / images)
