"""The objective of inverse adversarial examples: be easy."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Output
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Reference


@registry("objective").register("inverse")
@spec
class InverseObjective:
    """-[CE(f(x'), y) + beta (L1(F(x'), F(x)) - L1(F(x'), F(x_adv)))] (UIAT, CVPR 2023, section 3.1).

    F is the input of the head. `reduction` of the L1 terms over features is not in the paper: "mean" is our
    choice; "sum" makes the features dominate.
    """

    beta: float = setting(default=1.0, at_least=0)
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def needs_adversarial(self) -> bool:
        """Whether it compares with adversarial images too: then no attack can climb it (`PGD.check`)."""
        return self.beta > 0

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        value = F.cross_entropy(output.logits, y, reduction="none")
        if self.beta > 0:
            assert reference.natural is not None and reference.adversarial is not None
            value = value + self.beta * (
                self._distance(output.features, reference.natural.features)
                - self._distance(output.features, reference.adversarial.features)
            )
        return -value

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        gap = (a - b.detach()).abs()
        return gap.mean(dim=1) if self.reduction == "mean" else gap.sum(dim=1)
