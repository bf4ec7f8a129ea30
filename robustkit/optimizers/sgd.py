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

    `lr` is the largest rate: the schedule multiplies it. `decay_norm` false leaves the parameters of normalisations
    undecayed, `decay_norm_and_bias` false all one-dimensional ones. The gradient of all parameters together is
    shortened to `clip_norm` where it is longer (None: never).
    """

    lr: float = setting(default=0.1, above=0)
    momentum: float = setting(default=0.9, at_least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(default=5e-4, at_least=0)
    clip_norm: float | None = setting(default=None, above=0)
    decay_norm: bool = True
    decay_norm_and_bias: bool = True

    def validate(self) -> None:
        if self.nesterov and not self.momentum:
            raise SpecError("needs a momentum", place="SGD.nesterov", remedy="e.g. momentum=0.9")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        together: dict[tuple[tuple[str, Any], ...], list[Any]] = {}  # parameters by their options
        for group in groups:
            options = {key: value for key, value in group.items() if key not in ("params", "norm", "weight_decay")}
            spared = group.get("norm", False) and not self.decay_norm
            decay = 0.0 if spared else group.get("weight_decay", self.weight_decay)
            for parameter in group["params"]:
                flat = parameter.ndim <= 1 and not self.decay_norm_and_bias
                own = tuple(sorted({**options, "weight_decay": 0.0 if flat else decay}.items()))
                together.setdefault(own, []).append(parameter)
        split = [{"params": found, **dict(own)} for own, found in together.items()]
        fused = all(p.is_cuda for found in together.values() for p in found) or None  # one kernel instead of many
        return torch.optim.SGD(split, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)
