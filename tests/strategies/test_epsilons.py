"""Epsilon schedules (ECAS sheet, section 2 and tests 1 to 6)."""

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from tiny import CLASSES, assert_same, batch, scene, snapshot, statistics, tiny_model, tracked, world
from torch import Tensor
from torch.distributions import Categorical

from robustkit.core.batch import Output, Passes, Progress
from robustkit.core.errors import SpecError
from robustkit.epsilons import ECAS, Cyclic, CyclicBatch, Fixed, Linear
from robustkit.functional import entropy
from robustkit.threats import Linf

INF = math.inf


def pixels(first: int, last: int) -> tuple[float, ...]:
    return tuple(k / 255 for k in range(first, last + 1))


def budget_at(
    schedule: Any, *, epoch: int = 0, position: int = 0, epochs: int = 20, per_epoch: int = 3
) -> tuple[Tensor, Any]:
    """The budget of one step: (radii, step sizes or None)."""
    given = scene(tiny_model(), step=epoch * per_epoch + position, epochs=epochs, steps_per_epoch=per_epoch)
    budget = schedule(given)
    assert budget.epsilon.shape == (6,) and budget.epsilon.dtype == torch.float32
    assert budget.steps is None and budget.weight is None
    return budget.epsilon, budget.step_size


class Says:
    """A `predict` whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, images: Tensor) -> Output:
        return Output(self.logits, self.logits, self.logits, self.logits.new_zeros(len(self.logits)))

    def using(self, mode: str) -> AbstractContextManager["Says"]:
        return nullcontext(self)


def test_fixed() -> None:
    epsilon, step_size = budget_at(Fixed(), epoch=7)
    assert torch.equal(epsilon, torch.full((6,), 8 / 255)) and step_size is None
    epsilon, step_size = budget_at(Fixed(value=0.25, step_fraction=0.2))
    assert torch.equal(epsilon, torch.full((6,), 0.25))
    torch.testing.assert_close(step_size, torch.full((6,), 0.05))
    assert Fixed()(scene(tiny_model(), threat=Linf(epsilon=0.3))).epsilon.unique().tolist() == pytest.approx([0.3])
    assert not Fixed().sets_step_size and Fixed(step_fraction=0.2).sets_step_size


def test_cyclic_is_a_sawtooth_over_epochs() -> None:
    for epoch in range(20):
        wanted = (3 + epoch % 10) / 255
        for position in (0, 2):
            epsilon, step_size = budget_at(Cyclic(), epoch=epoch, position=position)
            assert epsilon.tolist() == pytest.approx([wanted] * 6, rel=1e-6)
            assert step_size.tolist() == pytest.approx([0.2 * wanted] * 6, rel=1e-6)


def test_the_sheets_landmarks() -> None:
    """Epoch 99 (first drop) and 109 (last) train at 12/255, 104 at 7/255 (ECAS sheet 2.1)."""
    for epoch, k in ((99, 12), (104, 7), (109, 12)):
        assert float(budget_at(Cyclic(), epoch=epoch, epochs=110)[0][0]) == pytest.approx(k / 255, rel=1e-6)


def test_linear_hits_both_ends_and_grows_evenly() -> None:
    seen = [float(budget_at(Linear(), epoch=epoch, epochs=10)[0][0]) for epoch in range(10)]
    assert seen[0] == pytest.approx(3 / 255) and seen[-1] == pytest.approx(12 / 255)
    assert [b - a for a, b in pairwise(seen)] == pytest.approx([1 / 255] * 9, abs=1e-8)
    assert float(budget_at(Linear(), epochs=1)[0][0]) == pytest.approx(3 / 255)
    assert float(budget_at(Linear(), epoch=5, epochs=10)[1][0]) == pytest.approx(0.2 * 8 / 255)


def test_cyclic_batch_counts_steps_of_the_whole_run() -> None:
    values = pixels(3, 12)
    for epoch in range(4):
        for position in range(7):
            epsilon, _ = budget_at(CyclicBatch(values=values), epoch=epoch, position=position, per_epoch=7)
            assert float(epsilon[0]) == pytest.approx(values[(epoch * 7 + position) % 10], rel=1e-6)
    for epoch in range(20):
        theirs = budget_at(Cyclic(), epoch=epoch, per_epoch=1)
        ours = budget_at(CyclicBatch(), epoch=epoch, per_epoch=1)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_one_value_equals_fixed() -> None:
    for epoch in range(5):
        for schedule in (Cyclic(values=(8 / 255,)), CyclicBatch(values=(8 / 255,))):
            ours, theirs = budget_at(schedule, epoch=epoch), budget_at(Fixed(step_fraction=0.2), epoch=epoch)
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_entropy(classes: int) -> None:
    logits = 3 * torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(entropy(logits), Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy(logits + 37.5), entropy(logits), atol=1e-4, rtol=0)
    assert entropy(torch.zeros(3, classes)).tolist() == pytest.approx([math.log(classes)] * 3, abs=1e-6)
    certain = torch.full((2, classes), -1e4)
    certain[:, 0] = 1e4
    assert entropy(certain).tolist() == [0.0, 0.0]
    assert torch.isfinite(entropy(certain.bfloat16())).all()
    assert entropy(logits.bfloat16()).dtype == torch.float32


def test_ecas_without_thresholds_is_cyclic() -> None:
    for epoch in range(12):
        ours = budget_at(ECAS(h_low=-INF, h_high=INF), epoch=epoch)
        theirs = budget_at(Cyclic(), epoch=epoch)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_ecas_shrinks_the_uncertain_and_bumps_the_certain() -> None:
    values = pixels(3, 12)
    for epoch in (0, 4, 9):
        cycle = 0.2 * values[epoch]
        epsilon, step_size = budget_at(ECAS(h_low=-INF, h_high=-INF), epoch=epoch)
        assert epsilon.tolist() == pytest.approx([values[0]] * 6)
        assert step_size.tolist() == pytest.approx([cycle] * 6)
        epsilon, step_size = budget_at(ECAS(h_low=INF, h_high=INF), epoch=epoch)
        assert len(epsilon.unique()) == 1
        assert any(float(epsilon[0]) == pytest.approx(k / 255) for k in (10, 11, 12))
        assert step_size.tolist() == pytest.approx([cycle] * 6)  # the epoch's, not the image's own


def test_ecas_from_the_definition() -> None:
    """Image by image, from entropies worked out by `Categorical`."""
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 9, 40)[:, None]
    schedule = ECAS(step_follows="sample")
    given = scene(tiny_model(), batch(40), step=17, steps_per_epoch=3, where=world(40))  # epoch 5: 8/255
    budget = schedule(attrs.evolve(given, predict=Says(logits)))
    plain = Categorical(logits=logits).entropy().tolist()
    bumped = {round(255 * e) for e, h in zip(budget.epsilon.tolist(), plain, strict=True) if h < 1.3}
    assert len(bumped) == 1 and bumped <= {10, 11, 12}
    wanted = [bumped.copy().pop() if h < 1.3 else 3 if h > 2.274 else 8 for h in plain]
    assert {3, 8} <= set(wanted)
    assert [255 * e for e in budget.epsilon.tolist()] == pytest.approx(wanted, rel=1e-5)
    assert budget.step_size.tolist() == pytest.approx([0.2 * k / 255 for k in wanted], rel=1e-5)


def test_ecas_thresholds_are_strict() -> None:
    """An entropy that equals a threshold is not adjusted."""
    for threshold in (1.3, 2.274, 0.5):
        uncertainty = torch.tensor([threshold, threshold - 1e-3, threshold + 1e-3])
        ours = ECAS(h_low=threshold, h_high=INF).adjust(uncertainty, 0.5, 0.9)
        assert ours.epsilon.tolist() == pytest.approx([0.5, 0.9, 0.5])
        ours = ECAS(h_low=-INF, h_high=threshold).adjust(uncertainty, 0.5, 0.9)
        assert ours.epsilon.tolist() == pytest.approx([0.5, 0.5, 3 / 255])


@pytest.mark.parametrize(
    ("values", "big", "members"),
    [(pixels(3, 12), 3, {10, 11, 12}), (pixels(5, 9), 2, {8, 9}), (pixels(6, 15), 3, {13, 14, 15})],
    ids=["pgd", "trades", "awp"],
)
def test_ecas_draws_from_the_big_ones_evenly(values: tuple[float, ...], big: int, members: set[int]) -> None:
    schedule = ECAS(values=values, big=big, h_low=INF)
    given = attrs.evolve(scene(tiny_model(), batch(2)), predict=Says(torch.zeros(2, CLASSES)))
    draws = 3000
    counts = dict.fromkeys(members, 0)
    for step in range(draws):
        epsilon = schedule(attrs.evolve(given, progress=Progress.at(step, 100, 30))).epsilon
        assert float(epsilon[0]) == float(epsilon[1])
        counts[round(255 * float(epsilon[0]))] += 1
    share = 1 / len(members)
    for count in counts.values():
        assert abs(count - draws * share) < 3 * math.sqrt(draws * share * (1 - share)), counts


def test_ecas_draw_is_a_function_of_the_step() -> None:
    schedule = ECAS(h_low=INF)
    first = [float(schedule(scene(tiny_model(), step=step)).epsilon[0]) for step in range(12)]
    again = [float(schedule(scene(tiny_model(), step=step)).epsilon[0]) for step in range(12)]
    other = [float(schedule(scene(tiny_model(), step=step, where=world(seed=1))).epsilon[0]) for step in range(12)]
    assert first == again != other
    assert len(set(first)) > 1


@pytest.mark.parametrize("mode", ["train", "train-frozen", "eval"])
def test_ecas_moves_statistics_in_mode_train_alone(mode: str) -> None:
    model = tiny_model()
    before, seen = snapshot(model), tracked(model)
    ECAS(mode=mode)(scene(model))
    if mode == "train":
        assert tracked(model) == seen + 1
        means = {name: value for name, value in statistics(model).items() if "running" in name}
        assert all(not torch.equal(value, before[f"state {name}"]) for name, value in means.items())
        after = {
            name: before[name] if "running" in name or "tracked" in name else value
            for name, value in snapshot(model).items()
        }
        assert_same(before, after)  # weights, gradients and flags never
    else:
        assert_same(before, snapshot(model))


def test_ecas_modes_read_other_entropies() -> None:
    """The mode matters: batch statistics and running ones give different predictions."""
    model = tiny_model()
    given = scene(model)
    wanted = {}
    for mode in ("eval", "train-frozen"):
        with torch.no_grad(), given.predict.using(mode) as predict:
            wanted[mode] = Categorical(logits=predict(given.batch.x).logits).entropy()
    assert not torch.allclose(wanted["eval"], wanted["train-frozen"], atol=1e-3)
    for mode, uncertainty in wanted.items():
        middle = float(uncertainty.median()) + 1e-4
        found = ECAS(mode=mode, h_low=-INF, h_high=middle)(scene(model, step=12)).epsilon
        assert (found < 4 / 255).tolist() == (uncertainty > middle).tolist()


def test_ecas_leaves_the_model_as_it_was_after_an_exception() -> None:
    model = tiny_model()
    before = snapshot(model)
    given = scene(model)
    broken = attrs.evolve(given, batch=given.batch._replace(x=torch.rand(6, 7, 6, 6)))
    with pytest.raises(RuntimeError):
        ECAS(mode="eval")(broken)
    assert_same(before, snapshot(model))


def test_ecas_refuses_what_makes_no_sense() -> None:
    for wrong in ({"values": ()}, {"values": (0.2, 0.1)}, {"big": 11}, {"big": 0}, {"mode": "test"}):
        with pytest.raises(SpecError):
            ECAS(**wrong)


@pytest.mark.parametrize("empty", [Cyclic, CyclicBatch])
def test_a_cycle_needs_values(empty: type) -> None:
    with pytest.raises(SpecError, match="values"):
        empty(values=())


def test_costs() -> None:
    progress = scene(tiny_model()).progress
    for schedule in (Fixed(), Linear(), Cyclic(), CyclicBatch()):
        assert schedule.passes(progress) == Passes()
    assert ECAS().passes(progress) == Passes(forward=1)
    assert all(schedule.sets_step_size for schedule in (Linear(), Cyclic(), CyclicBatch(), ECAS()))


@pytest.mark.parametrize("schedule", [Fixed(), Linear(), Cyclic(), CyclicBatch()])
def test_the_others_never_look_at_the_model(schedule: object) -> None:
    model = tiny_model()
    before = snapshot(model)
    schedule(scene(model))
    assert_same(before, snapshot(model))


def test_ecas_says_whose_radius_it_adjusts() -> None:
    """By entropy, whatever the radius turns out to be: where the cycle stands at the smallest, or at the one drawn."""
    uncertainty = torch.tensor([0.1, 1.3, 2.0, 2.274, 2.3])
    for cycle, bumped in ((8 / 255, 11 / 255), (3 / 255, 11 / 255), (11 / 255, 11 / 255)):
        adjusted = ECAS().adjust(uncertainty, cycle, bumped).adjusted
        assert adjusted.tolist() == [1, 0, 0, 0, -1] and adjusted.dtype == torch.int64
    assert ECAS(h_low=INF, h_high=-INF).adjust(uncertainty, 0.1, 0.2).adjusted.tolist() == [1] * 5  # as its radius
    for schedule in (Fixed(), Linear(), Cyclic(), CyclicBatch()):
        assert schedule(scene(tiny_model())).adjusted is None
