"""Files that define several recipes: found by name, refused in one line, run and resumed; and UIAT's tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest

from robustkit import digest, evolve, load_recipe, px
from robustkit.attacks import PGD
from robustkit.cli.main import main
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe, load_recipes, split_address
from robustkit.datasets import SVHN, Cifar10, Cifar100
from robustkit.losses import Align, CrossEntropy, Hat, Mart, Trades
from robustkit.objectives import KL, CrossEntropyObjective, InverseObjective
from robustkit.published import load
from robustkit.reporting.published import match
from robustkit.targets import Inverse, Momentum, OneOff, Universal

ROOT = Path(__file__).parents[1]
FAMILY = '''"""Two, small enough for a test."""

from robustkit import evolve
from robustkit.testing import tiny_recipe

one = evolve(tiny_recipe(), epochs=2)
recipes = {"one": one, "two.b": evolve(one, seed=7)}
'''
OWN = '''
from robustkit import registry, spec
from robustkit.losses import CrossEntropy
from robustkit.testing import tiny_recipe


@registry("loss").register("test-family-own")
@spec
class Own(CrossEntropy):
    """Defined where it is used."""


recipes = {"own": tiny_recipe(loss=Own(), epochs=2)}
'''


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a family, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("pair.py").write_text(FAMILY, encoding="utf-8")
    return "pair.py"


def fails(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == "" and line.startswith("error: ")
    for text in said:
        assert text in line


# Names


@pytest.mark.parametrize(
    ("address", "file", "name"),
    [
        ("recipes/x.py:cifar10-mart", "recipes/x.py", "cifar10-mart"),
        ("recipes/x.py", "recipes/x.py", ""),
        ("x.py:", "x.py", ""),
        (r"C:\recipes\x.py", r"C:\recipes\x.py", ""),
        (r"C:\recipes\x.py:one", r"C:\recipes\x.py", "one"),
        ("C:/recipes/x.py:one", "C:/recipes/x.py", "one"),
        ("runs/x-1", "runs/x-1", ""),
        ("module:function", "module:function", ""),
        (r"C:\runs\x-1\recipe.json", r"C:\runs\x-1\recipe.json", ""),
    ],
)
def test_addresses(address: str, file: str, name: str) -> None:
    assert split_address(address) == split_address(Path(address)) == (Path(file), name)


def test_one_of_several(family: str) -> None:
    assert load_recipe(f"{family}:one").seed == 1 and load_recipe(Path(f"{family}:two.b")).seed == 7
    assert list(load_recipes(family)) == ["one", "two.b"]


def test_a_file_may_define_both(family: str) -> None:
    Path("both.py").write_text(FAMILY + "recipe = evolve(one, seed=3)\n", encoding="utf-8")
    assert [load_recipe(f"both.py{name}").seed for name in ("", ":one", ":two.b")] == [3, 1, 7]
    assert list(load_recipes("both.py")) == ["", "one", "two.b"]


def test_mistakes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("single.py").write_text(FAMILY.replace("recipes = {", "recipe, others = one, {"), encoding="utf-8")
    for command in ("run", "show", "bench"):
        fails(capsys, [command, family], "pair.py: defines 2 recipes", "pair.py:one", "known: one, two.b")
        fails(capsys, [command, f"{family}:onee"], "pair.py: defines no recipe 'onee'", "did you mean 'one'")
    fails(capsys, ["run", f"{family}:x"], "known: one, two.b")
    fails(capsys, ["compare", family, "single.py"], "defines 2 recipes")
    fails(capsys, ["run", "single.py:one"], "single.py: defines no recipe 'one'", "it defines one only")
    fails(capsys, ["run", "pear.py:one"], "pear.py: no such recipe", "did you mean 'pair.py'")
    fails(capsys, ["list", "pear.py"], "pear.py: no such recipe")
    Path("notes.txt").write_text("x", encoding="utf-8")
    fails(capsys, ["run", "notes.txt"], "notes.txt: is no Python file")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipes = {}\n", "defines no `recipe`.*recipes = {name"),
        ("recipes = 3\n", "defines no `recipe`"),
        ("recipes = {'x': 3}\n", "'x': int"),
        (FAMILY + "recipes['a:b'] = one\n", "'a:b': Recipe; give recipes by name"),
        (FAMILY + "recipes['a/b'] = one\n", "'a/b': Recipe"),
        (FAMILY + "recipes[''] = one\n", "'': Recipe"),
    ],
)
def test_broken_families(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(tmp_path / "broken.py:x")
    assert "\n" not in str(caught.value)


# Commands


def test_run_and_resume(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"{family}:two.b", "--device", "cpu", "--max-steps", "1", "--quiet"]) == 0
    folder = Path("runs/pair-two.b-1")
    assert (folder / "recipe.py").read_text(encoding="utf-8") == FAMILY
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["source"] == "pair.py:two.b"
    assert load_recipe(folder) == load_recipe(f"{family}:two.b")
    assert main(["resume", str(folder), "--device", "cpu", "--quiet"]) == 0
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    capsys.readouterr()
    assert main(["compare", f"{family}:one", str(folder)]) == 0
    assert "seed" in capsys.readouterr().out


def test_a_family_s_own_strategy(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is registered again from the run's copy of the file, which has no recipe without a name."""
    from robustkit import registry

    Path("own.py").write_text(OWN, encoding="utf-8")
    assert main(["run", "own.py:own", "--device", "cpu", "--max-steps", "1", "--quiet", "--out", "run"]) == 0
    names = registry("loss")
    del names._names[names._classes.pop("test-family-own")]
    assert main(["resume", "run", "--device", "cpu", "--quiet"]) == 0
    assert names.name_of(type(load_recipe("run").loss)) == "test-family-own"


