"""The loss of DAT's code against its formula, image by image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_passes import parts_of, recipe, rows
from tiny import assert_same, batch, scene, snapshot, tiny_model, tracked

from robustkit.attacks import PGD
from robustkit.core.batch import Budget, Part, Passes
from robustkit.core.loop import train_step
from robustkit.core.model import RobustModel
from robustkit.core.parts import Parts
from robustkit.core.rng import Generator
from robustkit.data.loader import make_batch
from robustkit.losses import CrossEntropy, SelfWeighted
from robustkit.optimizers import SGD
from robustkit.testing import check
from robustkit.weights import AWP


@pytest.mark.parametrize("mode", ["eval", "train", "train-frozen"])
def test_contract(mode: Any) -> None:
    check(SelfWeighted(mode=mode))


def losses(model: RobustModel, x: Any, y: Any) -> list[float]:
    """Minus the log of the probability of the label, one image at a time."""
    model = copy.deepcopy(model).eval()
    return [
        -float(model(image[None]).logits[0].log_softmax(0)[label].detach()) for image, label in zip(x, y, strict=True)
    ]


def test_value_and_gradient() -> None:
    """mean w CE with a constant w read in eval mode, from the second epoch on."""
    model, given = tiny_model().double(), batch()
    given = given._replace(x=given.x.double())
    x_adv = (given.x + 0.1).clamp(0, 1)
    loss, budget = SelfWeighted(), Budget(torch.full((6,), 0.1))
    for step in (0, 3, 4, 39):  # four steps an epoch
        stage = scene(model, given, step=step)
        before = snapshot(model)
        found = loss.prepare(stage, budget, x_adv)
        assert_same(before, snapshot(model))
        assert list(found.views) == ["adversarial"] and found.views["adversarial"] is x_adv
        with model.using("train-frozen"):
            outputs = {"adversarial": model(x_adv, given.y)}
            (ours,) = loss(outputs, None, given, found.extras, stage.progress).values()
            weights = losses(model, x_adv, given.y) if step >= 4 else [1.0] * 6
            log_p = model(x_adv).logits.log_softmax(dim=1)
            wanted = -sum(w * log_p[i, label] for i, (w, label) in enumerate(zip(weights, given.y, strict=True))) / 6
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)
            parameters = list(model.parameters())
            for a, b in zip(
                torch.autograd.grad(ours, parameters), torch.autograd.grad(wanted, parameters), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("mode", "moved"), [("eval", 0), ("train", 1), ("train-frozen", 0)])
def test_the_mode_is_that_of_the_weights(mode: Any, moved: int) -> None:
    model, given = tiny_model(), batch()
    stage, budget, loss = scene(model, given, step=4), Budget(torch.full((6,), 0.1)), SelfWeighted(mode=mode)
    count = tracked(model)
    weight = loss.prepare(stage, budget, given.x).extras["weight"]
    assert tracked(model) - count == moved and not weight.requires_grad and weight.shape == (6,)
    other = SelfWeighted(mode="train-frozen" if mode == "eval" else "eval").prepare(stage, budget, given.x)
    assert not torch.allclose(weight, other.extras["weight"])
    assert loss.preparation(stage.progress) == Passes(forward=1)
    assert loss.preparation(scene(model, given, step=3).progress) == Passes()


def plain_parts(**changes: Any) -> Parts:
    given = {"attack": PGD(steps=2), "optimizer": SGD(lr=0.1, momentum=0.0, weight_decay=0.0)}
    return parts_of(recipe(**given | changes))


def test_training_by_the_formula() -> None:
    """In the first epoch as cross-entropy; a step of the second is w - lr grad (mean w_i CE_i)."""
    ours, plain = plain_parts(loss=SelfWeighted(), attack=None), plain_parts(loss=CrossEntropy(), attack=None)
    for _ in range(ours.steps_per_epoch):
        for parts in (ours, plain):
            train_step(parts, rows(parts))
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True))
    chosen = rows(ours)
    draws = Generator(0, Part(0, len(chosen), len(chosen)), ours.world.device)
    given = make_batch(ours.train, chosen, device=ours.world.device, augmentation=None, generator=draws)
    model = copy.deepcopy(ours.model)
    weights = torch.tensor(losses(model, given.x, given.y))
    log_p = model.train()(given.x).logits.log_softmax(dim=1)
    value = -(weights * log_p[torch.arange(len(chosen)), given.y]).mean()
    gradients = torch.autograd.grad(value, list(model.parameters()))
    train_step(ours, chosen)
    for now, was, gradient in zip(ours.model.parameters(), model.parameters(), gradients, strict=True):
        torch.testing.assert_close(now.detach(), (was - 0.1 * gradient).detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"weights": AWP()}, {"accumulate": 2}], ids=lambda changes: " ".join(changes))
def test_it_composes(changes: dict[str, Any]) -> None:
    parts = plain_parts(loss=SelfWeighted(), **changes)
    for _ in range(2 * parts.steps_per_epoch):
        train_step(parts, rows(parts))
    assert all(bool(parameter.isfinite().all()) for parameter in parts.model.parameters())
