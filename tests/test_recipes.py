"""Every recipe loads, survives JSON, says what it costs, and runs with --smoke."""

import json
from pathlib import Path

import pytest

from robustkit.cli.main import main
from robustkit.core.batch import Progress
from robustkit.core.loop import step_passes
from robustkit.core.recipe import Recipe, load_recipe
from robustkit.core.spec import digest, from_json, to_json

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py"))
UNITS = {  # forward-units of a step in the first epoch
    "recipes/natural.py": 3,
    "recipes/pgd_at_rn18.py": 23,
    "recipes/trades_rn18.py": 27,
    "recipes/uiat_rn18.py": 28,
    "recipes/uiat_oneoff_rn18.py": 24,
    "recipes/ecas_pgd_at_wrn34.py": 24,
    "recipes/ecas_uiat_wrn34.py": 29,
    "recipes/ecas_uiat_gmm_awp_wrn34.py": 32,
    "recipes/quickstart.py": 29,
    "recipes/cpu/ecas_uiat_wrn34.py": 29,
}
QUICK = {
    "recipes/quickstart.py",
    "recipes/cpu/ecas_uiat_wrn34.py",
    "recipes/trades_rn18.py",
    "recipes/uiat_oneoff_rn18.py",
}


def test_all_recipes_are_found() -> None:
    assert sorted(UNITS) == RECIPES


@pytest.mark.parametrize("path", RECIPES)
def test_loads_and_survives_json(path: str) -> None:
    recipe = load_recipe(ROOT / path)
    again = from_json(Recipe, json.loads(json.dumps(to_json(recipe))))
    assert again == recipe and hash(again) == hash(recipe) and digest(again) == digest(recipe)


@pytest.mark.parametrize("path", RECIPES)
def test_header_says_what_how_and_cost(path: str) -> None:
    header = (ROOT / path).read_text(encoding="utf-8").split('"""')[1]
    assert f"robustkit run {path}" in header
    assert "forward-units a step" in header and "Measured:" in header
    assert f"{UNITS[path]} forward-units" in header


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
