"""Optimisers: torch's, with the groups and decays that the papers' code has."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

from robustkit.core.errors import SpecError
from robustkit.core.loop import train_step
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.testing import tiny_recipe


def groups(model: nn.Module, **options: float) -> list[dict]:
    return [{"params": list(model.backbone.parameters())}, {"params": list(model.head.parameters()), **options}]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov: bool) -> None:
    """Decay on every parameter, BatchNorm and biases too."""
    ours, theirs = tiny_model(), tiny_model()
    spec = SGD(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    mine = spec.build(groups(ours))
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    for turn in range(4):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            generator = torch.Generator().manual_seed(turn)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_decay_may_spare_norms_and_biases() -> None:
    model = tiny_model()
    optimizer = SGD(decay_norm_and_bias=False, weight_decay=0.01).build(groups(model, lr_scale=2.0))
    seen = {
        id(p): (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(seen) == len(list(model.parameters())) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        assert seen[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0, 2.0 if name.startswith("head") else 1.0)


def test_a_groups_own_decay_wins() -> None:
    optimizer = SGD(weight_decay=0.01).build(groups(tiny_model(), weight_decay=0.0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_refused() -> None:
    for wrong in (
        {"lr": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"nesterov": True, "momentum": 0.0},
        {"clip_norm": 0.0},
    ):
        with pytest.raises(SpecError):
            SGD(**wrong)


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_clipping_is_torchs(clip_norm: float) -> None:
    """All parameters' gradient as one, before the step; what is reported is its length as it was."""
    plain, clipped = (
        load_parts(given, make_world(given, "cpu"))
        for given in (tiny_recipe(optimizer=SGD(clip_norm=clip)) for clip in (None, clip_norm))
    )
    rows = plain.order(0)[:16]
    plain.optimizer.step = lambda: None  # type: ignore[method-assign]  gradients only
    for parts in (plain, clipped):
        train_step(parts, rows)
    length = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip_norm)
    assert (length > clip_norm) == (clip_norm < 1)
    for mine, theirs in zip(clipped.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert float(plain.totals.gradients[0]) == float(clipped.totals.gradients[0]) == pytest.approx(float(length))
