"""New strategy: how do parameters move?"""

from __future__ import annotations

from typing import Any

import torch

from robustkit import registry, setting, spec

__all__ = ["NewStrategy"]


@registry("optimizer").register("new-strategy")
@spec
class NewStrategy:
    """AdamW (Loshchilov and Hutter 2019), without weight decay on normalisations. `lr` is the largest rate."""

    lr: float = setting(default=0.002, above=0)
    weight_decay: float = setting(default=0.01, at_least=0)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = []
        for group in groups:
            options = {key: value for key, value in group.items() if key != "norm"}
            made.append({"weight_decay": 0.0 if group.get("norm") else self.weight_decay} | options)
        return torch.optim.AdamW(made, lr=self.lr)