def test_show_and_list(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{family}:two.b", "epochs=3"]) == 0
    assert "pair.py:two.b: digest " in capsys.readouterr().out
    assert main(["list", family, "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert two == {
        "recipe": "pair.py:two.b",
        "data": "synthetic",
        "attack": "pgd",
        "target": "none",
        "loss": "cross-entropy",
        "epochs": 2,
        "units": "7",
        "digest": digest(load_recipe(f"{family}:two.b")),
    }
    assert one["recipe"] == "pair.py:one" and one["digest"] != two["digest"]
    assert main(["list", family]) == 0
    assert "pair.py:one" in capsys.readouterr().out


def test_smoke(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"{family}:one", "--smoke", "--device", "cpu"]) == 0
    assert "Smoke run passed: pair.py:one" in capsys.readouterr().err


# UIAT's tables


def table(name: str) -> dict[str, Recipe]:
    return load_recipes(ROOT / "recipes" / f"{name}.py")


ROWS = {
    "sat": "SAT",
    "trades": "TRADES",
    "mart": "MART",
    "hat": "HAT",
    "uiat": "UIAT",
    "uiat-oneoff": "UIAT one-off",
    "iat": "IAT",
    "uag": "UAG",
    "uag-fr": "UAG + FR",
    "uag-iam": "UAG + IAM",
}
BLOCKS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"} | {
    f"eps{e}": f"{e}/255" for e in (10, 12, 16)
}
MEMBERS = [(number, name) for number in (1, 3, 6) for name in table(f"uiat_table{number}")]


@pytest.mark.parametrize(("number", "name"), MEMBERS)
def test_each_finds_its_row_and_quotes_it(number: int, name: str) -> None:
    block, _, method = name.rpartition("-") if number == 6 else name.partition("-")
    wanted = ROWS[name] if number == 6 else f"{ROWS[method]}, {BLOCKS[block]}"
    row = match(table(f"uiat_table{number}")[name], load(f"uiat-table{number}"))
    assert row.label == wanted
    text = (ROOT / "recipes" / f"uiat_table{number}.py").read_text(encoding="utf-8")
    line = re.search(rf"^    {name} ([ \d.]+?)  +\d+(?: /.*)?$", text, re.MULTILINE)
    assert line is not None and tuple(map(float, line[1].split())) == tuple(row.values.values())


def test_all_rows_of_the_three_tables_are_there() -> None:
    assert [len(table(f"uiat_table{number}")) for number in (1, 3, 6)] == [18, 12, 5]
    for number in (1, 3, 6):
        found = {match(recipe, load(f"uiat-table{number}")).label for recipe in table(f"uiat_table{number}").values()}
        assert found == {row.label for row in load(f"uiat-table{number}").rows}


