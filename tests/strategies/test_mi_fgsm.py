"""MI-FGSM against a naive loop, image by image (Dong et al., CVPR 2018, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LinearModel, Plain, images, labels, tiny_model
from torch import Tensor
from torch.nn import functional as F

from robustkit import px
from robustkit.attacks import MIFGSM, PGD
from robustkit.core.batch import Budget
from robustkit.core.rng import whole
from robustkit.testing import check
from robustkit.threats import L2, Linf

RADII = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.3, 0.6], dtype=torch.float64)


def attacked(attack: Any, model: Any, x: Tensor, threat: Any) -> Tensor:
    return attack(Plain(model), x, labels(len(x)), Budget(RADII), threat, whole(x, 7))


def by_the_paper(model: Any, x: Tensor, y: Tensor, epsilon: float, steps: int, decay: float, norm: str) -> Tensor:
    """One image (1, C, H, W)."""
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        images = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images).logits, y), images)
        g = decay * g + gradient / gradient.abs().sum()
        x_adv = x_adv + epsilon / steps * (g.sign() if norm == "Linf" else g / g.norm())
        move = x_adv - x
        if norm == "Linf":
            move = move.clamp(-epsilon, epsilon)
        elif move.norm() > epsilon:
            move = move * epsilon / move.norm()
        x_adv = (x + move).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("threat", [Linf(), L2()], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_by_the_paper(decay: float, threat: Any) -> None:
    model, x = tiny_model().double().eval(), images(6).double()
    found = attacked(MIFGSM(steps=5, decay=decay), model, x, threat)
    for row, epsilon in enumerate(RADII.tolist()):
        one = slice(row, row + 1)
        expected = by_the_paper(model, x[one], labels(6)[one], epsilon, 5, decay, threat.norm)
        torch.testing.assert_close(found[one], expected, atol=1e-12, rtol=0)


def test_without_momentum_it_is_pgd() -> None:
    model, x = tiny_model().double().eval(), images(6).double()
    found = attacked(MIFGSM(steps=4, decay=0.0, step_size=2 * px), model, x, Linf())
    assert torch.equal(found, attacked(PGD(steps=4, start="clean", step_size=2 * px), model, x, Linf()))
    assert not torch.equal(found, attacked(MIFGSM(steps=4, step_size=2 * px), model, x, Linf()))


def test_an_image_without_a_gradient_stays() -> None:
    model, x = LinearModel(4, 72).double(), images(6).double()
    torch.nn.init.zeros_(model.weight)
    found = MIFGSM()(Plain(model), x, labels(6), Budget(RADII), Linf(), whole(x, 7))
    assert torch.equal(found, x)


@pytest.mark.parametrize("attack", [MIFGSM(), MIFGSM(steps=1), MIFGSM(decay=0.0, step_size=0.5), MIFGSM(mode="train")])
def test_contract(attack: MIFGSM) -> None:
    check(attack)
