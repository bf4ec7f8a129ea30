"""CAT (ECAS sheet, sections 0.1, 0.2 and 8.2): the curriculum, and the attack on groups of equally many steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from test_passes import BATCH, parts_of, recipe, rows
from tiny import LinearModel, Plain, assert_same, batch, images, labels, scene, snapshot, tiny_model, tracked
from torch import Tensor
from torch.nn import functional as F

from robustkit import Recipe, UserError, evolve, judging, override, resume, run
from robustkit.attacks import PGD, RSFGSM, Grouped
from robustkit.core import checkpoint
from robustkit.core.batch import Budget, Mode, Output, Part, Passes
from robustkit.core.loop import step_passes, train_step
from robustkit.core.recipe import Validation
from robustkit.core.rng import Generator, whole
from robustkit.core.spec import from_json, to_json
from robustkit.display import Silent
from robustkit.engine import count_passes
from robustkit.epsilons import Curriculum, Fixed
from robustkit.epsilons.curriculum import Stages
from robustkit.losses import LBGAT
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.runs import evaluate_run
from robustkit.testing import tiny_recipe
from robustkit.threats import L2, Linf
from robustkit.weights import AWP

EPS = 8 / 255


pytestmark = pytest.mark.usefixtures("no_figures")


def at_stage(stage: int, spec: Curriculum | None = None) -> Stages:
    runtime = Stages(spec or Curriculum(stages=99))
    runtime.stage.fill_(stage)
    return runtime


def budget_of(
    stage: int, count: int, *, part: Part | None = None, step: int = 0, spec: Curriculum | None = None, **scenery: Any
) -> Budget:
    part = part or Part(0, count, count)
    given = scene(tiny_model(), batch(part.stop - part.start), step=step, **scenery)
    return at_stage(stage, spec)(attrs.evolve(given, part=part))


# The parts of a batch


@pytest.mark.parametrize("stage", [0, 1, 2, 7])
@pytest.mark.parametrize("count", [8, 23, 25, 200])
def test_parts_are_equal_and_the_last_takes_the_rest(stage: int, count: int) -> None:
    budget = budget_of(stage, count)
    assert budget.steps is not None and budget.steps.dtype == torch.int64 and budget.max_steps == stage
    sizes = Counter(budget.steps.tolist())
    each = count // (stage + 1)
    assert [sizes[part] for part in range(stage)] == stage * [each]
    assert sizes[stage] == count - stage * each


def test_all_processes_have_as_much_to_do() -> None:
    """Any run of k + 1 rows holds one of each part, and processes make the parts that one process makes."""
    whole_batch = budget_of(3, 43)
    steps = whole_batch.steps
    assert steps is not None
    assert all(sorted(steps[i : i + 4].tolist()) == [0, 1, 2, 3] for i in range(37))
    assert steps[40:].tolist() == [3, 3, 3]
    pieces = [budget_of(3, 43, part=Part(a, b, 43)) for a, b in ((0, 10), (10, 21), (21, 43))]
    for name in ("epsilon", "step_size", "steps"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole_batch, name))
    assert {piece.max_steps for piece in pieces} == {3}


def test_a_batch_of_fewer_images_than_parts() -> None:
    budget = budget_of(7, 5)
    assert budget.steps is not None and budget.steps.tolist() == [0, 1, 2, 3, 4] and budget.max_steps == 4


@pytest.mark.parametrize(("spec", "radius"), [(Curriculum(), 0.3), (Curriculum(value=0.1), 0.1)])
def test_the_radius_is_the_threat_s_or_its_own_and_nothing_for_clean_images(spec: Curriculum, radius: float) -> None:
    budget = budget_of(2, 9, spec=spec, threat=Linf(epsilon=0.3))
    torch.testing.assert_close(budget.epsilon, torch.tensor([0, radius, radius] * 3))
    assert budget.step_size is not None and budget.step_size[0] == 0
    budget = budget_of(0, 9, spec=spec, threat=Linf(epsilon=0.3))
    assert budget.max_steps == 0 and not budget.epsilon.any() and not budget.steps.any()  # type: ignore[union-attr]


def test_step_sizes_are_drawn_once_for_each_part_and_step() -> None:
    """(2 eps / l) U(1, 10 / l): range, mean and spread over 500 steps; other parts and steps draw anew."""
    stage, draws = 12, 500
    factors = torch.zeros(draws, stage + 1)
    for step in range(draws):
        budget = budget_of(stage, 39, step=step)
        assert budget.steps is not None and budget.step_size is not None
        for part in range(1, stage + 1):
            (size,) = set(budget.step_size[budget.steps == part].tolist())
            factors[step, part] = size * part / (2 * EPS)
    for part in range(1, stage + 1):
        low, high = sorted((1.0, 10 / part))
        drawn = factors[:, part]
        assert low - 1e-5 <= drawn.min() and drawn.max() <= high + 1e-5
        if part != 10:
            spread = (high - low) / 12**0.5
            assert drawn.mean() == pytest.approx((low + high) / 2, abs=4 * spread / draws**0.5)
            assert drawn.std() == pytest.approx(spread, rel=0.15)
            assert len(set(drawn.tolist())) > 0.9 * draws
    shares = (factors[:, 1:9] - 1) / (10 / torch.arange(1, 9) - 1)
    assert (torch.corrcoef(shares.T) - torch.eye(8)).abs().max() < 0.25


def test_a_step_draws_the_same_again() -> None:
    one, same, other = (budget_of(3, 8, step=step).step_size for step in (5, 5, 6))
    assert one is not None and other is not None
    assert torch.equal(one, same) and not torch.equal(one[1:4], other[1:4])


ATTACKS = [
    PGD(),
    PGD(start="gaussian", noise=0.1),
    PGD(objective=KL(), start="gaussian"),
    Grouped(),
    Grouped(inner=PGD(mode="train")),
]


@pytest.mark.parametrize("threat", [Linf(), L2()], ids=["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_part_0_is_exactly_clean(attack: Any, threat: Any) -> None:
    model = tiny_model()
    given = scene(model, batch(9), threat=threat)
    x, y = given.batch.x, given.batch.y
    x[0, 0, 0], x[3, 0, 0] = 0.0, 1.0
    for stage in (0, 2):
        budget = at_stage(stage)(given)
        x_adv = attack(given.predict, x, y, budget, threat, whole(x, 1))
        clean = budget.steps == 0
        assert torch.equal(x_adv[clean], x[clean])
        moved = (x_adv - x).flatten(1).abs().amax(dim=1) > 0
        assert bool(moved[~clean].all()) and int(clean.sum()) == (9 if stage == 0 else 3)


# Grouped


def cross_entropy(model: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x).logits, y, reduction="sum"), x)
    return gradient


def by_hand(model: Any, x: Tensor, y: Tensor, budget: Budget, noise: Tensor, groups: list[list[int]]) -> Tensor:
    """Group by group: uniform start in ball and box, sign steps, ball, box; those of no group stay."""
    assert budget.steps is not None and budget.step_size is not None
    x_adv = x.clone()
    for group in groups:
        clean, epsilon = x[group], budget.epsilon[group].view(-1, 1, 1, 1).to(x.dtype)
        point = (clean + (2 * noise[group] - 1) * epsilon).clamp(0, 1)
        for _ in range(int(budget.steps[group[0]])):
            step = budget.step_size[group].view(-1, 1, 1, 1).to(x.dtype) * cross_entropy(model, point, y[group]).sign()
            point = torch.max(torch.min(point + step, clean + epsilon), clean - epsilon).clamp(0, 1)
        x_adv[group] = point
    return x_adv


def a_budget() -> Budget:
    steps = torch.tensor([2, 0, 1, 2, 4, 1, 4, 4])
    epsilon = torch.linspace(0.05, 0.2, 8).double()
    return Budget(epsilon, epsilon / torch.arange(2, 10), steps, max_steps=4)


def test_image_by_image_in_eval_mode() -> None:
    """In double precision: no image sees another, and each draws what it would draw in the whole batch."""
    model = tiny_model().double()
    x, y = images(8).double(), labels(8)
    budget, noise = a_budget(), whole(x, 5).uniform(x)
    found = Grouped(inner=PGD(steps=9))(Plain(model), x, y, budget, Linf(), whole(x, 5))
    alone = [[i] for i in range(8) if i != 1]
    torch.testing.assert_close(found, by_hand(model.eval(), x, y, budget, noise, alone), atol=1e-12, rtol=0)
    model.train()
    masked = PGD()(Plain(model), x, y, budget, Linf(), whole(x, 5))
    moving = torch.arange(8) != 1  # alone, PGD leaves a random start where an image takes no step
    torch.testing.assert_close(found[moving], masked[moving], atol=1e-12, rtol=0)


def test_a_group_has_its_own_batch_statistics() -> None:
    model = tiny_model().double()
    x, y = images(8).double(), labels(8)
    budget, noise = a_budget(), whole(x, 5).uniform(x)
    before = snapshot(model)
    found = Grouped(inner=PGD(mode="train-frozen"))(Plain(model), x, y, budget, Linf(), whole(x, 5))
    assert_same(before, snapshot(model))
    with model.using("train-frozen"):
        wanted = by_hand(model, x, y, budget, noise, [[2, 5], [0, 3], [4, 6, 7]])
        together = by_hand(model, x, y, budget._replace(steps=torch.full((8,), 2)), noise, [list(range(8))])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert (found[[0, 3]] - together[[0, 3]]).abs().max() > 1e-3
    seen = tracked(model)
    Grouped(inner=PGD(mode="train"))(Plain(model), x, y, budget, Linf(), whole(x, 5))
    assert tracked(model) == seen + 1 + 2 + 4


class Sizes(Plain):
    """Notes how many images are forwarded."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Output:
        self.sizes.append(len(images))
        return super().__call__(images)

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Sizes]:
        yield self