def test_table_1_on_cifar10_is_what_the_single_recipes_are() -> None:
    family = table("uiat_table1")
    single = {"sat": "pgd_at_rn18", "trades": "trades_rn18", "uiat": "uiat_rn18", "uiat-oneoff": "uiat_oneoff_rn18"}
    for name, file in single.items():
        assert family[f"cifar10-{name}"] == load_recipe(ROOT / "recipes" / f"{file}.py")
    assert table("uiat_table6")["uiat"] == family["cifar10-uiat"]


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn"])
def test_table_1_by_the_sheet(data: str) -> None:
    """UIAT sheet 0.5, 0.6, 2 to 5, 7.2, 8: what the paper and its lineage set for each data set."""
    family = {
        name.removeprefix(f"{data}-"): r for name, r in table("uiat_table1").items() if name.startswith(f"{data}-")
    }
    kinds = {"cifar10": Cifar10, "cifar100": Cifar100, "svhn": SVHN}
    augment = {"cifar10": "crop-flip", "cifar100": "crop-flip-rotate", "svhn": "none"}
    for recipe in family.values():
        assert type(recipe.data) is kinds[data] and recipe.data.augment == augment[data]
        assert (recipe.epochs, recipe.batch_size) == (30 if data == "svhn" else 100, 128)
        assert (recipe.optimizer.momentum, recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (
            0.9,
            True,
            5e-4,
        )
        assert recipe.optimizer.lr == 0.1 and recipe.threat.epsilon == 8 * px and recipe.model.normalization == "none"
        step = recipe.threat.epsilon / 4 if recipe.attack.step_size is None else recipe.attack.step_size
        assert step == pytest.approx(1 * px if data == "svhn" else 2 * px) and recipe.attack.steps == 10
        assert recipe.attack.mode == "eval" and recipe.attack.noise == 0.001
    attacks = {name: (recipe.attack.start, type(recipe.attack.objective)) for name, recipe in family.items()}
    uniform, kl = ("uniform", CrossEntropyObjective), ("gaussian", KL)
    assert attacks == {
        "sat": uniform,
        "trades": kl,
        "mart": ("gaussian", CrossEntropyObjective),
        "hat": kl,
        "uiat": uniform,
        "uiat-oneoff": uniform,
    }
    weight = 3.0 if data == "svhn" else 3.5
    losses = {name: recipe.loss for name, recipe in family.items() if name != "hat"}
    assert losses == {
        "sat": CrossEntropy(),
        "trades": Trades(weight=6.0),
        "mart": Mart(weight=5.0),
        "uiat": Align(weight=weight),
        "uiat-oneoff": Align(weight=weight),
    }
    hat = family["hat"].loss
    assert isinstance(hat, Hat) and (hat.weight, hat.helper_weight, hat.reach, hat.robust) == (2.5, 0.5, 2.0, "kl")
    assert hat.helper.run == f"runs/uiat-helper-{data}" and hat.helper.made_by == f"recipes/uiat_helper.py:{data}"
    helper = load_recipe(ROOT / hat.helper.made_by)
    assert helper.data == family["hat"].data and helper.model == family["hat"].model and helper.attack is None
    universal = Universal(radius=4 * px, objective=InverseObjective(beta=1.0))
    assert family["uiat"].target == Momentum(inner=universal, gamma=0.9, start=0.75)
    assert family["uiat-oneoff"].target == OneOff(inner=universal, start=0.8)


def test_table_3_changes_radii_alone() -> None:
    for name, recipe in table("uiat_table3").items():
        epsilon, _, method = name.removeprefix("eps").partition("-")
        assert recipe.threat.epsilon == int(epsilon) * px and recipe.attack.step_size == 2 * px
        back = evolve(
            recipe, threat=evolve(recipe.threat, epsilon=8 * px), attack=evolve(recipe.attack, step_size=None)
        )
        assert back == table("uiat_table1")[f"cifar10-{method}"]


def test_table_6_has_each_part_where_it_says() -> None:
    """UAG: one z for each class; FR: beta 1; IAM: the memory."""
    family = table("uiat_table6")
    parts = {}
    for name, recipe in family.items():
        momentum = isinstance(recipe.target, Momentum)
        inner = recipe.target.inner if momentum else recipe.target
        assert inner.radius == 4 * px
        parts[name] = (isinstance(inner, Universal), inner.objective.beta == 1, momentum)
        assert evolve(recipe, target=family["uiat"].target) == family["uiat"]
    assert parts == {
        "iat": (False, False, False),
        "uag": (True, False, False),
        "uag-fr": (True, True, False),
        "uag-iam": (True, False, True),
        "uiat": (True, True, True),
    }
    iat = family["iat"].target
    assert isinstance(iat, Inverse) and (iat.steps, iat.step_size, iat.noise) == (5, 2 * px, 0.001)


def test_rice_by_the_sheet() -> None:
    """UIAT sheet 2.2."""
    recipe = load_recipe(ROOT / "recipes" / "pgd_at_rice_prn18.py")
    assert recipe.model.backbone == "preact_resnet18" and recipe.model.normalization == "cifar10"
    assert recipe.data == Cifar10(augment="crop-flip", padding="reflect") and recipe.epochs == 200
    assert recipe.attack == PGD(steps=10, step_size=2 * px, mode="train")
    assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.nesterov) == (0.1, 0.9, False)
    from robustkit.core.batch import Progress

    rates = [recipe.schedule(Progress.at(epoch * 10, 200, 10)).lr_scale for epoch in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_small_family_has_one_budget() -> None:
    """Its members differ in attack, target and loss alone, and HAT's helper is one of them."""
    family = load_recipes(ROOT / "recipes" / "cpu" / "uiat_table1.py")
    natural = family["natural"]
    same = attrs.evolve(natural, attack=None, target=None, loss=CrossEntropy())
    assert all(evolve(recipe, attack=None, target=None, loss=CrossEntropy()) == same for recipe in family.values())
    assert natural.attack is None and family["hat"].loss.helper.made_by == "recipes/cpu/uiat_table1.py:natural"
    assert {recipe.attack.steps for name, recipe in family.items() if name != "natural"} == {10}
