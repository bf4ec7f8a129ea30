"""KL divergence from the prediction on the natural image."""

from __future__ import annotations

from torch import Tensor

from robustkit.core.batch import Output
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Reference
from robustkit.functional import kl_from_logits


@registry("objective").register("kl")
@spec
class KL:
    """KL(f(x) || f(x')), from the prediction on the natural image (TRADES, Zhang et al. 2019).

    Its gradient is zero at x itself: start from noise.
    """

    @property
    def needs_reference(self) -> bool:
        return True

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        assert reference.natural is not None
        return kl_from_logits(reference.natural.logits.detach(), output.logits)
