"""The margin between the best wrong class and the true one."""

from __future__ import annotations

from torch import Tensor

from robustkit.core.batch import Output
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Reference
from robustkit.functional import margin


@registry("objective").register("margin")
@spec
class Margin:
    """Largest wrong logit minus the true one (Carlini and Wagner 2017, as an L-inf objective).

    With `clamp` the value stops growing at 0, so an image that is misclassified already stays where it is.
    """

    clamp: bool = True

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        value = margin(output.logits, y)
        return value.clamp_max(0) if self.clamp else value
