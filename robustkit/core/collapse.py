"""Catastrophic overfitting: from one epoch to the next, training in single steps protects against single steps alone.

Accuracy under several steps falls to nearly nothing, that under one step stays or rises (Wong et al., ICLR 2020).
"""

from __future__ import annotations

import math
from typing import NamedTuple

LEFT, KEPT = 0.5, 0.75
LEAST_FALL, STANDARD_ERRORS = 0.1, 2


class Seen(NamedTuple):
    """Accuracies of an epoch, as shares: under an attack of several steps, and under FGSM."""

    robust: float
    fgsm: float


def collapsed(now: Seen, best: Seen, images: int) -> bool:
    """Whether robustness has collapsed since the epoch in which it was `best`. Three things must come together:

    - less than half of it is left, by two standard errors of an accuracy on so many `images`. Ordinary robust
      overfitting takes a quarter at most (Rice et al. 2020: 53.5 to 45.6 % on CIFAR-10, 28.2 to 21.9 % on CIFAR-100);
    - the fall is more than 0.1: a network that says the same of all images has a robust accuracy, too;
    - more than three quarters of the accuracy under FGSM are left. What weakens a model as such, an epoch of small
      radii or of too high a rate, takes from both.
    """
    noise = STANDARD_ERRORS * math.sqrt(best.robust * (1 - best.robust) / images)
    fell = now.robust < LEFT * best.robust - noise and best.robust - now.robust > LEAST_FALL
    return fell and now.fgsm > KEPT * best.fgsm
