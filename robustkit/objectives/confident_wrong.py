"""Confidence in a wrong class: what an attack climbs that knows of a reject option."""

from __future__ import annotations

from torch import Tensor

from robustkit.core.batch import Output
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Reference


@registry("objective").register("confident-wrong")
@spec
class ConfidentWrong:
    """The largest logarithmic posterior among the wrong classes, max_{k != y} ln p_k.

    For models that reject what they are not sure of: an image gets past them only if it is misclassified with a high
    posterior, and attacks that stop at the boundary are no test of that (after Carlini and Wagner, AISec 2017).
    """

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        posteriors = output.logits.log_softmax(dim=1)
        return posteriors.scatter(1, y[:, None], -float("inf")).amax(dim=1)
