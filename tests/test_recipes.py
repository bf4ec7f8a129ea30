"""Every recipe loads, survives JSON, says what it costs, and runs with --smoke."""

import json
import re
from pathlib import Path

import pytest

from robustkit.cli.main import main
from robustkit.core.batch import Progress
from robustkit.core.loop import step_passes
from robustkit.core.recipe import Recipe, load_recipe, load_recipes
from robustkit.core.spec import digest, evolve, from_json, to_json, walk
from robustkit.smoke import smoke
from robustkit.testing import check_steps

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py"))
LOADED = {
    f"{file}:{name}" if name else file: recipe for file in FILES for name, recipe in load_recipes(ROOT / file).items()
}
RECIPES = list(LOADED)
SINGLE = [address for address in RECIPES if address in FILES]
FAMILIES = [address for address in RECIPES if address not in FILES]
TABLE = {"sat": 23, "trades": 27, "mart": 26, "hat": 31, "uiat": 28, "uiat-oneoff": 24}
SINGLE_STEP = {"rs-fgsm": 5, "rs-fgsm-uiat": 6, "grad-align": 13, "grad-align-uiat": 14}
ECAS = {"ecas-pgd-at": 24, "ecas-trades": 28, "ecas-trades-code": 28, "ecas-awp": 27}
ECAS |= {f"{k}-fixed": n - 1 for k, n in ECAS.items()} | {"ecas-pgd-at-fixed-unsmoothed": 23}
BASELINES = {"pgd-at": 23, "trades": 27, "mart": 26, "fat": 23, "awp": 26, "trades-awp": 27}
SCHEDULES = {"fixed": 23, "linear": 23, "cyclic": 23, "cyclic-batch": 23, "ecas": 24}
MIXES = {"uiat": 28, "mart": 26, "mixture": 23}
UNITS = {  # forward-units of a step in the first epoch
    "recipes/natural.py": 3,
    "recipes/own_images.py": 27,
    "recipes/pgd_at_rn18.py": 23,
    "recipes/trades_rn18.py": 27,
    "recipes/uiat_rn18.py": 28,
    "recipes/uiat_oneoff_rn18.py": 24,
    "recipes/ecas_pgd_at_wrn34.py": 24,
    "recipes/ecas_uiat_wrn34.py": 29,
    "recipes/ecas_uiat_gmm_awp_wrn34.py": 32,
    "recipes/quickstart.py": 29,
    "recipes/cpu/ecas_uiat_wrn34.py": 29,
    "recipes/pgd_at_rice_prn18.py": 23,
    **{f"recipes/uiat_helper.py:{data}": 3 for data in ("cifar10", "cifar100", "svhn")},
    **{f"recipes/uiat_table1.py:{data}-{k}": n for data in ("cifar10", "cifar100", "svhn") for k, n in TABLE.items()},
    **{f"recipes/uiat_table3.py:eps{e}-{k}": TABLE[k] for e in (10, 12, 16) for k in TABLE if k not in ("sat", "mart")},
    **{
        f"recipes/uiat_table4.py:{data}-{net}-{k}": n
        for data in ("cifar10", "cifar100")
        for net in ("prn18", "wrn28")
        for k, n in (("uiat", 28), ("uiat-oneoff", 24), ("hat", 31), ("rebuffi", 27), ("helper", 3))
    },
    "recipes/uiat_table6.py:iat": 34,
    "recipes/uiat_table6.py:uag": 26,
    "recipes/uiat_table6.py:uag-fr": 28,
    "recipes/uiat_table6.py:uag-iam": 26,
    "recipes/uiat_table6.py:uiat": 28,
    **{f"recipes/uiat_table5.py:{k}-{e}": n for e in (6, 8, 10) for k, n in SINGLE_STEP.items()},
    "recipes/cpu/single_step.py:rs-fgsm-8": 5,
    "recipes/cpu/single_step.py:rs-fgsm-16": 5,
    "recipes/cpu/single_step.py:grad-align-8": 13,
    **{f"recipes/cpu/uiat_table1.py:{k}": n for k, n in TABLE.items() if k != "sat"},
    "recipes/cpu/uiat_table1.py:natural": 3,
    "recipes/cpu/uiat_table1.py:pgd-at": 23,
    "recipes/cpu/uiat_table1.py:iat": 34,
    "recipes/fat.py:fat-wrn32": 23,
    "recipes/fat.py:fat-trades-wrn34": 27,
    "recipes/fat.py:fat-mart-wrn34": 26,
    "recipes/dat.py:dat": 23,
    "recipes/dat.py:dat-code": 23,
    "recipes/cat.py": 10,
    "recipes/cpu/cat.py": 10,
    "recipes/daat.py": 31,
    "recipes/cpu/daat.py": 31,
    **{f"recipes/ecas_table1.py:{k}": n for k, n in SCHEDULES.items()},
    "recipes/ecas_table1.py:fixed-unsmoothed": 23,
    **{
        f"recipes/ecas_table{number}.py:{data}-{k}": n - ("code" in k and data == "cifar10")  # no KL there
        for number in (2, 3)
        for data in ("cifar10", "cifar100")
        for k, n in ECAS.items()
    },
    **{f"recipes/ecas_table4.py:{k}": n for k, n in (BASELINES | {"ecas-awp": 27, "ecas-awp-fixed": 26}).items()},
    **{f"recipes/ecas_mixes.py:ecas-{k}": n + 1 for k, n in MIXES.items()},
    **{f"recipes/ecas_mixes.py:ecas-{k}-fixed": n for k, n in MIXES.items()},
    **{f"recipes/cpu/ecas_table1.py:{k}": n for k, n in SCHEDULES.items()},
    **{f"recipes/cpu/ecas_table1.py:{k}": BASELINES[k] for k in ("awp", "fat")},
    "recipes/cpu/ecas_table1.py:ecas-awp": 27,
    "recipes/cpu/ecas_table1.py:ecas-uiat": 29,
}
LDAT = {"standard": 23, "trades": 27, "mart": 26, "lbgat": 30, "ldat": 26}
READINGS = {"lbgat-0": 30, "alp": 26} | {f"ldat-{k}": 26 for k in ("down", "unit", "no-margin", "fixed")}
SMALL_LDAT = {"pgd-at": 23, "trades": 27, "alp": 26, "lbgat": 30}
SMALL_LDAT |= {f"ldat-{name}": 26 for name in ("up", "down", "unit", "likelihood-1")}
UNITS |= {
    "recipes/ldat_prn18.py": 26,
    "recipes/ldat_wrn28.py": 26,
    **{f"recipes/ldat_table1.py:{k}": n for k, n in (LDAT | READINGS).items()},
    **{f"recipes/ldat_table2.py:{k}": n for k, n in LDAT.items()},
    **{f"recipes/ldat_table3.py:beta-{beta}": 26 for beta in ("0", "0.2", "0.5", "0.8", "1")},
    **{f"recipes/ldat_figure6.py:{k}": 26 for k in ("ldat", "pgd-ce-linf", "pgd-ce-l2")},
    **{f"recipes/ldat_figure6.py:pgd-kl-{k}": 27 for k in ("linf", "l2")},
    **{f"recipes/lbgat.py:{data}-{weight}": 30 for data in ("cifar10", "cifar100") for weight in (0, 6)},
    **{f"recipes/cpu/ldat_table1.py:{k}": n for k, n in SMALL_LDAT.items()},
}
QUICK = {
    "recipes/cpu/ldat_table1.py:ldat-up",
    "recipes/cpu/ldat_table1.py:lbgat",
    "recipes/quickstart.py",
    "recipes/cpu/ecas_uiat_wrn34.py",
    "recipes/trades_rn18.py",
    "recipes/uiat_oneoff_rn18.py",
    "recipes/cpu/uiat_table1.py:hat",
    "recipes/cpu/ecas_table1.py:ecas-awp",
    "recipes/cpu/single_step.py:grad-align-8",
}


