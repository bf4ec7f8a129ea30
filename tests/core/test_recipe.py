"""Recipes: composed, compared, saved and loaded without data; refused where parts do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from robustkit.attacks import PGD
from robustkit.core.errors import RecipeError, SpecError, UserError
from robustkit.core.model import Model
from robustkit.core.recipe import Recipe, Suite, Validation, load_recipe, px, result_key, save_recipe
from robustkit.core.spec import canonical, digest, evolve, from_json, to_json
from robustkit.datasets import Cifar10, Synthetic
from robustkit.epsilons import ECAS
from robustkit.evaluation import Attacked, Clean
from robustkit.losses import Align, CrossEntropy, Mixed, Trades
from robustkit.schedules import MultiStep, OneCycle
from robustkit.targets import Momentum, Natural, OneOff, Universal
from robustkit.threats import L2, Linf
from robustkit.weights import AWP, Exponential, Still


def recipe(**changes: Any) -> Recipe:
    plain = {
        "data": Synthetic(),
        "model": Model(backbone="convnet_small"),
        "threat": Linf(),
        "attack": PGD(),
        "loss": CrossEntropy(),
        "schedule": OneCycle(),
        "epochs": 10,
    }
    return Recipe(**(plain | changes))


UIAT = {"loss": Align(), "target": Momentum()}
FULL = recipe(
    **UIAT,
    epsilon=ECAS(),
    weights=AWP(),
    average=Exponential(),
    control=recipe(seed=3),
    evaluation=(Suite(), Suite(name="l2", threat=L2(), measures=(Clean(),), images=5)),
)


def test_defaults_are_looked_up_by_name() -> None:
    made = recipe()
    assert made.weights == Still() and made.validation == Validation(attack=PGD()) and made.average is None
    assert next(measure.key for _, measure in made.measures()) == "clean"
    assert px * 255 == 1.0
    assert recipe() == recipe() and hash(recipe()) == hash(recipe()) and digest(recipe()) == digest(recipe())


@pytest.mark.parametrize("value", [recipe(), FULL, recipe(attack=None), recipe(threat=L2(), **UIAT)])
def test_json_both_ways(value: Recipe, tmp_path: Path) -> None:
    assert from_json(Recipe, json.loads(json.dumps(to_json(value), allow_nan=False))) == value
    save_recipe(value, tmp_path / "recipe.json")
    loaded = load_recipe(tmp_path / "recipe.json")
    assert loaded == value and hash(loaded) == hash(value) and digest(loaded) == digest(value)
    assert load_recipe(tmp_path) == value  # a run's folder


def test_json_of_an_older_version_may_leave_defaults_out() -> None:
    data = to_json(recipe())
    for name in ("validation", "precision", "evaluation", "accumulate", "weights"):
        del data[name]
    assert from_json(Recipe, data) == recipe()


def test_the_digest_sees_every_setting_but_locations() -> None:
    base = recipe(data=Cifar10())
    seen = {digest(base)}
    for change in (
        {"seed": 2},
        {"epochs": 11},
        {"threat": Linf(epsilon=4 * px)},
        {"attack": PGD(steps=11)},
        {"weights": AWP()},
        {"control": base},
        {"validation": Validation(images=10)},
        {"batch_size": 64},
        {"evaluation": ()},
    ):
        seen.add(digest(evolve(base, **change)))
    assert len(seen) == 10
    assert digest(evolve(base, data=Cifar10(root="/data/somewhere"))) == digest(base)
    assert "root" not in canonical(base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": Natural()}, "target.*uses no target"),
        ({"loss": Align()}, "target.*needs a target"),
        ({"loss": Trades(), "target": Universal()}, "uses no target"),
        ({"accumulate": 2, "weights": AWP()}, "accumulate.*one step per batch|accumulate"),
        ({"accumulate": 2, **UIAT}, r"target\.inner.*takes one step per batch"),
        ({"accumulate": 100}, "cannot split"),
        ({"loss": Align(), "target": Momentum(start=11)}, r"target\.start"),
        ({"loss": Align(), "target": OneOff(start=75)}, "fraction"),
        ({"weights": AWP(start=11)}, r"weights\.start"),
        ({"schedule": MultiStep(at=(5, 99))}, r"schedule\.at.*99"),
        ({"epsilon": ECAS(), "attack": PGD(step_size=2 * px)}, "step size"),
        ({"evaluation": (Suite(), Suite())}, "two measures report as"),
        ({"evaluation": (Suite(measures=(Attacked(), Attacked(steps=3))),)}, "two measures report as"),
        ({"attack": None, "loss": Trades()}, "attack"),
        ({"attack": None, "loss": Mixed()}, "attack"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**changes)


def test_parts_that_fit() -> None:
    recipe(accumulate=2, loss=Align(), target=Natural())
    recipe(weights=AWP(start=10))
    recipe(evaluation=(Suite(measures=(Attacked(key="a"), Attacked(key="b"))), Suite(name="l2", threat=L2())))
    recipe(epsilon=ECAS(), validation=Validation(attack=PGD(step_size=2 * px)))  # its attack is not the trained one
    recipe(control=recipe(weights=AWP(), epochs=2), accumulate=2)
    assert result_key(Suite(name="l2"), Clean()) == "l2/clean" and result_key(Suite(), Clean()) == "clean"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "epochs.*at least 1"),
        ({"batch_size": 1}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"attack": Linf()}, "attack.*an attack"),
        ({"head": "linear"}, "head.*a head"),
        ({"epoch": 3}, "did you mean 'epochs'"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        recipe(**changes)


SOURCE = """
from robustkit import Model, Recipe, px
from robustkit.attacks import PGD
from robustkit.datasets import Synthetic
from robustkit.losses import CrossEntropy
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

