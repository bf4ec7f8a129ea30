"""LDAT's tables and figure, and LBGAT's recipes: they find their rows, quote them, and say what the sheet says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from robustkit import Model, evolve, load_recipe, px
from robustkit.attacks import LDAT, PGD, Within
from robustkit.core.batch import Progress
from robustkit.core.errors import UserError
from robustkit.core.recipe import Recipe, load_recipes, result_key
from robustkit.datasets import Cifar10, Cifar100
from robustkit.heads import GaussianMixture, Linear
from robustkit.losses import ALP, LBGAT, CrossEntropy, Mart, Mixed, Trades
from robustkit.objectives import KL
from robustkit.published import load
from robustkit.reporting.published import match
from robustkit.schedules import Cosine
from robustkit.threats import L2, Linf

CIFAR100 = Cifar100(augment="crop-flip")
RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = {"standard": "Standard (PGD-AT)", "trades": "TRADES", "mart": "MART", "lbgat": "LBGAT", "ldat": "LDAT"}
BETAS = ("0", "0.2", "0.5", "0.8", "1")


def family(name: str) -> dict[str, Recipe]:
    return load_recipes(RECIPES / f"{name}.py")


def header(name: str) -> str:
    return (RECIPES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]


ROWS = [(1, name, label) for name, label in METHODS.items()]
ROWS += [(2, name, label.partition(" ")[0]) for name, label in METHODS.items()]
ROWS += [(3, f"beta-{beta}", f"beta = {beta}") for beta in BETAS]


@pytest.mark.parametrize(("number", "name", "label"), ROWS)
def test_each_finds_its_row_and_quotes_it(number: int, name: str, label: str) -> None:
    row = match(family(f"ldat_table{number}")[name], load(f"ldat-table{number}"))
    assert row.label == label
    line = re.search(rf"^    {re.escape(name)}  +([ \d.]+?)  +\d+$", header(f"ldat_table{number}"), re.MULTILINE)
    assert line is not None and tuple(map(float, line[1].split())) == tuple(row.values.values())


@pytest.mark.parametrize(("name", "number"), [("ldat_prn18", 1), ("ldat_wrn28", 2)])
def test_the_single_recipes_quote_theirs(name: str, number: int) -> None:
    row = match(load_recipe(RECIPES / f"{name}.py"), load(f"ldat-table{number}"))
    said = header(name).split("Published:")[1].split("Measured:")[0]
    assert row.label == "LDAT" and tuple(map(float, re.findall(r"\d\d\.\d\d", said))) == tuple(row.values.values())


def test_another_attack_is_no_row_of_the_table() -> None:
    """Figure 6: PGD in the ball of LDAT's attack is not LDAT."""
    for name, recipe in family("ldat_figure6").items():
        if name == "ldat":
            assert match(recipe, load("ldat-table1")).label == "LDAT"
        else:
            with pytest.raises(UserError, match="certainly"):
                match(recipe, load("ldat-table1"))


