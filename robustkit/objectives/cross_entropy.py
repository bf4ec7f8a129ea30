"""Cross-entropy with the label."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Output
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Reference


@registry("objective").register("cross-entropy")
@spec
class CrossEntropyObjective:
    """Cross-entropy with the label (Madry et al. 2018)."""

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        return F.cross_entropy(output.logits, y, reduction="none")
