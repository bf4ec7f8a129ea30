"""AdamPGD against torch's Adam, image by image."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tiny import Plain, images, labels, tiny_model
from torch import Tensor
from torch.nn import functional as F

from robustkit.attacks import AdamPGD
from robustkit.core.batch import Budget, Output
from robustkit.core.registry import registry
from robustkit.core.rng import whole
from robustkit.core.spec import spec
from robustkit.core.strategy import Reference
from robustkit.objectives import KL
from robustkit.testing import check
from robustkit.threats import L2, Linf

RADII = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.3, 0.6], dtype=torch.float64)


@spec
class Exactly:
    """KL up to a constant, in float64, where Adam would magnify the rounding of float32."""

    needs_reference: ClassVar[bool] = True

    def __call__(self, output: Output, y: Tensor, reference: Reference) -> Tensor:
        assert reference.natural is not None
        return -(reference.natural.logits.softmax(dim=1) * output.logits.log_softmax(dim=1)).sum(dim=1)


def by_torch(model: Any, start: Tensor, x: Tensor, y: Tensor, epsilon: float, attack: AdamPGD, norm: str) -> Tensor:
    """One image (1, C, H, W)."""
    x_adv = start.clone().requires_grad_()
    natural = model(x).logits.detach().softmax(dim=1)
    adam = torch.optim.Adam([x_adv], lr=attack.lr, eps=1e-9, maximize=True)
    for number in range(attack.steps):
        adam.param_groups[0]["lr"] = attack.lr * (1.0 if number < attack.drop else 0.1)
        logits = model(x_adv).logits
        if attack.objective.needs_reference:
            value = (natural * (natural.log() - logits.log_softmax(dim=1))).sum()
        else:
            value = F.cross_entropy(logits, y)
        (x_adv.grad,) = torch.autograd.grad(value, x_adv)
        adam.step()
        with torch.no_grad():
            move = x_adv - x
            if norm == "Linf":
                move = move.clamp(-epsilon, epsilon)
            elif move.norm() > epsilon:
                move = move * epsilon / move.norm()
            x_adv.copy_((x + move).clamp(0, 1))
    return x_adv.detach()


@pytest.mark.parametrize("threat", [Linf(), L2()], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("with_reference", [False, True])
def test_by_torch(with_reference: bool, threat: Any) -> None:
    registry("objective").register("test-exactly")(Exactly)  # conftest takes it back
    attack = AdamPGD(steps=4, drop=2, lr=0.02, objective=Exactly()) if with_reference else AdamPGD()
    model, x = tiny_model().double().eval(), images(6).double()
    found = attack(Plain(model), x, labels(6), Budget(RADII), threat, whole(x, 7))
    start = threat.random(x, RADII, whole(x, 7))
    for row, epsilon in enumerate(RADII.tolist()):
        one = slice(row, row + 1)
        expected = by_torch(model, start[one], x[one], labels(6)[one], epsilon, attack, threat.norm)
        torch.testing.assert_close(found[one], expected, atol=1e-9, rtol=0)
    assert torch.equal(found[0], x[0])


def test_it_climbs() -> None:
    """The loss it ends with exceeds that of where it began, and of the natural images."""
    model, x, y = tiny_model().eval(), images(32), labels(32)
    budget = Budget(torch.full((32,), 0.1))
    found = AdamPGD()(Plain(model), x, y, budget, Linf(), whole(x, 7))
    start = Linf().random(x, budget.epsilon, whole(x, 7))
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(images).logits, y)) for images in (x, start, found)]
    assert losses[2] > max(losses[:2])


def test_contract() -> None:
    for attack in (AdamPGD(), AdamPGD(steps=1, drop=0), AdamPGD(objective=KL(), mode="train-frozen")):
        check(attack)
