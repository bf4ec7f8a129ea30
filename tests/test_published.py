"""Published tables as data, runs beside them, and runs beside each other."""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustkit import Recipe, load_recipe, override
from robustkit.cli.main import main
from robustkit.core.errors import UserError
from robustkit.core.recipe import save_recipe
from robustkit.core.registry import registry
from robustkit.evaluation import wilson
from robustkit.published import PublishedTable, Row, load, settings, tables
from robustkit.reporting.comparison import Item
from robustkit.reporting.published import beside, match

ROOT = Path(__file__).parents[1]

READ_TWICE = {
    "ecas-table1": (30, 1809.12),
    "ecas-table2": (36, 21932.43),
    "ecas-table3": (18, 3098.56),
    "ecas-table4": (42, 2548.48),
    "ldat-table1": (50, 3036.43),
    "ldat-table2": (50, 1760.96),
    "ldat-table3": (10, 663.17),
    "ldat-table4": (24, 1782.31),
    "ldat-table5": (24, 1251.86),
    "uiat-table1": (72, 3758.73),
    "uiat-table2": (18, 166.6),
    "uiat-table3": (24, 1322.25),
    "uiat-table4": (32, 1900.64),
    "uiat-table5": (42, 2657.95),
    "uiat-table6": (15, 937.09),
}
"""How many numbers a table has, and their sum, from when they were proof-read."""