@pytest.mark.parametrize(("name", "cifar100"), [("ldat_prn18", False), ("ldat_wrn28", True)])
def test_ldat_by_the_sheet(name: str, cifar100: bool) -> None:
    """9.6, and 13: Adam, the weight that rises, L-GM's margin, Xavier's centres, one forward for both halves."""
    recipe = load_recipe(RECIPES / f"{name}.py")
    data, backbone = (CIFAR100, "wrn28_10") if cifar100 else (Cifar10(), "preact_resnet18")
    radius, margin, beta, epochs = (1.0, 0.05, 0.3, 300) if cifar100 else (1.5, 0.1, 0.5, 250)
    assert (recipe.data, recipe.model) == (data, Model(backbone=backbone)) and recipe.data.padding == "zero"
    assert recipe.attack == Within(threat=L2(epsilon=radius), inner=LDAT(steps=10, step="adam", lr=0.2, gamma=0.2))
    assert recipe.loss == Mixed(beta=beta, joint=True)
    assert recipe.head == GaussianMixture(margin=margin, likelihood=1.0, likelihood_schedule="up", centres="xavier")
    assert recipe.head.parameter_options() == {"lr_scale": 1.0}
    assert recipe.threat == Linf(epsilon=8 * px) and recipe.schedule == Cosine()
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.1, 0.9, 5e-4, False)
    assert (recipe.epochs, recipe.batch_size) == (epochs, 128)
    rates = [recipe.schedule(Progress.at(5 * epoch, epochs, 5)).lr_scale for epoch in (0, epochs // 2, epochs - 1)]
    assert rates == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


def test_what_is_measured() -> None:
    """9.10: AutoAttack in both balls, and the paper's own columns as far as they are here."""
    recipe = load_recipe(RECIPES / "ldat_prn18.py")
    keys = {result_key(suite, measure) for suite, measure in recipe.measures()}
    columns = {column.key for column in load("ldat-table1").columns}
    assert columns - keys == {"deepfool", "l2/cw", "l2/deepfool"}
    assert {"autoattack", "l2/autoattack"} <= keys
    for suite in recipe.evaluation:
        assert suite.threat in (None, L2(epsilon=0.5)) and suite.images is None


def test_table_1_by_the_sheet() -> None:
    """6, 10 and 13: the baselines under LDAT's schedule, and LDAT's other readings, one change each."""
    recipes = family("ldat_table1")
    ldat = recipes["ldat"]
    assert ldat == load_recipe(RECIPES / "ldat_prn18.py") == family("ldat_table3")["beta-0.5"]
    kl = PGD(steps=10, objective=KL(), start="gaussian")
    baselines: dict[str, tuple[PGD, Any]] = {
        "standard": (PGD(steps=10), CrossEntropy()),
        "trades": (kl, Trades(weight=6.0)),
        "mart": (PGD(steps=10, start="gaussian"), Mart(weight=5.0)),
        "lbgat": (kl, LBGAT(weight=6.0, teacher=Model(backbone="resnet18_cifar"))),
        "lbgat-0": (kl, LBGAT(weight=0.0)),
        "alp": (PGD(steps=10), ALP(weight=0.5, joint=True)),
    }
    for name, (attack, loss) in baselines.items():
        assert recipes[name] == evolve(ldat, head=Linear(), attack=attack, loss=loss)
    readings = {
        "ldat-down": evolve(ldat, head=evolve(ldat.head, likelihood_schedule="down")),
        "ldat-unit": evolve(ldat, attack=Within(threat=L2(epsilon=1.5), inner=LDAT(step="unit"))),
        "ldat-no-margin": evolve(ldat, head=evolve(ldat.head, margin=0.0)),
        "ldat-fixed": evolve(ldat, head=evolve(ldat.head, centres="simplex")),
    }
    assert {name: recipes[name] for name in readings} == readings
    assert recipes.keys() == {"ldat", *baselines, *readings}


def test_table_2_is_table_1_on_other_data() -> None:
    first, second = family("ldat_table1"), family("ldat_table2")
    other = load_recipe(RECIPES / "ldat_wrn28.py")
    for name, recipe in second.items():
        assert recipe.data == CIFAR100 and recipe.model.backbone == "wrn28_10" and recipe.epochs == 300
        if name != "ldat":
            assert recipe == evolve(first[name], data=other.data, model=other.model, epochs=300)


def test_figure_6_changes_the_attack_alone() -> None:
    """12: L-inf 8/255 in steps of 2/255, L2 1.5 in steps of 2.5 R / K, as many as LDAT's."""
    recipes = family("ldat_figure6")
    assert all(evolve(recipe, attack=recipes["ldat"].attack) == recipes["ldat"] for recipe in recipes.values())
    for loss in ("ce", "kl"):
        linf, l2 = recipes[f"pgd-{loss}-linf"].attack, recipes[f"pgd-{loss}-l2"].attack
        assert isinstance(linf, PGD) and isinstance(l2, Within) and isinstance(l2.inner, PGD)
        assert (linf.steps, linf.step_size) == (10, 2 * px) and l2.threat == L2(epsilon=1.5)
        assert (l2.inner.steps, l2.inner.step_size) == (10, pytest.approx(0.375))
        for attack in (linf, l2.inner):
            assert isinstance(attack.objective, KL) == (loss == "kl")
            assert attack.start == ("gaussian" if loss == "kl" else "uniform") and attack.mode == "eval"


def test_lbgat_by_the_sheet() -> None:
    """10.1."""
    recipes = family("lbgat")
    assert recipes.keys() == {f"cifar{k}-{weight}" for k in (10, 100) for weight in (0, 6)}
    for name, recipe in recipes.items():
        data, _, weight = name.partition("-")
        assert recipe.data == (Cifar10() if data == "cifar10" else CIFAR100) and recipe.model.backbone == "wrn34_10"
        assert recipe.loss == LBGAT(weight=float(weight), teacher=Model(backbone="resnet18_cifar"))
        assert recipe.attack == PGD(steps=10, step_size=0.007, objective=KL(), start="gaussian", noise=0.001)
        assert recipe.threat == Linf(epsilon=0.031) and (recipe.epochs, recipe.batch_size) == (100, 128)
        assert (recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.9, 2e-4)
        epochs = (0, 1, 74, 75, 89, 90, 99)
        rates = [recipe.optimizer.lr * recipe.schedule(Progress.at(7 * e, 100, 7)).lr_scale for e in epochs]
        assert rates == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_small_family_has_one_budget() -> None:
    """That of the small family of UIAT; its members differ in head, attack and loss alone."""
    recipes = family("cpu/ldat_table1")
    natural = family("cpu/uiat_table1")["natural"]
    for recipe in recipes.values():
        back = evolve(recipe, head=Linear(), attack=None, loss=CrossEntropy(), evaluation=natural.evaluation)
        assert back == natural
        keys = {result_key(suite, measure) for suite, measure in recipe.measures()}
        asked = {"clean", "pgd-40", "fab", "autoattack"}
        assert keys == asked | {"pgd-20", "cw", "apgd-dlr", "l2/pgd-40", "l2/apgd-dlr"}
    assert recipes["lbgat"].loss.teacher == natural.model
    heads = {name: recipe.head for name, recipe in recipes.items()}
    up, down = (GaussianMixture(likelihood=0.05, likelihood_schedule=way) for way in ("up", "down"))  # type: ignore[arg-type]
    ldat = {"ldat-up": up, "ldat-down": down, "ldat-unit": up, "ldat-likelihood-1": GaussianMixture()}
    assert heads == {"pgd-at": Linear(), "trades": Linear(), "alp": Linear(), "lbgat": Linear(), **ldat}
