"""Half a cosine, from the full rate to nothing, perhaps after a straight rise."""

from __future__ import annotations

import math
from typing import Literal

from robustkit.core.batch import Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Rates


@registry("schedule").register("cosine")
@spec
class Cosine:
    """Half a cosine, from the full rate towards 0 (Loshchilov and Hutter 2017), moved on `every` epoch or step.

    Before it the rate rises straight from 0, for the share `warm_up` of training.
    """

    every: Literal["epoch", "step"] = "epoch"
    warm_up: float = setting(default=0.0, at_least=0, below=1)

    def __call__(self, progress: Progress) -> Rates:
        by_epoch = self.every == "epoch"
        share = progress.epoch / progress.epochs if by_epoch else progress.step / progress.total_steps
        if share < self.warm_up:
            return Rates(share / self.warm_up)
        return Rates((1 + math.cos(math.pi * (share - self.warm_up) / (1 - self.warm_up))) / 2)
