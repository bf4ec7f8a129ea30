"""The training step that is rehearsed is the one that is made then, and leaves nothing behind."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from robustkit import registry, spec
from robustkit.attacks import PGD
from robustkit.core import loop
from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.parts import Parts
from robustkit.core.strategy import Scene
from robustkit.epsilons import Fixed
from robustkit.losses import LBGAT, Align, CrossEntropy, Mixed, Trades
from robustkit.objectives import KL
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.targets import Momentum, Natural, Universal
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP

seen: list[dict[str, Tensor]] = []
others: list[Any] = []


@spec
class Rehearsing:
    """A fixed radius; before, the step that will be made is rehearsed on the very images that the attack will find."""

    sets_step_size: ClassVar[bool] = False

    def __call__(self, scene: Scene) -> Budget:
        budget = Fixed()(scene)
        assert scene.attack is not None
        x, y = scene.batch.x, scene.batch.y
        x_adv = scene.attack(scene.predict, x, y, budget, scene.threat, scene.generator("attack"))
        predict: Any = scene.rehearse(budget, x_adv, *others)
        assert predict.model.training
        seen.append({key: tensor.clone() for key, tensor in predict.model.state_dict().items()})
        return budget

    def passes(self, progress: Progress) -> Passes:
        return Passes()


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Nothing seen yet. Only here is the schedule known: others try all there are, and it keeps no contract."""
    seen.clear()
    others.clear()
    registry("epsilon").register("test-rehearsing")(Rehearsing)  # conftest takes it back


def parts_of(**given: Any) -> Parts:
    recipe = tiny_recipe(**given)
    return load_parts(recipe, make_world(recipe, "cpu"))


def step(parts: Parts) -> None:
    position = parts.step % parts.steps_per_epoch
    size = parts.recipe.batch_size
    loop.train_step(parts, parts.order(parts.progress.epoch)[position * size : (position + 1) * size])


RECIPES = {
    "PGD-AT": {},
    "with Nesterov's momentum": {"optimizer": SGD(nesterov=True)},
    "TRADES": {"attack": PGD(steps=2, objective=KL(), start="gaussian"), "loss": Trades()},
    "a target": {"target": Natural(), "loss": Align()},
    "views in one batch": {"loss": Mixed()},
    "a companion": {"attack": PGD(steps=2, objective=KL(), start="gaussian"), "loss": LBGAT()},
    "AWP": {"weights": AWP()},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_step_is_the_one_that_is_made_then(name: str) -> None:
    parts = parts_of(epsilon=Rehearsing(), **RECIPES[name])
    before = {key: tensor.clone() for key, tensor in parts.model.state_dict().items()}
    step(parts)
    (rehearsed,), made = seen, parts.model.state_dict()
    assert all(torch.equal(rehearsed[key], made[key]) for key in made)
    assert any(not torch.equal(before[key], made[key]) for key, _ in parts.model.named_parameters())


def test_the_optimiser_has_no_history() -> None:
    """From the second step on, momentum makes the difference."""
    for momentum, same in ((0.9, False), (0.0, True)):
        seen.clear()
        parts = parts_of(epsilon=Rehearsing(), optimizer=SGD(momentum=momentum))
        step(parts)
        step(parts)
        made = parts.model.state_dict()
        assert all(torch.equal(seen[1][key], made[key]) for key in made) == same


@pytest.mark.parametrize("name", [*RECIPES, "a target that moves"])
def test_nothing_is_left_behind(name: str) -> None:
    """A run that rehearses every step is the run that does not, bit for bit."""
    given = {"target": Momentum(inner=Universal(), start=0.25), "loss": Align()}
    given = RECIPES.get(name, given)
    one, other = parts_of(epsilon=Rehearsing(), **given), parts_of(**given)
    for _ in range(5):
        step(one)
        step(other)
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_another_loss() -> None:
    """LAS-AWP rehearses with smoothed labels what it then trains without."""
    others.append(CrossEntropy(label_smoothing=0.3))
    one, other = parts_of(epsilon=Rehearsing()), parts_of(loss=CrossEntropy(label_smoothing=0.3))
    step(one)
    step(other)
    made = other.model.state_dict()
    assert all(torch.equal(seen[0][key], made[key]) for key in made)
    assert not all(torch.equal(made[key], tensor) for key, tensor in one.model.state_dict().items())
