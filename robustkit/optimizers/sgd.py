"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

import torch

from robustkit.core.errors import SpecError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec


@registry("optimizer").register("sgd")
@spec
class SGD:
    """Stochastic gradient descent with momentum; weight decay on all parameters, as the papers' code has it.

    `lr` is the largest rate: the schedule multiplies it. `decay_norm_and_bias` false leaves one-dimensional parameters
    undecayed.
    """

    lr: float = setting(default=0.1, above=0)
    momentum: float = setting(default=0.9, at_least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(default=5e-4, at_least=0)
    decay_norm_and_bias: bool = True

    def validate(self) -> None:
        if self.nesterov and not self.momentum:
            raise SpecError("needs a momentum", place="SGD.nesterov", remedy="e.g. momentum=0.9")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        split: list[dict[str, Any]] = []
        for group in groups:
            decay = group.get("weight_decay", self.weight_decay)
            if self.decay_norm_and_bias:
                split.append({**group, "weight_decay": decay})
            else:
                for flat in (False, True):
                    chosen = [p for p in group["params"] if (p.ndim <= 1) == flat]
                    split.append({**group, "params": chosen, "weight_decay": 0.0 if flat else decay})
        split = [group for group in split if group["params"]]
        return torch.optim.SGD(split, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