recipe = Recipe(data=Synthetic(), model=Model(backbone="convnet_small"), threat=Linf(epsilon=8 * px), attack=PGD(),
                loss=CrossEntropy(), schedule=OneCycle(), epochs=10)
"""


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_python_file(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, SOURCE)) == recipe()
    neighbour = "from mine import recipe as base\nfrom robustkit import evolve\nrecipe = evolve(base, epochs=3)\n"
    import sys

    before = list(sys.path)
    assert load_recipe(written(tmp_path, neighbour, "variant.py")) == recipe(epochs=3)
    assert sys.path == before
    sys.modules.pop("mine", None)


def test_a_file_may_define_its_own_strategy(tmp_path: Path) -> None:
    own = SOURCE.replace(
        "recipe = Recipe(",
        """
from robustkit import registry, setting, spec
from robustkit.core.batch import Passes


@registry("epsilon").register("test-recipe-halved")
@spec
class Halved:
    share: float = setting(default=0.5, above=0)

    @property
    def sets_step_size(self) -> bool:
        return False

    def __call__(self, scene):
        raise NotImplementedError

    def passes(self, progress) -> Passes:
        return Passes()


recipe = Recipe(epsilon=Halved(share=0.25), """,
    )
    path = written(tmp_path, own)
    first, second = load_recipe(path), load_recipe(path)
    assert first.epsilon.share == 0.25 and digest(first) == digest(second)
    data = to_json(first)
    assert data["epsilon"] == {"name": "test-recipe-halved", "share": 0.25}
    assert digest(from_json(Recipe, data)) == digest(first)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "defines no `recipe`"),
        ("recipe = 3\n", "defines no `recipe`"),
        ("def broken(:\n", r"broken\.py:1.*syntax error"),
        ("\n\nraise ValueError('no luck')\n", r"broken\.py:3.*ValueError: no luck"),
        (SOURCE.replace("epochs=10", "epochs=0"), r"broken\.py:\d+.*epochs"),
        (SOURCE.replace("PGD()", "PGD(stesp=3)"), r"broken\.py:\d+.*did you mean 'steps'"),
        ("import no_such_module_here\n", "no_such_module_here"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(written(tmp_path, text, "broken.py"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"data": 1}',
        '{"data": {"name": "synthetic"}}',
        "[" * 100_000,
        '{"data": {"name": "nope"}}',
        '{"epochs": 1e999}',
    ],
    ids=lambda text: text[:20] or "empty",
)
def test_broken_json_files(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text, "recipe.json")
    with pytest.raises(RecipeError, match=r"recipe\.json"):
        load_recipe(path)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path)


def test_missing_files_come_with_near_misses(tmp_path: Path) -> None:
    written(tmp_path, SOURCE, "uiat_rn18.py")
    with pytest.raises(RecipeError, match=r"no such recipe.*uiat_rn18\.py"):
        load_recipe(tmp_path / "uiat_rn1.py")
    for path in (tmp_path / "nowhere" / "x.py", tmp_path / "x.json"):
        with pytest.raises(UserError, match="no such recipe"):
            load_recipe(path)
