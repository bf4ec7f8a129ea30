"""ECAS's tables as recipes, by its sheet: what each row trains, that it finds its row, and that its control is fair."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from robustkit import Recipe, evolve, load_recipe, px
from robustkit.attacks import PGD, Friendly
from robustkit.core.batch import Progress
from robustkit.core.errors import UserError
from robustkit.core.recipe import load_recipes
from robustkit.datasets import Cifar10, Cifar100
from robustkit.epsilons import ECAS, Cyclic, CyclicBatch, Fixed, Linear
from robustkit.heads import GaussianMixture
from robustkit.losses import Align, CrossEntropy, Mart, Trades
from robustkit.objectives import KL, CrossEntropyObjective
from robustkit.published import load
from robustkit.reporting.published import match
from robustkit.weights import AWP, Still

ROOT = Path(__file__).parents[1] / "recipes"
FIXED = Fixed(step_fraction=0.2)
SCHEDULES = {
    "fixed-unsmoothed": "Fixed",
    "linear": "Linear",
    "cyclic-batch": "Cyclic (batch)",
    "cyclic": "Cyclic",
    "ecas": "Cyclic + entropy",
}
METHODS = {"ecas-pgd-at": "ECAS-PGD-AT", "ecas-trades-code": "ECAS-TRADES", "ecas-awp": "ECAS-AWP"}
BLOCKS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
BASELINES = {"pgd-at": "PGD-AT", "trades": "TRADES", "mart": "MART", "fat": "FAT", "awp": "AWP", "ecas-awp": "ECAS-AWP"}
ROWS = {
    1: SCHEDULES,
    2: {f"{data}-{name}": f"{row}, {block}" for data, block in BLOCKS.items() for name, row in METHODS.items()},
    3: {f"cifar10-{name}": row for name, row in METHODS.items()},
    4: BASELINES,
}


def table(number: int) -> dict[str, Recipe]:
    return load_recipes(ROOT / f"ecas_table{number}.py")


def rates(recipe: Recipe, *epochs: int) -> list[float]:
    """The rate at the beginning of those epochs, which count from 1."""
    progress = [Progress.at((epoch - 1) * 7, recipe.epochs, 7) for epoch in epochs]
    return [recipe.optimizer.lr * recipe.schedule(at).lr_scale for at in progress]


def pixels(values: tuple[float, ...]) -> list[int]:
    assert all(abs(255 * value - round(255 * value)) < 1e-9 for value in values)
    return [round(255 * value) for value in values]


# Rows


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, rows in ROWS.items() for name in rows])
def test_each_finds_its_row_and_quotes_it(number: int, name: str) -> None:
    published = load(f"ecas-table{number}")
    row = match(table(number)[name], published)
    assert row.label == ROWS[number][name]
    text = (ROOT / f"ecas_table{number}.py").read_text(encoding="utf-8")
    line = re.search(rf"^    {name} ([ \d.]+?)  +\d+$", text, re.MULTILINE)
    assert line is not None
    accuracies = tuple(row.values[column.key] for column in published.accuracies)
    assert tuple(map(float, line[1].split())) == accuracies


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_nothing_else_quotes_numbers_and_no_row_of_ours_is_left_out(number: int) -> None:
    text = (ROOT / f"ecas_table{number}.py").read_text(encoding="utf-8")
    for name in table(number).keys() - ROWS[number].keys():
        assert re.search(rf"^    {name}  [ -]+ \d+(?: / .*)?$", text, re.MULTILINE), name
    quoted = {match(table(number)[name], load(f"ecas-table{number}")).label for name in ROWS[number]}
    missing = {row.label for row in load(f"ecas-table{number}").rows} - quoted
    assert all(label.startswith("LAS-") for label in missing)


@pytest.mark.parametrize("number", [2, 3])
def test_a_control_is_in_no_row(number: int) -> None:
    for name, recipe in table(number).items():
        if "fixed" in name or name == "cifar10-ecas-trades":
            with pytest.raises(UserError, match="no row of"):
                match(recipe, load(f"ecas-table{number}"))


def test_everything_is_written_once() -> None:
    single = load_recipe(ROOT / "ecas_pgd_at_wrn34.py")
    assert table(1)["ecas"] == table(2)["cifar10-ecas-pgd-at"] == single
    assert table(1)["fixed"] == table(2)["cifar10-ecas-pgd-at-fixed"]
    assert table(1)["fixed-unsmoothed"] == table(2)["cifar10-ecas-pgd-at-fixed-unsmoothed"]
    assert table(4)["ecas-awp"] == table(2)["cifar10-ecas-awp"]
    for name, recipe in table(3).items():
        theirs = table(2)[name]
        model = evolve(theirs.model, backbone="resnet18_cifar")
        assert recipe == evolve(theirs, model=model, head=recipe.head) and not recipe.head.zero_bias


# What they train (ECAS sheet 1.2, 2, 3)


def test_table_1_differs_in_the_schedule_alone() -> None:
    family = table(1)
    for name, recipe in family.items():
        loss = CrossEntropy() if name == "fixed-unsmoothed" else CrossEntropy(label_smoothing=1 / 3)
        assert recipe.loss == loss and recipe.attack == PGD(steps=10)
        assert evolve(recipe, epsilon=Fixed(), loss=CrossEntropy()) == evolve(
            family["ecas"], epsilon=Fixed(), loss=CrossEntropy()
        )
        assert recipe.epsilon.step_fraction == 0.2 and recipe.epsilon.sets_step_size
    schedules = {name: type(recipe.epsilon) for name, recipe in family.items()}
    assert schedules == {
        "fixed-unsmoothed": Fixed,
        "fixed": Fixed,
        "linear": Linear,
        "cyclic-batch": CyclicBatch,
        "cyclic": Cyclic,
        "ecas": ECAS,
    }
    assert {measure.key for _, measure in family["ecas"].measures()} == {
        column.key for column in load("ecas-table1").columns
    }


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_tables_2_and_3_by_the_sheet(number: int, data: str) -> None:
    prefix = f"{data}-ecas-"
    family = {name.removeprefix(prefix): r for name, r in table(number).items() if name.startswith(prefix)}
    assert len(family) == 9
    few = data == "cifar10"
    thresholds = (1.3, 2.274) if few else (3.35, 4.582)
    # name: (first and last radius, how many big ones, entropy mode), epochs, drops
    facts: dict[str, Any] = {
        "pgd-at": ([3, 12], {10, 11, 12}, "train", 110, (99, 104)),
        "trades": ([5, 9], {8, 9}, "train", 110, (99, 104)),
        "trades-code": ([5, 9], {8, 9}, "train", 110, (99,)),
        "awp": ([6, 15], {13, 14, 15}, "train-frozen", 200, (100, 150)),
    }
    for name, (ends, big, mode, epochs, drops) in facts.items():
        recipe = family[name]
        schedule = recipe.epsilon
        assert isinstance(schedule, ECAS) and (schedule.h_low, schedule.h_high) == thresholds
        assert pixels(schedule.values) == list(range(ends[0], ends[1] + 1))
        assert set(pixels(schedule.values[-schedule.big :])) == big
        assert (schedule.mode, schedule.step_follows, schedule.step_fraction) == (mode, "cycle", 0.2)
        assert recipe.epochs == epochs
        for number_of, drop in enumerate(drops):
            assert rates(recipe, drop, drop + 1) == pytest.approx([0.1**number_of * 0.1, 0.1**number_of * 0.01])
        assert rates(recipe, epochs) == pytest.approx([0.1 ** (1 + len(drops))])
        optimizer = recipe.optimizer
        assert (optimizer.lr, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.1, 0.9, False, 5e-4)
        assert recipe.batch_size == 128 and recipe.threat.epsilon == 8 * px and recipe.attack.steps == 10
        assert recipe.data.augment == "crop-flip" and type(recipe.data) is (Cifar10 if few else Cifar100)
        awp = name == "awp"
        assert recipe.data.padding == ("reflect" if awp and few else "zero")
        assert recipe.model.normalization == ("cifar10" if awp and few else "none")
        assert recipe.weights == (AWP(gamma=0.01) if awp else Still())
        assert recipe.attack.mode == "eval" and recipe.attack.step_size is None
        radii = (recipe.attack.start_epsilon, recipe.attack.final_epsilon)
        assert radii == ((8 * px, 8 * px) if awp else (None, None))
    smoothing = family["pgd-at"].loss.label_smoothing
    classes = 10 if few else 100  # torch's 1 - s + s / K is the 0.7 of the true class
    assert 1 - smoothing + smoothing / classes == pytest.approx(0.7)
    assert family["awp"].loss == CrossEntropy() and family["trades"].loss == Trades(weight=6.0)
    attacks = {name: (r.attack.start, type(r.attack.objective)) for name, r in family.items() if "fixed" not in name}
    uniform, kl = ("uniform", CrossEntropyObjective), ("gaussian", KL)
    code = uniform if few else kl
    assert attacks == {"pgd-at": uniform, "trades": kl, "trades-code": code, "awp": uniform}


@pytest.mark.parametrize("number", [2, 3])
def test_controls_differ_in_the_radius_alone(number: int) -> None:
    family = table(number)
    for name, recipe in family.items():
        if name.endswith("-fixed"):
            assert recipe == evolve(family[name.removesuffix("-fixed")], epsilon=FIXED)
        if name.endswith("-unsmoothed"):
            assert recipe == evolve(family[name.removesuffix("-unsmoothed")], loss=CrossEntropy())
    assert sum("fixed" in name for name in family) == 10


def test_table_4_by_the_sheet() -> None:
    """ECAS sheet 1.2, 5.3, 6.1, 6.2, 7.2."""
    family = table(4)
    epochs = {name: recipe.epochs for name, recipe in family.items()}
    assert epochs == {
        "pgd-at": 110,
        "trades": 76,
        "mart": 90,
        "fat": 120,
        "awp": 200,
        "trades-awp": 200,
        "ecas-awp": 200,
        "ecas-awp-fixed": 200,
    }
    decay = {name: recipe.optimizer.weight_decay for name, recipe in family.items()}
    assert decay == dict.fromkeys(family, 5e-4) | {"trades": 2e-4, "mart": 7e-4, "fat": 2e-4}
    assert rates(family["trades"], 74, 75, 76) == pytest.approx([0.1, 0.01, 0.01])
    assert rates(family["mart"], 74, 75, 89, 90) == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert rates(family["trades-awp"], 99, 100, 149, 150) == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert rates(family["awp"], 100, 101, 150, 151) == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert rates(family["fat"], 59, 60, 89, 90, 109, 110) == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001, 0.0005])
    losses = {name: recipe.loss for name, recipe in family.items()}
    trades, plain = Trades(weight=6.0), CrossEntropy()
    assert losses == dict.fromkeys(family, plain) | {"trades": trades, "trades-awp": trades, "mart": Mart(weight=6.0)}
    for name, recipe in family.items():
        radius = recipe.threat.epsilon if recipe.epsilon.value is None else recipe.epsilon.value
        fraction = recipe.epsilon.step_fraction or 0.25  # the attack's own
        own = name in ("trades", "mart", "fat")
        if name.startswith("ecas"):
            continue
        assert recipe.threat.epsilon == 8 * px and recipe.attack.step_size is None
        assert (radius, radius * fraction) == pytest.approx((0.031, 0.007) if own else (8 * px, 2 * px))
        like_rice = name == "awp"
        assert recipe.attack.mode == ("train" if like_rice else "eval") and recipe.attack.steps == 10
        assert recipe.model.normalization == ("cifar10" if like_rice else "none")
        assert recipe.data.padding == ("reflect" if like_rice else "zero")
        kl = name in ("trades", "trades-awp")
        assert isinstance(recipe.attack.objective, KL if kl else CrossEntropyObjective)
        assert recipe.attack.start == ("gaussian" if kl or name == "mart" else "uniform")
    assert family["awp"].weights == AWP(gamma=0.01) and family["trades-awp"].weights == AWP(gamma=0.005, start=10)
    assert family["fat"].attack == Friendly(tau=(0, 1, 2), switch=(50 / 120, 90 / 120), omega=0.001)


# Mixtures, and the small study


def test_mixes() -> None:
    family = load_recipes(ROOT / "ecas_mixes.py")
    base = load_recipe(ROOT / "ecas_pgd_at_wrn34.py")
    assert {name: type(recipe.loss) for name, recipe in family.items()} == {
        "ecas-uiat": Align,
        "ecas-mart": Mart,
        "ecas-mixture": CrossEntropy,
        "ecas-uiat-fixed": Align,
        "ecas-mart-fixed": Mart,
        "ecas-mixture-fixed": CrossEntropy,
    }
    for name in ("ecas-uiat", "ecas-mart", "ecas-mixture"):
        mix = family[name]
        assert mix.epsilon == base.epsilon and family[f"{name}-fixed"] == evolve(mix, epsilon=FIXED)
        assert getattr(mix.loss, "label_smoothing", 0) == 0
        training = ("data", "model", "threat", "optimizer", "schedule", "epochs", "batch_size", "weights")
        assert all(getattr(mix, field) == getattr(base, field) for field in training)
    assert family["ecas-uiat"] == load_recipe(ROOT / "ecas_uiat_wrn34.py")
    assert isinstance(family["ecas-mixture"].head, GaussianMixture)


def test_the_small_study_has_one_budget() -> None:
    """That of UIAT's small family; arms differ in radius, attack, target, loss and weights alone, and steps are 0.2."""
    family = load_recipes(ROOT / "cpu" / "ecas_table1.py")
    theirs = load_recipes(ROOT / "cpu" / "uiat_table1.py")["natural"]
    arms = ("fixed", "linear", "cyclic", "cyclic-batch", "ecas", "awp", "ecas-awp", "fat", "ecas-uiat")
    assert tuple(family) == arms
    plain = {"epsilon": FIXED, "attack": None, "target": None, "loss": CrossEntropy(), "weights": Still()}
    for recipe in family.values():
        assert attrs.evolve(recipe, **plain) == attrs.evolve(theirs, **plain)
        assert recipe.epsilon.step_fraction == 0.2 and recipe.attack.step_size is None and recipe.attack.steps == 10
        assert recipe.attack.mode == "eval" and recipe.loss.label_smoothing == 0
    assert pixels(family["ecas"].epsilon.values) == [3, 5, 7, 9, 11, 12] and family["ecas"].epsilon.big == 2
    assert pixels(family["ecas-awp"].epsilon.values) == [6, 8, 10, 12, 14, 15] and family["ecas-awp"].epsilon.big == 2
    assert family["cyclic"].epsilon.values == family["cyclic-batch"].epsilon.values == family["ecas"].epsilon.values
    for name in ("linear", "cyclic", "cyclic-batch", "ecas"):
        assert evolve(family[name], epsilon=FIXED) == family["fixed"]
    last = [family["ecas"].epsilon.value(Progress.at(epoch, 12, 1)) for epoch in (9, 10, 11)]
    assert pixels(tuple(last)) == [9, 11, 12]  # as the paper's 110 epochs end
