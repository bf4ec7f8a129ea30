"""Nothing takes the CPU for granted: what works there does on a device that takes none of its tensors, nor float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils import backend_registration

from robustkit.core import checkpoint
from robustkit.folder import read_metrics, read_results

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no device that is written in Python",
)

RECIPES = """
from robustkit import Model, Recipe, Suite, Validation, evolve
from robustkit.attacks import PGD, Grouped
from robustkit.datasets import Digits
from robustkit.epsilons import ECAS, Curriculum
from robustkit.evaluation import Attacked, Clean
from robustkit.evaluation.suites import APGD_DLR
from robustkit.heads import GaussianMixture
from robustkit.losses import Align, CrossEntropy
from robustkit.schedules import Constant
from robustkit.targets import Momentum, OneOff, Universal
from robustkit.threats import Linf
from robustkit.weights import AWP, Exponential, Still

recipe = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    head=GaussianMixture(likelihood=0.1),
    threat=Linf(epsilon=0.15),
    epsilon=ECAS(values=(0.05, 0.1, 0.15, 0.2), big=2),
    attack=PGD(steps=2),
    target=Momentum(inner=Universal(radius=0.075), start=0.5),
    loss=Align(weight=3.5),
    weights=AWP(gamma=0.005),
    average=Exponential(rate=0.9),
    schedule=Constant(),
    epochs=2,
    batch_size=256,
    validation=Validation(images=64, train_images=32, attack=PGD(steps=2)),
    evaluation=(Suite(images=16, measures=(Clean(), Attacked(key="pgd-2", steps=2), APGD_DLR)),),
)
plain = evolve(recipe, weights=Still(), evaluation=())
recipes = {
    "one-off": evolve(plain, target=OneOff(inner=Universal(radius=0.075), start=1)),
    "cat": evolve(
        plain,
        epsilon=Curriculum(stages=2, rule="training", train_accuracy=0.0),
        attack=Grouped(inner=PGD(steps=2, mode="train")),
        target=None,
        loss=CrossEntropy(),
    ),
}
"""
ON = ["--device", "elsewhere"]
COMMANDS = {
    "run": ["run", "recipe.py", "--out", "there", "--max-steps", "3", *ON],
    "resume": ["resume", "there", *ON],
    "here": ["run", "recipe.py", "--out", "here", "--device", "cpu"],
    "one-off": ["run", "recipe.py:one-off", "--out", "one-off", *ON],
    "cat": ["run", "recipe.py:cat", "health.on_fault=skip", "--out", "cat", *ON],
    "detection": ["eval", "there", "--suite", "detection", "--limit", "4", *ON],
    "curves": ["eval", "there", "--curves", "steps", "--limit", "4", *ON],
    "predict": ["predict", "there", "a.png", "--reject", "0.5", *ON],
    "show": ["show", "there", "--calibrate-entropy", "--batches", "1", *ON],
    "report": ["report", "there", "--figure", "features", "--images", "40", *ON],
    "bench": ["bench", "recipe.py", "--windows", "1", *ON],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The folder, and (exit code, output) of each command."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "recipe.py").write_text(RECIPES)
    (folder / "commands.json").write_text(json.dumps(list(COMMANDS.values())))
    Image.new("L", (8, 8), 100).save(folder / "a.png")
    driver = [sys.executable, str(Path(__file__).with_name("elsewhere.py")), "commands.json"]
    ended = subprocess.run(driver, cwd=folder, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return folder, dict(zip(COMMANDS, map(json.loads, ended.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_works(name: str, done: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    code, said = done[1][name]
    assert code == 0, said


def test_comes_to_the_same_as_on_the_cpu(done: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    folder, _ = done

    def found(name: str) -> tuple[Any, Any]:
        results = read_results(folder / name)["last"]
        epochs = [report["validation"] for report in read_metrics(folder / name)]
        return {key: entry["accuracy"] for key, entry in results.items()}, epochs

    there, here = (checkpoint.read(folder / name / "checkpoints" / "last.safetensors")[0] for name in ("there", "here"))
    assert json.loads((folder / "there" / "environment.json").read_text())["device"] == "elsewhere"
    states = [name for name in here if not name.startswith("totals.")]  # of these, some are float32 there
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in states)
    assert found("there") == found("here")


def test_what_meets_a_tensor_of_the_cpu_is_refused() -> None:
    code = "import torch, elsewhere; torch.zeros(2, device='elsewhere') + torch.zeros(2)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and "all tensors to be on the same device" in ended.stderr
