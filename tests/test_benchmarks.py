"""The scripts of tests/benchmarks do what they say, in a tiny form on the CPU: the numbers themselves mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from robustkit import Suite, UserError
from robustkit.core.batch import Progress
from robustkit.core.device import has_fast_bfloat16
from robustkit.core.loop import step_passes
from robustkit.datasets import Synthetic
from robustkit.evaluation import Attacked, Clean
from robustkit.folder import noted

FOLDER = Path(__file__).parent / "benchmarks"
UNITS = {"ecas+uiat": 29, "uiat": 28, "pgd-at": 23, "trades": 27}
ONE_OFF = {"before": 24, "in": 28, "after": 23}
"""Forward-units of a step: those of the recipes' headers."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of the folder, as a module."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location(f"robustkit_benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_gpu_script_names_the_steps_that_it_says_it_measures(script: Callable[[str], ModuleType]) -> None:
    gpu = script("gpu")
    seen = set()
    for case in gpu.cases():
        recipe = gpu.recipe_of(case, Namespace(precision="bf16", cifar10=False, tiny=False))
        net, rest = case.name.split()[-1], case.name.removesuffix(case.name.split()[-1]).split()
        assert recipe.model.backbone == {"rn18": "resnet18_cifar", "wrn34": "wrn34_10"}[net]
        assert recipe.batch_size == 128 and recipe.precision.outer == "bf16"
        train, held_out = recipe.data.train, recipe.validation.images
        steps_per_epoch = -(-(train - held_out) // recipe.batch_size)
        for step in (1, 80):  # whenever it is measured
            progress = Progress.at(step, recipe.epochs, steps_per_epoch)
            expected = UNITS[rest[0]] if len(rest) == 1 else ONE_OFF[rest[1]]
            assert step_passes(recipe, progress).units == expected, case.name
        seen.add((net, *rest))
    assert len(seen) == 2 * (len(UNITS) + len(ONE_OFF))


def test_the_gpu_script_measures_and_writes(tmp_path: Path) -> None:
    fast = "bf16" if has_fast_bfloat16(torch.device("cpu")) else "fp32"  # elsewhere bf16 is emulated: minutes
    words = ["--device", "cpu", "--tiny", "--cases", "pgd-at rn18", "--out", str(tmp_path / "gpu.json")]
    words += ["--precision", fast]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", *words], capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert min(found["ceilings"][name] for name in ("bf16", "tf32", "fp32", "bytes")) > 0
    (case,) = found["cases"].values()
    assert case["units"] == 7 and case["ratio_to_plain"] > 0 and f"attack {fast}" in case["path"]
    assert "pgd-at rn18" in done.stdout and found["failed"] == {} and found["left"] == []


def test_a_case_that_fails_or_takes_too_long_loses_no_other(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = script("gpu")

    def alone(words: list[str], arguments: Namespace, timeout: float) -> Any:
        name = words[-1]
        if name == "uiat rn18":
            raise subprocess.CalledProcessError(1, "python", stderr="Traceback ...\nRuntimeError: no memory\n")
        if name == "trades rn18":
            raise subprocess.TimeoutExpired("python", timeout)
        return {"name": name}

    gpu.alone = alone
    out = tmp_path / "gpu.json"
    found = gpu.collected(Namespace(max_time=600.0, cases="rn18", precision="bf16", out=out))
    assert found == json.loads(out.read_text())
    assert found["failed"] == {"uiat rn18": "RuntimeError: no memory"} and found["left"] == ["trades rn18"]
    assert found["ceilings"] == {"name": "ceilings"} and len(found["cases"]) == 5
    late = gpu.collected(Namespace(max_time=1.0, cases="wrn34", precision="bf16", out=None))
    assert late["cases"] == {} and len(late["left"]) == 8
    gpu.show(late)
    assert "No time for: ceilings" in capsys.readouterr().out


def test_everybody_takes_the_same_step(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backbone", "convnet_small", "--batch", "8", "--attack-steps", "2", "--windows", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--precision", "bf16", "--json"])
    peers = script("peers")
    assert peers.main() == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert {"robustkit, bf16", "usual script, fp32", "usual script, bf16"} <= set(steps)
    ours = steps["robustkit, bf16"]
    assert ours["times_as_long"] == 1 and ours["forwards_worth"] == 7
    for name, step in steps.items():
        assert 255 * step["radius"] == pytest.approx(8, abs=0.01)
        assert step["loss"] > step["clean_loss"] and 0 < step["fastest"] <= step["seconds"] <= step["slowest"]
        if "script" in name:  # 7, but that the first convolution's backward to the weights needs none to the images
            assert 6.5 < step["forwards_worth"] <= 7


def test_operations_are_counted_as_they_are_done(script: Callable[[str], ModuleType]) -> None:
    layer, x = torch.nn.Linear(3, 5), torch.rand(7, 3, requires_grad=True)
    with script("peers").Operations() as counter:
        torch.autograd.grad(layer(x).sum(), x)
    assert counter.total == 2 * (2 * 7 * 3 * 5)  # forward, and backward to the input alone


def test_both_ways_are_trained_judged_and_compared(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("robustkit.reporting.figures.draw", lambda *arguments: [])
    parity = script("parity")
    changes = {
        "data": Synthetic(train=48, test=16, size=8),
        "evaluation": (Suite(measures=(Clean(), Attacked(key="pgd-2", steps=2))),),
    }
    words = ["--out", str(tmp_path), "--backbone", "convnet_small", "--epochs", "1", "--batch", "16", "--device", "cpu"]
    words += ["--seeds", "1"]
    monkeypatch.setattr(parity, "seconds", lambda text: 0.0)
    assert parity.main([*words, "--max-time", "soon"], **changes) == 75
    assert parity.main(words, **changes) == 0
    told = capsys.readouterr().out
    assert "plain-1 - fast-1, last" in told and "signs of the gradient agree" in told
    assert "0 batch normalisations folded" in noted(tmp_path / "plain-1", "path")
    assert "attack bf16" in noted(tmp_path / "fast-1", "path") and "3 batch" in noted(tmp_path / "fast-1", "path")
    found = json.loads((tmp_path / "parity.json").read_text())
    assert {entry["measure"] for entry in found["differences"]} == {"clean", "pgd-2"}
    facts = found["step"]
    assert 0.8 < facts["sign_agreement_first_step"] <= 1 and facts["loss_ratio"] == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(parity, "run", None)
    monkeypatch.setattr(parity, "resume", None)  # what is finished is not touched
    assert parity.main(words, **changes) == 0
    with pytest.raises(SystemExit, match="2"):
        parity.main([*words, "--batch", "24"], **changes)
    assert "holds a run with other settings" in capsys.readouterr().err


FAMILY = """
from robustkit import Suite, evolve
from robustkit.evaluation import PGD_20, Clean
from robustkit.losses import Hat, Helper
from robustkit.testing import tiny_recipe

suite = Suite(measures=(Clean(), PGD_20), images=8)
hat = evolve(tiny_recipe(epochs=1), loss=Hat(helper=Helper(run="elsewhere", made_by={file!r} + ":natural")))
natural = tiny_recipe(attack=None, epochs=1, evaluation=(suite,))
recipes = {{"hat": evolve(hat, evaluation=(suite,)), "natural": natural}}
"""


@pytest.fixture
def family(tmp_path: Path) -> Path:
    path = tmp_path / "family.py"
    path.write_text(FAMILY.format(file=str(path)), encoding="utf-8")
    return path


def test_a_study_goes_arm_by_arm(
    family: Path, tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """The helper's arm comes first; what is done stays done."""
    study, out = script("study"), tmp_path / "runs"
    words = [str(family), "--out", str(out), "--seeds", "1,2"]
    assert study.main(words) == 0
    shown = capsys.readouterr().out
    for seed in (1, 2):
        for name in ("natural", "hat"):
            results = json.loads((out / f"{name}-{seed}" / "results.json").read_text(encoding="utf-8"))
            assert results["last"].keys() == {"clean", "pgd-20"}
            assert f"{name}-{seed}" in shown
        recipe = json.loads((out / f"hat-{seed}" / "recipe.json").read_text(encoding="utf-8"))
        assert recipe["loss"]["helper"]["run"] == str(out / f"natural-{seed}") and recipe["seed"] == seed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert study.main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert study.main([*words, "--only", "natural", "--checkpoint", "best"]) == 0
    with pytest.raises(UserError, match="no recipe 'hut'; known: hat, natural"):
        study.main([*words, "--only", "hut"])


def test_steps_are_compared(
    family: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{family}:natural", f"{family}:natural", "attack=pgd", "attack.steps=1", "--rounds", "1", "--json"]
    assert script("steps").main(words) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    assert [row["units"] for row in found] == [5, 5] and found[0]["ratio"] == 1 == found[1]["ratio_of_units"]
    assert all(row["seconds"] > 0 for row in found)
