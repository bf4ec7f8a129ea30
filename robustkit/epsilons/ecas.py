"""ECAS: a cycle of radii, adjusted image by image by the entropy of the prediction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.errors import SpecError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Scene
from robustkit.epsilons.cyclic import ECAS_VALUES
from robustkit.functional import entropy


@registry("epsilon").register("ecas")
@spec
class ECAS:
    """Entropy-guided cyclic radii (ECAS, BMVC 2023, Eq. 2 and Algorithm 1).

    All images start from `values[epoch mod L]`. An image whose prediction is less certain than `h_high` (nats) gets
    the smallest radius; one more certain than `h_low` gets a radius drawn from the `big` largest ones, one draw for the
    whole batch. The step size is `step_fraction` of the epoch's radius, not of the image's own (`step_follows`
    "sample" changes that). `mode` is the mode of the entropy pass: the paper's code runs it in training mode, which
    moves BatchNorm statistics towards natural images; "train-frozen" and "eval" do not.
    """

    values: tuple[float, ...] = setting(default=ECAS_VALUES, at_least=0)
    big: int = setting(default=3, at_least=1)
    h_low: float = 1.3
    h_high: float = 2.274
    step_fraction: float = setting(default=0.2, above=0)
    step_follows: Literal["cycle", "sample"] = "cycle"
    mode: Mode = "train"

    def validate(self) -> None:
        if list(self.values) != sorted(self.values) or not self.values:
            raise SpecError("must be sorted, smallest first, and not empty", place="ECAS.values")
        if self.big > len(self.values):
            raise SpecError(f"must be at most the number of values, {len(self.values)}", place="ECAS.big")

    @property
    def sets_step_size(self) -> bool:
        return True

    def value(self, progress: Progress) -> float:
        """The cyclic radius of the epoch that `progress` stands in."""
        return self.values[progress.epoch % len(self.values)]

    def __call__(self, scene: Scene) -> Budget:
        with torch.no_grad(), scene.predict.using(self.mode) as predict:
            uncertainty = entropy(predict(scene.batch.x).logits)
        drawn = scene.generator("ecas").integer(self.big)
        return self.adjust(uncertainty, self.value(scene.progress), self.values[-self.big :][drawn])

    def adjust(self, uncertainty: Tensor, cycle: float, bumped: float) -> Budget:
        """The budget, from entropies (B,), the epoch's radius and the batch's draw from the big ones."""
        raised, lowered = uncertainty < self.h_low, uncertainty > self.h_high
        epsilon = torch.full_like(uncertainty, cycle)
        epsilon = torch.where(lowered, self.values[0], epsilon)
        epsilon = torch.where(raised, bumped, epsilon)
        step_size = epsilon if self.step_follows == "sample" else torch.full_like(uncertainty, cycle)
        adjusted = torch.where(raised, 1, -lowered.long())
        return Budget(epsilon, step_size * self.step_fraction, adjusted=adjusted)

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1)