def test_what_is_forwarded() -> None:
    x, y = images(8), labels(8)
    predict = Sizes(LinearModel(4, x[0].numel()))
    budget = a_budget()._replace(epsilon=torch.full((8,), 0.1), step_size=None)
    Grouped()(predict, x, y, budget, Linf(), whole(x, 0))
    assert predict.sizes == [2, 2, 2, 3, 3, 3, 3]
    predict.sizes.clear()
    plain = Grouped(inner=PGD(steps=3))(predict, x, y, Budget(budget.epsilon), Linf(), whole(x, 0))
    assert predict.sizes == [8, 8, 8]
    assert torch.equal(plain, PGD(steps=3)(predict, x, y, Budget(budget.epsilon), Linf(), whole(x, 0)))


@pytest.mark.parametrize("mode", ["train", "train-frozen", "eval"])
def test_a_process_without_images_of_a_group_joins_its_passes(mode: Any) -> None:
    """Else the others, who need its share of the batch statistics, would wait for ever."""
    x, y = images(3), labels(3)
    predict = Sizes(LinearModel(4, x[0].numel()))
    budget = Budget(torch.full((3,), 0.1), steps=torch.tensor([2, 0, 2]), max_steps=3)
    mine = Generator(1, Part(2, 5, 9), x.device)
    found = Grouped(inner=PGD(mode=mode))(predict, x, y, budget, Linf(), mine)
    assert predict.sizes == ([2, 2] if mode == "eval" else [0, 2, 2, 0, 0, 0])
    predict.sizes.clear()
    everything, y = torch.zeros(9, *x.shape[1:]), torch.zeros(9, dtype=torch.int64)
    everything[2:5], y[2:5] = x, labels(3)
    budget = Budget(torch.full((9,), 0.1), steps=torch.tensor([0, 0, 2, 0, 2, 0, 0, 0, 0]), max_steps=3)
    alone = Generator(1, Part(0, 9, 9), x.device)
    one = Grouped(inner=PGD(mode=mode))(predict, everything, y, budget, Linf(), alone)
    assert predict.sizes == [2, 2]
    assert torch.equal(found, one[2:5])


