"""Bench: what it measures adds up, the usual script does the same work the slow way, and nothing stays changed."""

import json
from pathlib import Path

import pytest
import torch

from robustkit import bench as measuring
from robustkit.attacks import PGD
from robustkit.bench import _as_usual, bench
from robustkit.cli.main import main
from robustkit.core import loop
from robustkit.core.batch import Budget, Passes
from robustkit.core.recipe import save_recipe
from robustkit.core.rng import whole
from robustkit.engine import Predictor
from robustkit.epsilons import ECAS
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.targets import Momentum, Universal
from robustkit.testing import tiny_recipe
from robustkit.threats import Linf
from robustkit.weights import AWP


def test_parts_add_up() -> None:
    recipe = tiny_recipe(target=Momentum(inner=Universal(), start=0.2), epsilon=ECAS(), attack=PGD(steps=3))
    make_batch, grad, layout = loop.make_batch, torch.autograd.grad, Predictor.layout
    told: list[str] = []
    found = bench(recipe, device="cpu", windows=3, steps=2, watch=told.append)
    assert (loop.make_batch, torch.autograd.grad, Predictor.layout) == (make_batch, grad, layout)
    assert found.passes == loop.step_passes(recipe, load_parts(recipe, make_world(recipe, "cpu")).progress)
    assert found.spread[0] <= found.seconds <= found.spread[1]
    assert found.images_per_second == pytest.approx(16 / found.seconds)
    assert set(found.split) == {"data", "epsilon", "attack", "target", "optimizer", "outer"}
    assert all(seconds > 0 for seconds in found.split.values())
    # conv 3x3 1->32 at 8x8, 32->64 at 4x4, 64->64 at 2x2, linear 64->4: multiply-adds of one image, times two
    assert found.flops == 2 * 9 * (32 * 64 + 32 * 64 * 16 + 64 * 64 * 4) * 16 * found.units + 2 * 256 * 16 * found.units
    assert found.ratio_to_plain is not None and found.plain_seconds is not None and found.memory > 0
    assert "3 batch normalisations folded" in found.path and "window 3 of 3" in told


def test_the_usual_script_takes_the_same_steps() -> None:
    recipe = tiny_recipe(weights=AWP())
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    budget = Budget(x.new_full((8,), 8 / 255))

    def attacked() -> torch.Tensor:
        predict = Predictor(parts.model, torch.device("cpu"))
        return PGD(steps=5)(predict, x, y, budget, Linf(), whole(x, 1, "bench"))

    expected = attacked()
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    with _as_usual():
        found = attacked()
    assert all(parameter.grad is not None for parameter in parts.model.parameters())  # for nothing
    assert (found - expected).abs().max() < 1e-6
    assert bench(recipe, device="cpu", windows=1).ratio_to_plain is not None


def test_a_recipe_that_diverges_is_measured() -> None:
    """Weights stand still: so many steps on one batch at the recipe's rate need not end in numbers."""
    found = bench(tiny_recipe(optimizer=SGD(lr=1e30)), device="cpu", windows=3)
    assert found.seconds > 0 and found.ratio_to_plain is not None


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_recipe(tiny_recipe(), tmp_path / "recipe.json")
    assert main(["bench", str(tmp_path / "recipe.json"), "--windows", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "images a second" in told.out and "times as long" in told.out and "window 2 of 2" in told.err
    words = ["bench", str(tmp_path / "recipe.json"), "--no-plain", "--json", "--device", "cpu", "attack.steps=1"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ratio_to_plain"] is None and Passes(**data["passes"]).units == data["units"] == 5
    assert 0 < data["share_of_ceiling"] < 1


def test_a_slow_matrix_product_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that emulates bfloat16 would be minutes at the next ones."""
    made: list[int] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: made.append(size[0]) or ones(*size, **options))
    monkeypatch.setattr(measuring, "CEILING_SECONDS", 0.0)
    assert measuring._ceiling(torch.device("cpu"), "fp32") > 0
    assert made == [measuring.CEILING_SIZES[0]]
    monkeypatch.setattr(measuring, "CEILING_SECONDS", 1e9)
    monkeypatch.setattr(measuring, "CEILING_SIZES", (8, 16))
    assert measuring._ceiling(torch.device("cpu"), "bf16") > 0
    assert made[1:] == [8, 16]
