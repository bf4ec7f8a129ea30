"""docs/plugins.md: its strategies and its recipe are as short as it says, keep their contracts, and train."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from robustkit import load_recipe
from robustkit.core.batch import Passes
from robustkit.core.loop import train_step
from robustkit.core.spec import from_json, to_json
from robustkit.opening import load_parts, make_world
from robustkit.testing import check

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
LOSS, SCHEDULE, RECIPE = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files: the two strategies in one, the recipe in another."""
    (tmp_path / "patient_hinge_parts.py").write_text(f"{LOSS}\n\n{SCHEDULE}")
    (tmp_path / "patient_hinge.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("patient_hinge_parts", None)


def parts_of(folder: Path) -> ModuleType:
    return importlib.import_module("patient_hinge_parts")


def lines(text: str) -> int:
    """Lines that are neither blank nor imports."""
    imports = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    taken = {number for node in imports for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return sum(1 for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in taken)


def test_they_are_as_short_as_it_says() -> None:
    assert lines(LOSS) <= 12
    assert lines(SCHEDULE) <= 15
    assert len(RECIPE.splitlines()) <= 40


def test_they_keep_their_contracts(folder: Path) -> None:
    module = parts_of(folder)
    check(module.Hinge())
    check(module.Hinge(margin=0.5))
    check(module.Patient())


def test_the_recipe_trains_and_each_image_gets_a_radius_of_its_own(folder: Path) -> None:
    recipe = load_recipe(folder / "patient_hinge.py")
    assert from_json(type(recipe), to_json(recipe)) == recipe
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    units = sum(recipe.passes(parts.progress).values(), Passes()).units
    assert f"{units} forward-units" in RECIPE
    rows = parts.rows[:64]
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    for _ in range(3):
        train_step(parts, rows)
    assert all(not torch.equal(p, before[name]) for name, p in parts.model.named_parameters())
    memory = parts.strategies["epsilon"]
    fooled, seen = memory.read(rows)
    assert bool(seen.all()) and int(memory.visited.sum()) == 64
    # an untrained net is fooled by most: of three visits the last weighs 1/2, the one before 1/4, the first 1/8
    assert set(fooled.flatten().tolist()) <= {k / 8 for k in range(8)} and fooled.max() > 0
