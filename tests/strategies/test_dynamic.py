"""DAT against the sheet's text worked out an image at a time, FOSC against its limits; and the loss of DAT's code."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import Recorder
from test_passes import BATCH, one_step, parts_of, recipe
from tiny import Always, Counting, LinearModel, Plain, at_epoch, images, tiny_model
from torch import Tensor
from torch.nn import functional as F

from robustkit import Model, UserError, evolve
from robustkit.attacks import Dynamic
from robustkit.attacks.dynamic import fosc
from robustkit.core.batch import Budget, Part, Passes
from robustkit.core.errors import RecipeError
from robustkit.core.loop import step_passes
from robustkit.core.model import RobustModel
from robustkit.core.recipe import load_recipes
from robustkit.core.rng import Generator, derive, whole
from robustkit.engine import Predictor, count_passes
from robustkit.engine.graphs import Graphs
from robustkit.losses import CrossEntropy, SelfWeighted
from robustkit.optimizers import SGD
from robustkit.testing import check, tiny_recipe
from robustkit.threats import L2, Linf

ROOT = Path(__file__).parents[2]
COUNT, STEPS = 12, 10
RADII = torch.linspace(0.01, 0.3, COUNT, dtype=torch.float64)
THRESHOLDS = (0.0, 0.02, 0.1, 99.0)


def given() -> tuple[RobustModel, Tensor, Tensor]:
    x = images(COUNT).double()
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0  # the box is felt, by the start, too
    return tiny_model().double(), x, torch.arange(COUNT) % 4


def attacked(attack: Dynamic, predict: Any, x: Tensor, y: Tensor, budget: Budget | None = None) -> Tensor:
    return attack(predict, x, y, budget or Budget(RADII.to(x.dtype)), Linf(), whole(x, 3))


def by_the_sheet(
    model: RobustModel, x: Tensor, y: Tensor, threshold: float, *, about_start: bool = False, steps: int = STEPS
) -> tuple[Tensor, list[int]]:
    """Section 8.1 for each image by itself: what is returned, and how many steps it took."""
    model = model.eval()
    noise = 2 * whole(x, 3).uniform(x) - 1
    found, taken = [], []
    for i in range(len(x)):
        image, radius = x[i : i + 1], float(RADII[i])
        begun = image + radius * noise[i : i + 1]
        current, moves = begun, 0
        while moves < steps:
            current = current.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(current).logits, y[i : i + 1]), current)
            centre = begun if about_start else image
            c = radius * float(g.abs().sum()) - float(((current.detach() - centre) * g).sum())
            if moves and c <= threshold:
                break
            moved = current.detach() + radius / 4 * g.sign()
            current = (image + (moved - image).clamp(-radius, radius)).clamp(0, 1)
            moves += 1
        found.append(current.detach())
        taken.append(moves)
    model.train()
    return torch.cat(found), taken


@pytest.mark.parametrize(
    "attack",
    [Dynamic(), Dynamic(steps=3, threshold=0.0, until=None), Dynamic(center="start", threshold=0.05), Dynamic(steps=0)],
    ids=str,
)
def test_contract(attack: Dynamic) -> None:
    check(attack)


# FOSC


def test_fosc_in_its_limits() -> None:
    """ECAS 21: eps |g| in the centre, 0 where a linear loss is largest, 2 eps |g| where it is least."""
    g = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    epsilon = torch.linspace(0.0, 0.5, 6, dtype=torch.float64)
    size = torch.stack([e * one.abs().sum() for e, one in zip(epsilon, g, strict=True)])
    wide = epsilon.view(-1, 1, 1, 1)
    torch.testing.assert_close(fosc(g, torch.zeros_like(g), epsilon), size)
    torch.testing.assert_close(
        fosc(g, wide * g.sign(), epsilon), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(fosc(g, -wide * g.sign(), epsilon), 2 * size)
    assert torch.equal(fosc(torch.zeros_like(g), wide * g.sign(), epsilon), torch.zeros(6, dtype=torch.float64))


def test_fosc_is_not_negative_within_the_ball() -> None:
    """ECAS 21: with the clean centre; about another one it may be."""
    generator = torch.Generator().manual_seed(0)
    epsilon = torch.rand(500, generator=generator, dtype=torch.float64)
    g = torch.randn(500, 2, 3, 3, generator=generator, dtype=torch.float64)
    moved = (2 * torch.rand(500, 2, 3, 3, generator=generator, dtype=torch.float64) - 1) * epsilon.view(-1, 1, 1, 1)
    values = fosc(g, moved, epsilon)
    assert (values >= -1e-12).all()
    for i in range(0, 500, 100):
        by_hand = sum(
            float(epsilon[i]) * abs(a) - a * b
            for a, b in zip(g[i].flatten().tolist(), moved[i].flatten().tolist(), strict=True)
        )
        assert values[i].item() == pytest.approx(by_hand, abs=1e-12)
    assert (fosc(g, 2 * moved, epsilon) < 0).any()


def test_fosc_of_a_linear_model() -> None:
    """Two classes: the gradient is the same everywhere but for its size, so eps sign(g) is stationary at once."""
    model, x = LinearModel(2, 48, seed=1).double(), images(4, shape=(3, 4, 4)).double()
    y, epsilon = torch.tensor([0, 1, 0, 1]), torch.full((4,), 0.1, dtype=torch.float64)

    def value(moved: Tensor) -> Tensor:
        point = (x + moved).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(point).logits, y, reduction="sum"), point)
        return fosc(g, moved, epsilon)

    uphill = torch.stack([(model.weight[1 - true] - model.weight[true]).sign().view(3, 4, 4) for true in y.tolist()])
    torch.testing.assert_close(value(0.1 * uphill).detach(), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (value(torch.zeros_like(x)) > 1e-3).all()


# The attack


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("center", ["clean", "start"])
def test_a_batch_is_attacked_as_its_images_one_by_one(threshold: float, center: Any) -> None:
    """Each with its own loss, radius and end; a mean over the batch would stop them twelve times too early."""
    model, x, y = given()
    attack = Dynamic(threshold=threshold, center=center, until=None)
    wanted, taken = by_the_sheet(model, x, y, threshold, about_start=center == "start")
    predict = Counting(model)
    found = attacked(attack, predict, x, y)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    # An image is looked at once for each of its steps, and once more to find that it is final.
    looks = [min(moves + 1, STEPS) for moves in taken]
    alive = [sum(look > k for look in looks) for k in range(STEPS)]
    assert predict.sizes == [size for size in alive if size] and not found.requires_grad
    assert (min(taken) >= 1) and max(taken) <= STEPS


def test_images_stop_at_different_times() -> None:
    """What the test above compares is no trivial case; the higher the threshold, the sooner."""
    model, x, y = given()
    taken = {threshold: by_the_sheet(model, x, y, threshold)[1] for threshold in THRESHOLDS}
    assert set(taken[99.0]) == {1} and max(taken[0.02]) == STEPS
    assert len(set(taken[0.02])) >= 3 and len(set(taken[0.1])) >= 3
    for a, b in pairwise(THRESHOLDS):
        assert all(one >= other for one, other in zip(taken[a], taken[b], strict=True))
    assert taken[0.02] != by_the_sheet(model, x, y, 0.02, about_start=True)[1]


def test_values_do_not_depend_on_the_batch() -> None:
    """ECAS 21, the mean-CE bug: the same images, alone or among many, stop at the same points."""
    model, x, y = given()
    attack = Dynamic(threshold=0.05, until=None)
    together = attacked(attack, Plain(model), x, y)
    for a, b in ((0, 1), (0, 5), (5, COUNT)):
        draws = Generator(derive(3), Part(a, b, COUNT), x.device)
        found = attack(Plain(model), x[a:b], y[a:b], Budget(RADII[a:b]), Linf(), draws)
        torch.testing.assert_close(found, together[a:b], atol=1e-12, rtol=0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("center", ["clean", "start"])
def test_masked_images_are_those_that_leave(threshold: float, center: Any) -> None:
    model, x, y = given()
    attack = Dynamic(threshold=threshold, center=center, until=None)
    leaving = attacked(attack, Plain(model), x, y)
    masked = attacked(evolve(attack, mode="train-frozen"), Always(model), x, y)
    torch.testing.assert_close(masked, leaving, atol=1e-12, rtol=0)
    with count_passes(model) as count:
        attacked(evolve(attack, mode="train-frozen"), Plain(model), x, y)
    assert count.per_batch(COUNT) == attack.passes(at_epoch(0, 1)) == Passes(STEPS, STEPS)


def test_once_final_always_final() -> None:
    """In training mode an image's FOSC changes with the others: that does not wake it."""
    model, x, y = given()
    attack = Dynamic(threshold=0.1, until=None, mode="train-frozen")
    short = [attacked(evolve(attack, steps=number), Plain(model), x, y) for number in range(1, STEPS + 1)]
    still = [(a == b).flatten(1).all(dim=1) for a, b in pairwise(short)]
    for before, after in pairwise(still):
        assert (after | ~before).all()
    assert still[0].any() and not still[-1].all()


