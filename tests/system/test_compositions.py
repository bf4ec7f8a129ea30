"""Any two strategies of different kinds compose and train at the declared price, or are refused with a reason."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from robustkit import UserError, evolve, load_recipe
from robustkit.attacks import PGD
from robustkit.core import checkpoint
from robustkit.core.batch import Passes
from robustkit.core.loop import step_passes, train_step
from robustkit.core.order import epoch_order
from robustkit.core.parts import Parts, assemble
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.spec import walk
from robustkit.core.world import World
from robustkit.data.images import Data
from robustkit.datasets import Synthetic
from robustkit.engine import count_passes
from robustkit.losses import Align
from robustkit.targets import Momentum, Natural, OneOff
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP

KINDS = (
    "threat",
    "epsilon",
    "attack",
    "objective",
    "target",
    "head",
    "loss",
    "weights",
    "average",
    "schedule",
    "optimizer",
)
DATA = Synthetic(train=36, test=4, classes=4, size=8, channels=1)
BATCH = 8


def choices(kind: str) -> list[Any]:
    """Every strategy of a kind, and none where a recipe may do without."""
    made = [small(registry(kind).get(name)()) for name in registry(kind).names()]
    return [*made, None] if kind in ("attack", "target", "average") else made


def small(strategy: Any) -> Any:
    """The strategy with at most two steps wherever it has a number of them."""
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(strategy)):
        value = getattr(strategy, field.name)
        if field.name == "steps" and isinstance(value, int):
            changes["steps"] = min(2, value)
        elif field.name == "steps" and isinstance(value, tuple):
            changes["steps"] = (1, 2)
        elif attrs.has(type(value)):
            changes[field.name] = small(value)
    return evolve(strategy, **changes)


def compose(**parts: Any) -> Recipe:
    """A tiny recipe with these parts; the others are what goes with them."""
    objective = parts.pop("objective", None)
    if objective is not None:
        attack = parts.get("attack", PGD(steps=2))
        if not hasattr(attack, "objective"):
            raise UserError("that attack has an objective of its own")
        parts["attack"] = evolve(attack, objective=objective)
    given = {"data": DATA, "batch_size": BATCH, "evaluation": (), "epochs": 2, **parts}
    return tiny_recipe(**given)


@cache
def data() -> Data:
    return DATA.load()


def assembled(recipe: Recipe) -> Parts:
    loaded = data()
    world = World(samples=len(loaded.train), training=0, classes=4, image_shape=loaded.train.shape, seed=recipe.seed)
    return assemble(recipe, loaded, world)


def step(parts: Parts) -> None:
    """The next step of training: what is counted is what is declared, and its numbers are numbers."""
    recipe, progress = parts.recipe, parts.progress
    before = [p.detach().clone() for p in parts.model.parameters()]
    position = progress.step % parts.steps_per_epoch
    rows = epoch_order(parts.rows, recipe.seed, progress.epoch)[position * BATCH : (position + 1) * BATCH]
    with count_passes(parts.model) as count:
        train_step(parts, rows)
    declared, counted = step_passes(recipe, progress), count.per_batch(BATCH)
    at_most = any(getattr(part, "stops_early", False) for _, part in walk(recipe))
    assert counted == declared or (at_most and counted.units <= declared.units), recipe
    after = list(parts.model.parameters())
    assert all(bool(p.isfinite().all()) for p in after), recipe
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved or recipe.schedule(progress).lr_scale == 0, recipe
    assert all(bool(t.isfinite().all()) for t in parts.totals.tensors().values()), recipe
    assert parts.model.training


def train_steps(recipe: Recipe, steps: int) -> None:
    """Trains so many steps of eight images."""
    parts = assembled(recipe)
    for _ in range(steps):
        step(parts)


def resumes(recipe: Recipe, file: Path) -> None:
    """A step, a checkpoint, a step: the same in a run that is built anew and goes on from the checkpoint."""
    whole = assembled(recipe)
    step(whole)
    checkpoint.write(file, whole.tensors(), {})
    step(whole)
    resumed = assembled(recipe)
    resumed.load(checkpoint.read(file)[0])
    resumed.step = 1
    step(resumed)
    ours, theirs = resumed.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, (recipe, differing)


PAIRS = list(combinations(KINDS, 2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda kind: kind)
def test_pairs(first: str, second: str) -> None:
    counts: Counter[str] = Counter()
    for one, other in product(choices(first), choices(second)):
        try:
            recipe = compose(**{first: one, second: other})
        except UserError as error:
            assert str(error).strip()
            counts["refused"] += 1
            continue
        train_steps(recipe, 1)
        counts["trained"] += 1
    print(f"{first} x {second}: {counts['trained']} pairs trained, {counts['refused']} refused")
    assert counts["trained"]
    assert counts["refused"] <= counts.total() / 2 or {first, second} <= {"loss", "target", "objective", "attack"}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda kind: kind)
def test_pairs_resume(first: str, second: str, tmp_path: Path) -> None:
    resumed = 0
    for one, other in product(choices(first), choices(second)):
        try:
            recipe = compose(**{first: one, second: other})
        except UserError:
            continue
        resumes(recipe, tmp_path / "last.safetensors")
        resumed += 1
    print(f"{first} x {second}: {resumed} pairs resumed")
    assert resumed


def attacks() -> list[Any]:
    """Every attack with every objective that it can have, its own (None) first."""
    found = []
    for attack in choices("attack"):
        name = "none" if attack is None else registry("attack").name_of(type(attack))
        found.append(pytest.param(attack, None, id=name))
        for objective in choices("objective") if hasattr(attack, "objective") else ():
            if objective != attack.objective:
                other = registry("objective").name_of(type(objective))
                found.append(pytest.param(attack, objective, id=f"{name}-on-{other}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", registry("epsilon").names())
@pytest.mark.parametrize(("attack", "objective"), attacks())
def test_full_product(
    attack: Any, objective: Any, epsilon: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """All compositions of the kinds that meet in a step. Averages and rates, which see no batch, come by turns."""
    given = {"attack": attack, "objective": objective, "epsilon": small(registry("epsilon").get(epsilon)())}
    kinds = ("threat", "target", "head", "loss", "weights")
    turns = cycle(product(choices("average"), choices("schedule"), choices("optimizer")))
    counts: Counter[str] = Counter()
    for parts in product(*map(choices, kinds)):
        try:
            recipe = compose(**given, **dict(zip(kinds, parts, strict=True)))
        except UserError as error:
            assert str(error).strip()
            counts["refused"] += 1
            continue
        average, schedule, optimizer = next(turns)
        resumes(evolve(recipe, average=average, schedule=schedule, optimizer=optimizer), tmp_path / "last.safetensors")
        counts["resumed"] += 1
    print(f"{request.node.name}: {counts['resumed']} trained and resumed, {counts['refused']} refused")


REFUSED = [
    ({"target": Natural(), "loss": registry("loss").get("trades")()}, "uses no target"),
    ({"target": None, "loss": Align()}, "needs a target"),
    ({"attack": PGD(step_size=0.01), "epsilon": registry("epsilon").get("ecas")()}, "both .* step size"),
    ({"attack": PGD(objective=registry("objective").get("inverse")())}, "compares with adversarial images"),
    ({"target": Momentum(start=5.0)}, "starts at epoch 5"),
    ({"target": OneOff(start=5.0)}, "starts at epoch 5"),
    ({"weights": AWP(start=5.0)}, "starts at epoch 5"),
    ({"target": registry("target").get("universal")(), "accumulate": 2}, "one step per batch"),
    ({"target": Momentum(), "accumulate": 2}, "one step per batch"),
    ({"weights": AWP(), "accumulate": 2}, "one step per batch"),
    ({"accumulate": 8}, "cannot split"),
]


@pytest.mark.parametrize(("parts", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_with_a_reason(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose(**parts)


TARGETS = [registry("target").get(name) for name in registry("target").names()]


@pytest.mark.parametrize("outer", [target for target in TARGETS if "inner" in {f.name for f in attrs.fields(target)}])
@pytest.mark.parametrize("inner", TARGETS)
def test_targets_in_targets(outer: Any, inner: Any) -> None:
    for start in (0.4, 0.5, 1.0):
        target = evolve(small(outer(inner=small(inner()))), start=start)
        train_steps(compose(target=target), 8)
        train_steps(compose(target=target, loss=Align(detach=False), weights=AWP()), 8)


def train_whole_recipes(seed: int, count: int) -> None:
    """Draws recipes, one strategy of every kind each, and trains those that are accepted."""
    random_ = random.Random(seed)
    accepted = 0
    for _ in range(count):
        parts = {kind: random_.choice(choices(kind)) for kind in KINDS}
        if not hasattr(parts["attack"], "objective"):
            del parts["objective"]
        if not parts["loss"].needs_target and random_.random() < 0.5:
            parts["target"] = None
        elif not parts["loss"].needs_target:
            parts["loss"] = Align(detach=random_.random() < 0.5)
        if parts["loss"].needs_target and parts["target"] is None:
            parts["target"] = Natural()
        try:
            recipe = compose(**parts)
        except UserError:
            continue
        train_steps(recipe, 8)
        accepted += 1
    print(f"{accepted} of {count} recipes drawn at random trained, the others were refused")
    assert accepted >= count / 3


def test_whole_recipes_quickly() -> None:
    train_whole_recipes(seed=0, count=30)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_whole_recipes(seed: int) -> None:
    train_whole_recipes(seed, count=60)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("name", registry("loss").names())
def test_in_pieces(name: str, accumulate: int) -> None:
    recipe = compose(loss=registry("loss").get(name)(), accumulate=accumulate)
    train_steps(recipe, 4)


def test_passes_count_from_nothing() -> None:
    assert step_passes(compose(attack=None), assembled(compose(attack=None)).progress) == Passes(1, 0, 1)


def test_neighbours_of_recipes_in_two_folders(tmp_path: Path) -> None:
    """recipes/cpu/x.py imports its own neighbour, although recipes/ has one of that name."""
    text = "from neighbour import N\nfrom robustkit.testing import tiny_recipe\nrecipe = tiny_recipe(epochs=N)\n"
    for epochs in (1, 2):
        folder = tmp_path / str(epochs)
        folder.mkdir()
        (folder / "neighbour.py").write_text(f"N = {epochs}\n", encoding="utf-8")
        (folder / "recipe.py").write_text(text, encoding="utf-8")
    assert [load_recipe(tmp_path / str(epochs) / "recipe.py").epochs for epochs in (1, 2, 1)] == [1, 2, 1]
