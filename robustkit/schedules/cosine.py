"""Half a cosine, from the full rate to nothing."""

from __future__ import annotations

import math
from typing import Literal

from robustkit.core.batch import Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Rates


@registry("schedule").register("cosine")
@spec
class Cosine:
    """Half a cosine, from the full rate towards 0 (Loshchilov and Hutter 2017), moved on `every` epoch or step."""

    every: Literal["epoch", "step"] = "epoch"

    def __call__(self, progress: Progress) -> Rates:
        by_epoch = self.every == "epoch"
        share = progress.epoch / progress.epochs if by_epoch else progress.step / progress.total_steps
        return Rates((1 + math.cos(math.pi * share)) / 2)