def test_ball_and_box() -> None:
    """ECAS 7."""
    model, x, y = given()
    radii = torch.linspace(0.0, 0.3, COUNT, dtype=torch.float64)
    for steps in (0, 1, 10):
        for threshold in (0.0, 0.05):
            attack = Dynamic(steps=steps, threshold=threshold, until=None)
            found = attacked(attack, Plain(model), x, y, Budget(radii))
            assert ((found - x).abs().flatten(1).amax(dim=1) <= radii + 1e-12).all()
            assert torch.equal(found[0], x[0]) and 0 <= found.min() <= found.max() <= 1


def test_step_sizes_and_numbers_of_steps_in_the_budget() -> None:
    model, x, y = given()
    attack = Dynamic(steps=99, threshold=0.05, until=None)
    numbers = torch.arange(COUNT) % 5
    found = attacked(attack, Plain(model), x, y, Budget(RADII, RADII / 4, numbers, max_steps=4))
    for number in range(1, 5):
        wanted, _ = by_the_sheet(model, x, y, 0.05, steps=number)
        rows = numbers == number
        torch.testing.assert_close(found[rows], wanted[rows], atol=1e-12, rtol=0)
    other = attacked(attack, Plain(model), x, y, Budget(RADII, RADII / 9, numbers, max_steps=4))
    assert not torch.equal(found, other)