ROWS = [pytest.param(load(name), row, id=f"{name}: {row.label}") for name in tables() for row in load(name).rows]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data but a test's own."""
    monkeypatch.chdir(tmp_path)
    for variable in ("ROBUSTKIT_DATA_DIR", "ROBUSTKIT_CIFAR10_DIR"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """One of ours, changed."""
    return lambda name, *changes: override(load_recipe(ROOT / "recipes" / f"{name}.py"), changes)


def finished(name: str, recipe: Recipe, accuracies: dict[str, float], n: int = 400, images: str = "these") -> str:
    """A run folder with such results; a model that gets more right gets all that another one gets, and more."""
    folder = Path(name)
    folder.mkdir(parents=True)
    save_recipe(recipe, folder / "recipe.json")
    results, outcomes = {}, {}
    for key, accuracy in accuracies.items():
        easiest = random.Random(key).sample(range(n), n)[: round(accuracy * n)]
        right = "".join("1" if number in easiest else "0" for number in range(n))
        outcomes[key] = {"images": images, "right": right}
        interval = list(wilson(len(easiest), n))
        results[key] = {"accuracy": len(easiest) / n, "n": n, "ci95": interval, "seconds": 1.0}
    (folder / "results.json").write_text(json.dumps({"last": results, "best": results}))
    (folder / "outcomes.json").write_text(json.dumps({"last": outcomes, "best": outcomes}))
    return name


def fails(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("error: "), captured
    for text in said:
        assert text in line


# The files


def test_every_table_was_read_twice() -> None:
    assert set(tables()) == set(READ_TWICE)
    for name, (count, total) in READ_TWICE.items():
        values = [value for row in load(name).rows for value in row.values.values()]
        assert (len(values), round(sum(values), 2)) == (count, total), name


def test_tables_are_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "published/*.toml" in project["tool"]["setuptools"]["package-data"]["robustkit"]


@pytest.mark.parametrize("name", tables())
def test_a_table_is_whole(name: str) -> None:
    table = load(name)
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels) and table.title and table.paper and table.source and table.notes
    keys = {column.key for column in table.columns}
    assert len(keys) == len(table.columns)
    for row in table.rows:
        assert row.values and row.values.keys() <= keys
        assert all(0 <= row.values[c.key] <= 100 for c in table.accuracies if c.key in row.values)
        assert row.test_images or not any(c.key in row.values for c in table.accuracies)


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        ("uiat-table1", "HAT, SVHN", (92.06, 57.35, 54.77, 52.06)),
        ("uiat-table5", "RS-FGSM + UIAT, 10/255", (88.29, 0.00)),
        ("uiat-table5", "GradAlign + UIAT, time", (107.8,)),
        ("ecas-table1", "Cyclic (batch)", (86.82, 56.48, 54.82, 54.51, 54.95, 52.43)),
        ("ecas-table2", "LAS-TRADES, CIFAR-100", (60.62, 28.12, 6051.4)),
        ("ldat-table1", "LDAT", (89.02, 58.44, 59.63, 48.57, 69.19, 64.55, 69.28, 64.21, 66.66, 72.59)),
    ],
)
def test_rows(name: str, label: str, values: tuple[float, ...]) -> None:
    (row,) = (row for row in load(name).rows if row.label == label)
    assert tuple(row.values.values()) == values


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_quote_their_row(path: Path) -> None:
    """The header of a recipe that a table has names the numbers of the row that the recipe finds."""
    said = re.search(r"^Published: +(clean \d+\.\d+.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if said is None:
        return
    table = load("ecas-table1" if "ecas" in path.stem else "uiat-table1")
    words = {
        "PGD-10": "pgd-10",
        "PGD-20": "pgd-20",
        "PGD-50": "pgd-50",
        "CW": "cw",
        "C&W": "cw",
        "AutoAttack": "autoattack",
    }
    quoted = {words.get(word, word): float(n) for word, n in re.findall(r"([\w&-]+) (\d+\.\d+)", said[1])}
    assert quoted == match(load_recipe(path), table).values


def test_settings_are_read_as_overrides_are() -> None:
    found = settings("threat=linf threat.epsilon=8/255 schedule.at=99,104 epochs=110\noptimizer.nesterov=true")
    assert found["threat"] == "linf" and found["threat.epsilon"] == 8 / 255 and found["schedule.at"] == (99, 104)
    assert found["epochs"] == 110 and found["optimizer.nesterov"] is True


def test_unknown_tables_name_near_misses() -> None:
    with pytest.raises(UserError, match="unknown table 'uait-table1'; did you mean 'uiat-table1'"):
        load("uait-table1")
    with pytest.raises(UserError, match="known: ecas-table1, "):
        load("x")


# Finding the row


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_recipe_under_a_row_s_conditions_finds_it(table: PublishedTable, row: Row, recipe: Any) -> None:
    """The conditions are overrides that apply, and nothing of a recipe that obeys them contradicts the paper."""
    attack = row.conditions.get("attack", "pgd")
    if attack not in registry("attack").names():
        pytest.skip(f"no {attack} here")
    part = re.compile(r"[a-z]+|attack\.objective|target(\.inner)+")  # parts first: they bring defaults along
    ordered = sorted(row.conditions.items(), key=lambda item: (part.fullmatch(item[0]) is None, item[0].count(".")))
    obeying = recipe("pgd_at_rn18", *(f"{path}={str(value).split('|')[0]}" for path, value in ordered))
    if not {"attack", "loss", "data"} <= row.conditions.keys() or row.test_images is None:
        return
    assert match(obeying, table) == row
    item = Item("run", obeying, True, {"last": {"clean": {"accuracy": 0.5, "n": 10_000, "ci95": [0.4, 0.6]}}})
    (found,) = beside([item], table)
    contradicted = {deviation.what for deviation in found.deviations if deviation.paper != "not stated"}
    assert contradicted <= {"data", "checkpoint", "seeds", "test images of clean"}


@pytest.mark.parametrize(
    ("name", "changes", "table", "wanted", "expected"),
    [
        ("uiat_rn18", [], "uiat-table1", None, "UIAT, CIFAR-10"),
        ("uiat_rn18", ["data=cifar100", "model.backbone=resnet18_cifar_w16"], "uiat-table1", None, "UIAT, CIFAR-100"),
        ("uiat_rn18", ["threat.epsilon=12/255"], "uiat-table3", None, "UIAT, 12/255"),
        ("uiat_rn18", ["target.inner.objective.beta=0"], "uiat-table6", None, "UAG + IAM"),
        ("uiat_rn18", ["target=inverse", "target.objective.beta=0"], "uiat-table6", None, "IAT"),
        ("pgd_at_rn18", ["loss=mart"], "uiat-table1", None, "MART, CIFAR-10"),
        ("trades_rn18", ["loss=hat", "data=svhn"], "uiat-table1", None, "HAT, SVHN"),
        ("trades_rn18", ["loss=hat", "threat.epsilon=16/255"], "uiat-table3", None, "HAT, 16/255"),
        ("uiat_rn18", ["target.start=75"], "uiat-table6", None, "UIAT"),
        ("ecas_pgd_at_wrn34", ["epsilon=cyclic-batch"], "ecas-table1", None, "Cyclic (batch)"),
        ("uiat_rn18", [], "uiat-table1", "mart", "MART, CIFAR-10"),
        ("uiat_rn18", [], "uiat-table1", "uiat one-off, svhn", "UIAT one-off, SVHN"),
        (
            "uiat_rn18",
            ["data=cifar100", "model.backbone=wrn28_10_silu"],
            "uiat-table4",
            "HAT",
            "HAT, CIFAR-100, WRN-28-10",
        ),
        ("uiat_rn18", ["data=digits"], "ldat-table1", "LDAT", "LDAT"),
    ],
)
def test_rows_found(recipe: Any, name: str, changes: list[str], table: str, wanted: str | None, expected: str) -> None:
    assert match(recipe(name, *changes), load(table), wanted).label == expected


@pytest.mark.parametrize(
    ("changes", "table", "wanted", "said"),
    [
        (["data=digits"], "uiat-table1", None, "--row: SAT, CIFAR-10 | TRADES, CIFAR-10"),
        (["head=gaussian-mixture"], "uiat-table1", None, "certainly"),
        (["weights=awp"], "uiat-table1", None, "certainly"),
        (["attack.objective=kl"], "uiat-table1", None, "certainly"),
        (["threat.epsilon=8/255"], "uiat-table3", None, "10/255 | "),
        (["target.inner.objective.beta=0.5"], "uiat-table6", None, "UAG + IAM | UIAT"),
        ([], "uiat-table4", "UIAT", "UIAT, CIFAR-10, PRN-18 | UIAT, CIFAR-10, WRN-28-10 | UIAT, CIFAR-100"),
        ([], "uiat-table1", "UAIT", "no row 'UAIT'; its rows: SAT, CIFAR-10 | "),
    ],
)
def test_rows_are_not_guessed(recipe: Any, changes: list[str], table: str, wanted: str | None, said: str) -> None:
    with pytest.raises(UserError) as error:
        match(recipe("uiat_rn18", *changes), load(table), wanted)
    assert said in str(error.value)


# Beside the paper


def deviations(data: dict[str, Any], number: int = 0) -> dict[str, tuple[str, str]]:
    return {entry["what"]: (entry["here"], entry["paper"]) for entry in data["runs"][number]["deviations"]}


def test_measured_beside_published(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = "data.per_class=1000", "model.backbone=resnet18_cifar_w16", "epochs=20", "batch_size=64"
    run = finished("small", recipe("uiat_rn18", *smaller, "precision.outer=bf16"), {"clean": 0.85, "cw": 0.3})
    assert main(["compare", run, "--paper", "uiat-table1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["paper"]["source"] == "UIAT (CVPR 2023), Table 1" and data["runs"][0]["row"] == "UIAT, CIFAR-10"
    clean, cw = data["runs"][0]["measures"]
    assert clean["checkpoint"] == "last = best" and clean["published"] == 0.8501 and clean["inside"]
    assert clean["difference"] == pytest.approx(-0.0001) and clean["n"] == 400
    assert cw["published"] == 0.511 and not cw["inside"]
    found = deviations(data)
    assert found["training images"] == ("the first 1,000 of each class", "all")
    assert found["model.backbone"] == ("resnet18_cifar_w16", "resnet18_cifar")
    assert found["epochs"] == ("20", "100") and found["batch_size"] == ("64", "128")
    assert found["precision.outer"] == ("bf16", "not stated")
    assert found["test images of clean, cw"] == ("400", "10,000") and found["seeds"][0] == "one"
    assert "1,024" in found["checkpoint"][0] and "unknown" in found["data"][0]
    assert main(["compare", run, "--paper", "uiat-table1"]) == 0
    out = capsys.readouterr().out
    assert "small beside 'UIAT, CIFAR-10' of UIAT (CVPR 2023), Table 1" in out
    assert "85.01" in out and "in the interval" in out and "outside" in out and "no settings of CW" in out


def test_copies_of_the_data_are_told_apart(
    recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("run", recipe("pgd_at_rn18"), {"clean": 0.8})

    def data() -> tuple[str, str] | None:
        assert main(["compare", run, "--paper", "uiat-table1", "--json"]) == 0
        return deviations(json.loads(capsys.readouterr().out)).get("data")

    Path("jpeg/train").mkdir(parents=True)
    monkeypatch.setenv("ROBUSTKIT_CIFAR10_DIR", "jpeg")
    copy = data()
    assert copy is not None and copy[0] == "an image folder (today, in jpeg)"
    Path("data/cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.delenv("ROBUSTKIT_CIFAR10_DIR")
    assert data() is None
    Path(run, "environment.json").write_text('{"data": "an image folder"}')  # what was read when it was trained
    assert data() == ("an image folder", "the original files")
    Path(run, "environment.json").write_text('{"data": "the original files"}')
    monkeypatch.setenv("ROBUSTKIT_CIFAR10_DIR", "jpeg")
    assert data() is None


def test_the_method_that_was_not_run_is_a_deviation(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished("run", recipe("pgd_at_rn18"), {"clean": 0.8})
    assert main(["compare", run, "--paper", "uiat-table1", "--row", "UIAT", "--json"]) == 0
    found = deviations(json.loads(capsys.readouterr().out))
    assert found["target"] == ("none", "momentum") and found["loss"] == ("cross-entropy", "align")
    assert "target.gamma" not in found  # the part itself says so
    assert len(found) == len({"target", "loss", "data", "checkpoint", "test images of clean", "seeds"})
    assert main(["compare", run, "--paper", "uiat-table1", "--row", "HAT", "--json"]) == 0
    found = deviations(json.loads(capsys.readouterr().out))
    assert found["loss"] == ("cross-entropy", "hat") and found["attack.objective"] == ("cross-entropy", "kl")
    assert main(["compare", run, "--paper", "ecas-table2", "--row", "LAS-AWP", "--json"]) == 0
    assert deviations(json.loads(capsys.readouterr().out))["method"] == ("cannot be told from the recipe", "LAS-AWP")


def test_choices_that_the_paper_does_not_state_are_listed(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    changes = "loss.label_smoothing=0.1", "model.normalization=cifar10", "epsilon.value=4/255", "attack.start=clean"
    run = finished("run", recipe("pgd_at_rn18", *changes, "data.root=somewhere", "seed=5"), {"clean": 0.8})
    assert main(["compare", run, "--paper", "uiat-table1", "--json"]) == 0
    found = deviations(json.loads(capsys.readouterr().out))
    silent = {what: here for what, (here, paper) in found.items() if paper == "not stated"}
    assert silent.keys() - {"checkpoint", "seeds"} == {change.partition("=")[0] for change in changes}
    assert silent["epsilon.value"] == "0.01569 = 4/255" and silent["model.normalization"] == "cifar10"


def test_measures_by_another_setting_are_a_deviation(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    changed = recipe("pgd_at_rn18", "evaluation.0.measures.1.steps=5", "evaluation.0.measures.1.step_size=3/255")
    run = finished("run", changed, {"pgd-20": 0.5})
    assert main(["compare", run, "--paper", "uiat-table1", "--json"]) == 0
    found = deviations(json.loads(capsys.readouterr().out))
    assert found["pgd-20: steps"] == ("5", "20") and found["pgd-20: step_size"][1] == "0.007843 = 2/255"


def test_several_runs_and_their_seeds(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(f"run-{seed}", recipe("pgd_at_rn18", f"seed={seed}"), {"clean": 0.8}) for seed in (1, 2)]
    assert main(["compare", *runs, "--paper", "uiat-table1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [run["row"] for run in data["runs"]] == ["SAT, CIFAR-10"] * 2 and deviations(data, 1)["seeds"][0] == "2"


def test_mistakes_with_papers(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished("run", recipe("uiat_rn18"), {"clean": 0.8})
    fails(capsys, ["compare", run], "run", "give a B, too, or --paper TABLE")
    fails(capsys, ["compare", run, run, "--row", "UIAT"], "--row", "add --paper TABLE")
    fails(capsys, ["compare", run, "--paper", "list"], "unknown table 'list'", "ecas-table1", "uiat-table6")
    fails(capsys, ["compare", run, "--paper", "uiat-table2"], "no accuracies", "minutes per epoch")
    fails(capsys, ["compare", run, "--paper", "uiat-table3"], "run: no row", "UIAT, 10/255")
    recipe_file = str(ROOT / "recipes" / "uiat_rn18.py")
    fails(capsys, ["compare", recipe_file, "--paper", "uiat-table1"], "no results", "robustkit eval")
    assert main(["compare", "--help"]) == 0
    listed = "".join(capsys.readouterr().out.split())
    assert all(name in listed for name in tables())


# Beside each other


def compared(capsys: pytest.CaptureFixture[str], *runs: str) -> dict[str, Any]:
    assert main(["compare", *runs, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_two_networks_on_the_same_images(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished("one", recipe("uiat_rn18"), {"clean": 0.8, "cw": 0.5})
    two = finished("two", recipe("pgd_at_rn18"), {"clean": 0.77, "cw": 0.4975})
    data = compared(capsys, one, two)
    clean, cw = data["differences"]
    assert (clean["first"], clean["second"], clean["basis"]) == (["one"], ["two"], "same images")
    assert (clean["only_first"], clean["only_second"], clean["p"]) == (12, 0, 2 / 2**12) and clean["resolved"]
    assert clean["difference"] == pytest.approx(0.03) and clean["ci95"][0] > 0
    assert (cw["only_first"], cw["p"], cw["resolved"]) == (1, 1.0, False) and data["seeds"] == []
    assert main(["compare", one, two]) == 0
    out = capsys.readouterr().out
    assert "+3.0" in out and "12 : 0" in out and "not resolved" in out
    assert "not about the methods" in out and "Over seeds" not in out


@pytest.mark.parametrize("how", ["other images", "no outcomes", "older outcomes"])
def test_two_networks_on_different_images(how: str, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished("one", recipe("uiat_rn18"), {"clean": 0.8})
    two = finished("two", recipe("pgd_at_rn18"), {"clean": 0.7}, images="those" if how == "other images" else "these")
    saved = Path(two, "outcomes.json")
    if how == "no outcomes":
        saved.unlink()
    elif how == "older outcomes":
        saved.write_text(saved.read_text().replace("1", "0", 1))
    (found,) = compared(capsys, one, two)["differences"]
    assert found["basis"] == "different images" and found["p"] is None and found["resolved"]
    assert found["ci95"][0] < 0.1 < found["ci95"][1]
    assert main(["compare", one, two]) == 0
    assert "independent" in capsys.readouterr().out


def test_seeds_are_taken_together(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = [finished(f"a/uiat-{s}", recipe("uiat_rn18", f"seed={s}"), {"cw": 0.5 + s / 100}) for s in (1, 2, 3)]
    second = [finished(f"a/pgd-{s}", recipe("pgd_at_rn18", f"seed={s}"), {"cw": 0.4 + s / 100}) for s in (1, 2)]
    data = compared(capsys, *first, *second, first[0])  # the same run again is no further seed
    three, two = data["seeds"]
    assert three["runs"] == first and three["n"] == 3 and two["n"] == 2
    assert three["mean"] == pytest.approx(0.52) and three["sd"] == pytest.approx(0.01)
    (found,) = data["differences"]
    assert found["basis"] == "seeds" and found["resolved"] and found["difference"] == pytest.approx(0.105)
    assert main(["compare", *first, *second]) == 0
    out = capsys.readouterr().out
    assert "52.0 ± 1.00" in out and "uiat-1 (+2) - pgd-1 (+1), last" in out and "Welch" in out


def test_one_seed_on_a_side_resolves_nothing(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(f"uiat-{s}", recipe("uiat_rn18", f"seed={s}"), {"cw": 0.5 + s / 100}) for s in (1, 2)]
    (found,) = compared(capsys, *runs, finished("pgd", recipe("pgd_at_rn18"), {"cw": 0.1}))["differences"]
    assert found["basis"] == "seeds" and found["ci95"] is None and not found["resolved"]
    assert compared(capsys, *runs)["differences"] == []


def test_the_best_checkpoint_has_rows_of_its_own(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished("one", recipe("uiat_rn18"), {"clean": 0.8})
    two = finished("two", recipe("pgd_at_rn18"), {"clean": 0.7})
    results = json.loads(Path(one, "results.json").read_text())
    results["best"]["clean"]["accuracy"] = 0.75
    Path(one, "results.json").write_text(json.dumps(results))
    last, best = compared(capsys, one, two)["differences"]
    assert (last["checkpoint"], last["basis"]) == ("last", "same images")
    assert (best["checkpoint"], best["basis"]) == ("best", "different images")  # its outcomes are not of this result
    assert best["difference"] == pytest.approx(0.05)
