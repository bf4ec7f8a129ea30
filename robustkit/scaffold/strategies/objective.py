"""New strategy: what does an attack climb?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.batch import Output
from robustkit.core.strategy import Reference

__all__ = ["NewStrategy"]


@registry("objective").register("new-strategy")
@spec
class NewStrategy:
    """A soft margin: log-sum-exp of the wrong logits, at `temperature`, minus the true one.

    Near 0 it is the margin to the largest wrong logit; warmer, all wrong classes count.
    """

    temperature: float = setting(default=1.0, above=0)
    needs_reference: ClassVar[bool] = False

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        true = output.logits.gather(1, y[:, None]).squeeze(1)
        wrong = output.logits.scatter(1, y[:, None], -torch.inf)
        return self.temperature * torch.logsumexp(wrong / self.temperature, dim=1) - true
