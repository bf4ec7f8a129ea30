"""Short trainings on real images (handwritten digits): what the UIAT sheet's tests 33 and 34 expect to see."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustkit.attacks import PGD
from robustkit.core.batch import Batch, Budget, Part, Progress
from robustkit.core.loop import train_step
from robustkit.core.model import Model
from robustkit.core.order import epoch_order
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, Validation
from robustkit.core.rng import whole
from robustkit.core.strategy import Scene
from robustkit.datasets import Digits
from robustkit.engine import Predictor
from robustkit.losses import Align, CrossEntropy
from robustkit.objectives import InverseObjective
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Inverse, Universal
from robustkit.threats import Linf

RADIUS = 0.25  # in pixels of [0, 1]: digits of 8 x 8 are easy


def trained(epochs: int, **settings: Any) -> Parts:
    plain = {
        "data": Digits(),
        "model": Model(backbone="convnet_small"),
        "threat": Linf(epsilon=RADIUS),
        "attack": None,
        "loss": CrossEntropy(),
        "schedule": OneCycle(),
        "optimizer": SGD(lr=0.1),
        "epochs": epochs,
        "batch_size": 64,
        "validation": Validation(images=0),
    }
    recipe = Recipe(**(plain | settings))
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    while parts.step < epochs * parts.steps_per_epoch:
        position = parts.step % parts.steps_per_epoch
        order = epoch_order(parts.rows, recipe.seed, parts.progress.epoch)
        train_step(parts, order[position * 64 : (position + 1) * 64])
    return parts


def held_out(parts: Parts, count: int = 200) -> tuple[Tensor, Tensor]:
    rows = torch.arange(count)
    return parts.data.test.fetch(rows).float() / 255, parts.data.test.labels[rows]


def judged(parts: Parts, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode."""
    with torch.no_grad(), parts.model.using("eval"):
        logits = parts.model(x).logits
    return float((logits.argmax(dim=1) == y).float().mean()), float(F.cross_entropy(logits, y))


def attacked(parts: Parts, x: Tensor, y: Tensor, steps: int) -> Tensor:
    predict = Predictor(parts.model, x.device)
    budget = Budget(torch.full((len(x),), RADIUS), torch.full((len(x),), RADIUS / 10))
    return PGD(steps=steps)(predict, x, y, budget, parts.recipe.threat, whole(x, 0))


def test_natural_training_is_accurate_and_not_robust() -> None:
    """34: PGD-20 takes nearly everything; an inverse perturbation gives (nearly) everything back."""
    parts = trained(4)
    x, y = held_out(parts)
    accuracy, loss = judged(parts, x, y)
    assert accuracy > 0.95
    robust, worse = judged(parts, attacked(parts, x, y, 20), y)
    assert robust < 0.05 and worse > 5 * loss
    scene = Scene(
        predict=Predictor(parts.model, x.device),
        batch=Batch(x, y, torch.arange(len(x))),
        progress=Progress.at(0, 1, 1),
        threat=Linf(),
        attack=None,
        world=parts.world,
        part=Part(0, len(x), len(x)),
    )
    found = Inverse(radius=0.1, step_size=0.04, objective=InverseObjective(beta=0)).prepare(
        scene, Budget(torch.full((len(x),), RADIUS)), x
    )
    easier, better = judged(parts, found, y)
    assert easier >= accuracy and easier > 0.99 and better < loss


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_universal_perturbations_make_their_classes_easier(beta: float) -> None:
    """33: CE on x + z_y < CE on x < CE on x_adv after some seventy steps, and the accuracies accordingly."""
    target = Universal(radius=0.1, objective=InverseObjective(beta=beta))
    parts = trained(3, attack=PGD(steps=2), loss=Align(weight=1.0), target=target)
    x, y = held_out(parts)
    z = parts.strategies["target"].z
    assert float(z.abs().max()) <= 0.1 + 1e-6
    easier = (x + z[y]).clamp(0, 1)
    found = [judged(parts, images, y) for images in (easier, x, attacked(parts, x, y, 10))]
    losses, accuracies = [loss for _, loss in found], [accuracy for accuracy, _ in found]
    assert losses[0] < losses[1] < losses[2]
    assert accuracies[0] >= accuracies[1] > accuracies[2]
    assert accuracies[1] > 0.85 and accuracies[2] > 0.2  # and it did train robustly
    wrong = (x + z[(y + 1) % 10]).clamp(0, 1)  # another class's perturbation does not help
    assert judged(parts, wrong, y)[1] > losses[0]