def test_recorded_it_is_the_same() -> None:
    model = Model(backbone="convnet_small").build(tiny_recipe().head, 4, (3, 8, 8), 0).eval()
    record = Recorder()
    recording = Predictor(model, torch.device("cpu"), graphs=Graphs(record))
    plain = Predictor(model, torch.device("cpu"))
    attack = Dynamic(steps=3, threshold=0.1)
    for epoch in (0, 1, 60, 70, 100, 119):
        x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
        now, budget = attack.at(at_epoch(epoch, 120)), Budget(torch.full((6,), 0.01 * (1 + epoch % 7)))
        wanted = now(plain, x, y, budget, Linf(), whole(x, epoch))
        assert torch.equal(now(recording, x, y, budget, Linf(), whole(x, epoch)), wanted)
    assert (record.recorded, record.replayed) == (1, 1 + 4)


@pytest.mark.parametrize(("until", "epochs", "end"), [(100 / 120, 120, 100), (100.0, 120, 100), (1.0, 10, 10)])
def test_the_threshold_over_training(until: float, epochs: int, end: int) -> None:
    """ECAS 21: c_max - c_max t / T' in epoch t, counted from 0; 0.5 in the first, 0 from T' on."""
    attack = Dynamic(until=until)
    for epoch in range(epochs):
        now = attack.at(at_epoch(epoch, epochs))
        assert now.threshold == pytest.approx(max(0.0, 0.5 - 0.5 * epoch / end), abs=1e-15)
        assert now == now.at(at_epoch(0, epochs))
    assert attack.at(at_epoch(0, epochs)).threshold == 0.5
    assert end == epochs or attack.at(at_epoch(end, epochs)).threshold == 0.0


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"attack": Dynamic(), "threat": L2()}, "FOSC is for L-inf, the threat model is L2. .*threat=linf"),
        ({"attack": Dynamic(until=9.0)}, "attack.until: .*epoch 9"),
    ],
)
def test_refusals(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        tiny_recipe(**parts)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


# What a step costs


def test_costs() -> None:
    """Sheet 0.1 has 26: its eleventh gradient is of the iterate after the last step, where nothing is decided."""
    masked = Dynamic(mode="train-frozen")
    for attack, plain, weighted in ((masked, 23, 24), (evolve(masked, steps=11), 25, 26)):
        assert step_passes(recipe(attack=attack), at_epoch(1, 5)).units == plain
        parts = parts_of(recipe(attack=attack, loss=SelfWeighted()))
        units = []
        for _ in range(2 * parts.steps_per_epoch):
            declared = step_passes(parts.recipe, parts.progress)
            found, norms = one_step(parts)
            assert found == declared and norms == 1
            units.append(found.units)
        assert units == [plain] * parts.steps_per_epoch + [weighted] * parts.steps_per_epoch
    parts = parts_of(recipe(attack=Dynamic(), loss=SelfWeighted()))
    found, norms = one_step(parts)
    assert found.units <= step_passes(parts.recipe, at_epoch(0, 5)).units and norms == 1
    assert found.parameter_backward == 1 and found.forward * BATCH == round(found.forward * BATCH)


# Recipes


def test_recipes_by_the_sheet() -> None:
    """Section 8.1."""
    family = load_recipes(ROOT / "recipes" / "dat.py")
    assert set(family) == {"dat", "dat-code"}
    paper, code = family.values()
    for given in (paper, code):
        assert given.threat == Linf(epsilon=0.031) and given.epochs == 120 and given.batch_size == 128
        decay = SGD(lr=0.01, momentum=0.9, weight_decay=4e-3, decay_norm_and_bias=False)
        assert given.optimizer == decay
        rates = [given.schedule(at_epoch(epoch - 1, 120, 390)).lr_scale for epoch in (1, 59, 60, 99, 100, 120)]
        assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
        at = [given.attack.at(at_epoch(epoch, 120)).threshold for epoch in (0, 50, 99, 100, 119)]
        assert at == pytest.approx([0.5, 0.25, 0.005, 0, 0])
    assert (paper.attack.center, paper.loss) == ("clean", CrossEntropy())
    assert (code.attack.center, code.loss) == ("start", SelfWeighted())
