"""What an optimiser must do."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.core.model import RobustModel
from robustkit.core.strategy import Optimizer
from robustkit.testing.common import name_of
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage


def check_optimizer(optimizer: Optimizer) -> None:
    """Every parameter is moved, at its group's rate; the state is tensors and numbers, and can be loaded again."""
    check_spec(optimizer)
    who, stage = name_of(optimizer), Stage.set()
    assert optimizer.lr > 0, f"{who}: lr must be above 0, is {optimizer.lr}"
    stage.model.requires_grad_()

    def made(model: RobustModel) -> torch.optim.Optimizer:
        head = {"params": list(model.head.parameters()), "lr_scale": 0.5, "weight_decay": 0.0}
        return optimizer.build([{"params": list(model.backbone.parameters())}, head])

    built = made(stage.model)
    held = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in stage.model.parameters()), f"{who}: a parameter is missing or twice"
    heads = {id(p) for p in stage.model.head.parameters()}
    for group in built.param_groups:
        if any(id(p) in heads for p in group["params"]):
            assert group.get("lr_scale") == 0.5, f"{who} loses the group's option lr_scale"
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    for _ in range(2):
        for p in stage.model.parameters():
            p.grad = torch.full_like(p, 0.5)
        built.step()
    for name, p in stage.model.named_parameters():
        assert not torch.equal(p, before[name]), f"{who} does not move {name}"
    for state in built.state.values():
        for name, value in state.items():
            assert value is None or isinstance(value, (Tensor, int, float)), f"{who}: state '{name}' is no tensor"