def test_all_recipes_are_found() -> None:
    assert sorted(UNITS) == sorted(RECIPES)


@pytest.mark.parametrize("path", RECIPES)
def test_loads_and_survives_json(path: str) -> None:
    recipe = load_recipe(ROOT / path)
    again = from_json(Recipe, json.loads(json.dumps(to_json(recipe))))
    assert again == recipe and hash(again) == hash(recipe) and digest(again) == digest(recipe)


def header_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.parametrize("path", FILES)
def test_header_says_what_how_and_cost(path: str) -> None:
    header = header_of(path)
    assert f"robustkit run {path}" in header
    assert "forward-units a step" in header and "Measured:" in header
    assert path not in SINGLE or f"{UNITS[path]} forward-units" in header


@pytest.mark.parametrize("address", FAMILIES)
def test_header_of_a_family_has_a_line_for_each(address: str) -> None:
    """With its cost in the last column, or named to be run and one cost for all."""
    file, _, name = address.partition(":")
    line = re.search(rf"^    {name}  .*? (\d+)(?: /.*)?$", header_of(file), re.MULTILINE)
    if line is not None:
        assert int(line[1]) == UNITS[address]
    else:
        assert f"robustkit run {address} " in header_of(file) and f"{UNITS[address]} forward-units" in header_of(file)


@pytest.mark.parametrize("path", RECIPES)
def test_cost(path: str) -> None:
    recipe = load_recipe(ROOT / path)
    assert step_passes(recipe, Progress.at(0, recipe.epochs, 391)).units == UNITS[path]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow) for path in RECIPES]
)
def test_smoke(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(ROOT / path), "--smoke", "--device", "cpu", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"clean", "pgd-20", "cw"} <= set(results["last"])
    assert (tmp_path / "run" / "figures" / "examples.png").stat().st_size > 0
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").is_file()


def composition(recipe: Recipe) -> tuple[tuple[str, type], ...]:
    """Which strategies take part in a step, whatever their settings."""
    fields = ("threat", "epsilon", "attack", "target", "head", "loss", "weights", "average", "optimizer")
    return tuple((f"{name}.{path}", type(part)) for name in fields for path, part in walk(getattr(recipe, name)))


COMPOSITIONS = {composition(recipe): path for path, recipe in reversed(LOADED.items())}


@pytest.mark.parametrize("path", sorted(COMPOSITIONS.values()))
def test_a_step_never_waits_for_a_device(path: str) -> None:
    """And leaves no tensor on another one: no GPU is needed to see that. Networks are small here, but for one."""
    recipe = smoke(LOADED[path])
    if path != "recipes/ldat_prn18.py":
        recipe = evolve(recipe, model=evolve(recipe.model, backbone="convnet_small"))
    check_steps(recipe, path)