def test_a_view_of_a_generator_draws_what_its_rows_would() -> None:
    x = images(7)
    for part in (Part(0, 7, 7), Part(3, 10, 12)):
        chosen = torch.tensor([5, 0, 2])
        all_of_them, some = (Generator(4, part, x.device) for _ in range(2))
        view = some.of(chosen)
        for draw in ("uniform", "normal"):
            assert torch.equal(getattr(view, draw)(x[chosen]), getattr(all_of_them, draw)(x)[chosen])
        assert torch.equal(view.integers(9, x[chosen]), all_of_them.integers(9, x)[chosen])
        assert view.integer(1000) == all_of_them.integer(1000)
        again = some.of(chosen).of(torch.tensor([2, 2]))
        assert torch.equal(again.uniform(x[:2]), Generator(4, part, x.device).uniform(x)[[2, 2]])
        with pytest.raises(ValueError, match="expected 3 rows, got 7"):
            view.uniform(x)
        assert some.of(chosen[:0]).normal(x[:0]).shape == (0, *x.shape[1:])


# What does not go together


REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (
        {"epsilon": Curriculum(), "validation": Validation(images=0)},
        ("validation.images: ", "there are none", "validation.images=1000", "epsilon.rule=training"),
    ),
    (
        {"epsilon": Curriculum(), "validation": Validation(images=9, every=2)},
        ("validation.every: ", "only every 2.", "validation.every=1", "epsilon.rule=training"),
    ),
    ({"epsilon": Curriculum(), "attack": PGD(step_size=0.01)}, ("attack.step_size: both", "set attack.step_size=none")),
    (
        {"epsilon": Curriculum(), "attack": Grouped(inner=PGD(step_size=0.01))},
        ("attack.inner.step_size: both", "set attack.inner.step_size=none"),
    ),
    (
        {"attack": Grouped(inner=PGD(mode="train")), "accumulate": 2},
        ("accumulate: groups", "set accumulate=1, or attack.inner.mode=eval"),
    ),
]


@pytest.mark.parametrize(("parts", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_a_remedy(parts: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(**parts)
    fault = str(caught.value)
    assert "\n" not in fault and all(word in fault for word in words), fault


def test_what_is_accepted() -> None:
    rule = Curriculum(rule="training")
    assert tiny_recipe(epsilon=rule, validation=Validation(images=0)).epsilon == rule
    assert tiny_recipe(epsilon=rule, validation=Validation(images=9, every=3)).epsilon == rule
    tiny_recipe(attack=Grouped(), accumulate=2)
    tiny_recipe(attack=Grouped(inner=PGD(step_size=0.01)))
    with pytest.raises(UserError, match="number of steps, RSFGSM has none"):
        Grouped(inner=RSFGSM())
    one = tiny_recipe(epsilon=Curriculum(), attack=Grouped())
    assert from_json(Recipe, json.loads(json.dumps(to_json(one)))) == one
    changed = override(one, ["attack.inner.mode=train", "epsilon.stages=3", "epsilon.rule=training"])
    assert changed.attack == Grouped(inner=PGD(mode="train"))
    assert changed.epsilon == Curriculum(stages=3, rule="training")


# The rule of the stages


def told(runtime: Stages, natural: float, stage: float | None = None, train: float = 1.0) -> tuple[Any, int]:
    """What it says to an epoch's report, and the stage after it."""
    held_out = {"natural": natural, "robust": 0.123} | ({} if stage is None else {"stage": stage})
    report: dict[str, Any] = {"train": {"right adversarial": train, "right natural": 0.0}, "validation": held_out}
    before = int(runtime.stage)
    assert set(runtime.watched()) == ({"stage"} if before and runtime.spec.rule == "validation" else set())
    verdict = runtime.after_epoch(report)
    assert report["stage"] == before
    return verdict, int(runtime.stage)


def test_a_stage_ends_when_it_no_longer_improves_and_has_learnt() -> None:
    runtime = Stages(Curriculum(patience=3, stages=2))
    assert told(runtime, 0.5) == ("keep", 0)
    assert told(runtime, 0.6) == ("keep", 0)
    assert told(runtime, 0.6) == (None, 0)  # as good is no better
    assert told(runtime, 0.2) == (None, 0)
    assert told(runtime, 0.61) == ("keep", 0)  # waits anew
    for _ in range(2):
        assert told(runtime, 0.61) == (None, 0)
    assert told(runtime, 0.6, train=0.9) == (None, 0)  # not above
    assert told(runtime, 0.6, train=0.5) == (None, 0)
    assert told(runtime, 0.6, train=0.91) == ("rewind", 1)
    # Now PGD-1 decides, however good the natural accuracy; whatever comes first is kept.
    assert told(runtime, 0.9, stage=0.0) == ("keep", 1)
    assert told(runtime, 0.99, stage=0.0) == (None, 1)
    assert told(runtime, 0.1, stage=0.3) == ("keep", 1)
    for _ in range(2):
        assert told(runtime, 0.99, stage=0.3) == (None, 1)
    assert told(runtime, 0.99, stage=0.2) == ("rewind", 2)
    # The last stage stays: what is better is kept, and nothing is gone back to (#26).
    assert told(runtime, 0.5, stage=0.1) == ("keep", 2)
    for _ in range(20):
        assert told(runtime, 0.5, stage=0.1) == (None, 2)
    assert told(runtime, 0.5, stage=0.2) == ("keep", 2)


def test_patience_is_ten_epochs_and_the_bound_90_percent() -> None:
    runtime = Stages(Curriculum())
    assert told(runtime, 0.5) == ("keep", 0)
    for _ in range(9):
        assert told(runtime, 0.5) == (None, 0)
    assert told(runtime, 0.5, train=0.9) == (None, 0)
    assert told(runtime, 0.5, train=0.901) == ("rewind", 1)
    assert Curriculum().stages == 7


def test_the_other_rule_goes_by_accuracy_in_training_alone() -> None:
    runtime = Stages(Curriculum(rule="training", stages=2))
    assert told(runtime, 0.0, train=0.95) == (None, 0)
    assert told(runtime, 0.0, train=0.951) == (None, 1)
    assert told(runtime, 0.0, train=0.94) == (None, 1)
    for _ in range(3):
        assert told(runtime, 0.0, train=1.0) == (None, 2)
    runtime = Stages(Curriculum(rule="training", train_accuracy=0.3))
    assert told(runtime, 0.0, train=0.31) == (None, 1)


def test_state_goes_through_a_checkpoint_and_stays_on_the_host() -> None:
    one, other = Stages(Curriculum(patience=3)), Stages(Curriculum(patience=3))
    for natural in (0.5, 0.4, 0.3):
        told(one, natural)
    assert set(one.state_dict()) == {"stage", "best", "waited"}
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    assert told(other, 0.5, train=0.99) == told(one, 0.5, train=0.99) == ("rewind", 1)
    assert all(buffer.device.type == "cpu" for buffer in one.to("meta").buffers())


@pytest.mark.parametrize("value", [None, 0.2])
def test_what_is_watched_is_pgd_with_as_many_steps(value: float | None) -> None:
    """On a linear model of two classes: k steps of 2 eps / k from anywhere in the ball reach the corner."""
    model = LinearModel(2, images(1)[0].numel())
    x, y = 0.3 + 0.4 * images(5), labels(5, 2)
    for stage in (1, 3, 7):
        predict = Sizes(model)
        attack = at_stage(stage, Curriculum(value=value, stages=9)).watched()["stage"]
        x_adv = attack(predict, x, y, Budget(torch.full((5,), 0.1)), Linf(epsilon=0.1), whole(x, 3))
        assert predict.sizes == stage * [5]
        corner = x + (value or 0.1) * cross_entropy(model, x, y).sign()
        torch.testing.assert_close(x_adv, corner, atol=1e-6, rtol=0)


# What a step costs


@pytest.mark.parametrize("stage", [0, 1, 3, 7])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_step_of_stage_k_costs_k_plus_3(stage: int, mode: Any) -> None:
    """Counted by hooks; by watching forwards; and declared for the last stage (sheet 0.1)."""
    given = recipe(
        epsilon=Curriculum(stages=stage),
        attack=Grouped(inner=PGD(mode=mode)),
        validation=Validation(images=4, train_images=0),
        data=evolve(recipe().data, train=20),
    )
    parts = parts_of(given)
    parts.strategies["epsilon"].stage.fill_(stage)
    seen, before = [], tracked(parts.model)
    handle = parts.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with count_passes(parts.model) as count:
        train_step(parts, rows(parts))
    handle.remove()
    counted = count.per_batch(BATCH)
    assert counted == Passes(stage / 2 + 1, stage / 2, 1) == step_passes(given, parts.progress)
    assert counted.units == stage + 3
    assert sum(seen) == (stage / 2 + 1) * BATCH and len(seen) == stage * (stage + 1) // 2 + 1
    assert tracked(parts.model) - before == (len(seen) if mode == "train" else 1)


def test_what_others_are_said_to_cost() -> None:
    """PGD works on the whole batch, in which images stop; an objective with a reference costs a forward a group."""
    curriculum = Curriculum(stages=3)
    progress = parts_of(recipe(attack=None)).progress
    validated = {"validation": Validation(images=4)}
    assert recipe(epsilon=curriculum, attack=PGD(steps=2), **validated).passes(progress)["attack"] == Passes(3, 3)
    assert recipe(epsilon=Fixed(), attack=PGD(steps=2)).passes(progress)["attack"] == Passes(2, 2)
    assert recipe(attack=Grouped(inner=PGD(steps=2))).passes(progress)["attack"] == Passes(2, 2)
    kl = Grouped(inner=PGD(objective=KL()))
    assert recipe(epsilon=curriculum, attack=kl, **validated).passes(progress)["attack"] == Passes(2.25, 1.5)
    parts = parts_of(recipe(epsilon=curriculum, attack=kl, data=evolve(recipe().data, train=20), **validated))
    parts.strategies["epsilon"].stage.fill_(3)
    with count_passes(parts.model) as count:
        train_step(parts, rows(parts))
    assert count.per_batch(BATCH) == Passes(3.25, 1.5, 1)


# Whole runs


def cat(**changes: Any) -> Recipe:
    """Eight epochs of four steps that go through three stages, back to the best weights of one to begin the next."""
    given: dict[str, Any] = {
        "epsilon": Curriculum(patience=1, train_accuracy=0.0, stages=2),
        "attack": Grouped(inner=PGD(steps=2, mode="train")),
        "optimizer": SGD(lr=0.3, momentum=0.9),
        "epochs": 8,
    }
    return tiny_recipe(**given | changes)


def read(folder: Path, name: str) -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")[0]


def reports(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clocks = ("seconds", "images_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last", "best", "kept"):
        mine, theirs = read(one, name), read(other, name)
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not equal(mine[key], theirs[key])] == [], name
    facts = [checkpoint.read(f / "checkpoints" / "last.safetensors")[1] for f in (one, other)]
    assert facts[0] == facts[1] and reports(one) == reports(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cat") / "run"
    run(cat(), out=folder, device="cpu", preflight=False)
    return folder


def test_a_run_goes_through_the_stages(finished: Path) -> None:
    found = reports(finished)
    stages = [report["stage"] for report in found]
    assert stages == sorted(stages) and set(stages) == {0, 1, 2}
    assert all(("stage" in report["validation"]) == (report["stage"] > 0) for report in found)
    last = read(finished, "last")
    assert {key for key in last if key.startswith("strategies.")} == {
        f"strategies.epsilon.{name}" for name in ("stage", "best", "waited")
    }


@pytest.mark.parametrize("beside", [{}, {"loss": LBGAT()}], ids=["alone", "with a teacher"])
def test_a_rewind_restores_weights_and_optimiser_and_nothing_else(beside: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe_ = cat(average=None, weights=AWP(), **{name: loss.rehearsed(cat()) for name, loss in beside.items()})
    trained = ("model.", "optimizer.", "strategies.loss.")
    rewound, kept_before = 0, {}
    for epoch in range(1, 9):
        if epoch == 1:
            run(recipe_, out=folder, device="cpu", preflight=False, max_steps=4)
        else:
            resume(folder, device="cpu", max_steps=4 * epoch)
        last, kept = read(folder, "last"), read(folder, "kept")
        stages = [report["stage"] for report in reports(folder)]
        advanced = int(last["strategies.epsilon.stage"]) > stages[-1]
        weights = [key for key in last if key.startswith(trained)]
        assert any(key.startswith("optimizer.") for key in weights)
        assert any(key.startswith("strategies.loss.") for key in weights) == bool(beside)
        unlike = [key for key in weights if not equal(last[key], kept[key])]
        _, facts = checkpoint.read(folder / "checkpoints" / "last.safetensors")
        if advanced:
            rewound += 1
            assert unlike == []
            assert int(last["strategies.epsilon.stage"]) == stages[-1] + 1
            assert (int(last["strategies.epsilon.waited"]), float(last["strategies.epsilon.best"])) == (0, -1.0)
            assert kept.keys() == kept_before.keys() and all(equal(kept[key], kept_before[key]) for key in kept)
            assert facts["step"] == 4 * epoch == facts["best"]["rewound"]
            assert checkpoint.read(folder / "checkpoints" / "kept.safetensors")[1]["step"] < 4 * epoch
        elif float(last["strategies.epsilon.best"]) >= 0 and int(last["strategies.epsilon.waited"]) == 0:
            assert unlike == []  # this epoch is the best of its stage
        else:
            assert unlike
        kept_before = kept
    assert rewound == 2


@pytest.mark.parametrize("steps", [(3, 9, 14, 21, 27), tuple(range(4, 32, 4))], ids=["within epochs", "between epochs"])
def test_stopped_and_resumed(steps: tuple[int, ...], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    run(cat(), out=folder, device="cpu", preflight=False, max_steps=steps[0])
    for step in steps[1:]:
        assert resume(folder, device="cpu", max_steps=step).stopped == "steps"
    resume(folder, device="cpu")
    assert_same_run(finished, folder)


class Killed(Exception):
    pass


class Killing(Silent):
    """Ends it all when an epoch is reported, before its checkpoint is written."""

    def __init__(self, epoch: int) -> None:
        self.number = epoch

    def epoch(self, report: dict[str, Any]) -> None:
        if report["epoch"] == self.number:
            raise Killed


@pytest.mark.parametrize("epoch", range(1, 9))
def test_killed_after_keeping_or_going_back(epoch: int, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    with pytest.raises(Killed):
        run(cat(), out=folder, device="cpu", preflight=False, display=Killing(epoch))
    _, facts = checkpoint.read(folder / "checkpoints" / "last.safetensors")
    assert facts["step"] == 4 * (epoch - 1) and len(reports(folder)) == epoch
    resume(folder, device="cpu")
    assert_same_run(finished, folder)


@pytest.mark.parametrize("time", [1, 3])
def test_killed_while_keeping(time: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the report of the epoch is written."""
    folder, write, left = tmp_path / "parts", checkpoint.write, [time]

    def killing(path: Path, *arguments: Any, **options: Any) -> None:
        write(path, *arguments, **options)
        left[0] -= path.stem == "kept"
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", killing)
        with pytest.raises(Killed):
            run(cat(), out=folder, device="cpu", preflight=False)
    resume(folder, device="cpu")
    assert_same_run(finished, folder)


def test_best_and_last_are_told_apart_after_a_rewind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch that is best under the validation attack may be the one that the curriculum goes back from."""
    best: list[tuple[float, float]] = []

    def scripted(self: Stages, report: dict[str, Any]) -> str | None:
        score = report["validation"]["robust"], report["validation"]["natural"]
        best.append(score)
        return "keep" if len(best) == 1 else "rewind" if score >= max(best) else None

    monkeypatch.setattr(Stages, "after_epoch", scripted)
    folder = tmp_path / "run"
    run(cat(), out=folder, device="cpu", preflight=False, max_steps=4)
    for epoch in range(2, 9):
        resume(folder, device="cpu", max_steps=4 * epoch)
        _, facts = checkpoint.read(folder / "checkpoints" / "last.safetensors")
        if "rewound" in facts["best"]:
            break
    assert facts["best"]["rewound"] == facts["step"] == 4 * facts["best"]["epoch"] == 4 * epoch
    chosen, last, kept = (read(folder, name) for name in ("best", "last", "kept"))
    assert all(equal(last[key], kept[key]) for key in last if key.startswith("model."))
    assert any(not equal(last[key], chosen[key]) for key in last if key.startswith("model."))
    judged: list[str] = []
    monkeypatch.setattr(judging, "judge", lambda parts, name, *arguments: judged.append(name) or "")
    evaluate_run(folder, device="cpu")
    assert judged == ["last", "best"]
