"""A run stopped anywhere and resumed equals the run never stopped, bit for bit, whatever it is made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

import robustkit
from robustkit import Model, Suite, UserError, evolve, load_recipe, resume, run
from robustkit.attacks import PGD
from robustkit.cli.target import load_target
from robustkit.core import checkpoint
from robustkit.core.recipe import Recipe, Validation, save_recipe
from robustkit.core.registry import registry
from robustkit.datasets import Digits, Synthetic
from robustkit.display import Silent
from robustkit.epsilons import ECAS
from robustkit.evaluation import Attacked, Clean
from robustkit.heads import GaussianMixture
from robustkit.losses import Align, Mixed
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.revisit import revisit
from robustkit.runs import evaluate_run
from robustkit.schedules import OneCycle
from robustkit.sweep import make_sweep, open_sweep, work
from robustkit.targets import Inverse, Momentum, OneOff, Universal
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP, Exponential

KINDS = (
    "threat",
    "epsilon",
    "attack",
    "objective",
    "target",
    "head",
    "loss",
    "weights",
    "average",
    "schedule",
    "optimizer",
)
STRATEGIES = [(kind, name) for kind in KINDS for name in registry(kind).names()]
REFUSED = {"inverse"}
"""Objectives that are none for an attack."""
CLOCKS = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", stub)


def sooner(strategy: Any) -> Any:
    """The strategy with its late phase starting half way, and few steps, as far as it has such settings."""
    changes: dict[str, Any] = {}
    for field in attrs.fields(type(strategy)):
        value = getattr(strategy, field.name)
        if field.name == "start" and isinstance(value, float) and 0 < value <= 1:
            changes["start"] = 0.5
        elif field.name == "steps" and isinstance(value, int):
            changes["steps"] = min(2, value)
        elif field.name == "steps" and isinstance(value, tuple):
            changes["steps"] = (1, 2)
        elif attrs.has(type(value)):
            changes[field.name] = sooner(value)
    return evolve(strategy, **changes)


def recipe_with(kind: str, name: str) -> Recipe:
    """A tiny recipe that holds the strategy; four epochs of four steps, the last batch of each a short one."""
    strategy = sooner(registry(kind).get(name)())
    if kind == "objective":
        strategy = PGD(steps=2, objective=strategy)
        kind = "attack"
    return tiny_recipe(**{kind: strategy})


def tensors(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")[0]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def assert_equal(one: Path, other: Path) -> None:
    """Every tensor of both checkpoints, bit for bit, the facts and the metrics."""
    for name in ("last", "best"):
        mine, theirs = tensors(one, name), tensors(other, name)
        assert mine.keys() == theirs.keys()
        different = [key for key in mine if not torch.equal(bits(mine[key]), bits(theirs[key]))]
        assert not different, f"{name}: {different}"
        facts = [checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")[1] for folder in (one, other)]
        assert facts[0] == facts[1]
    assert metrics(one) == metrics(other)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("kind", "name"), STRATEGIES, ids=lambda word: word)
def test_every_strategy(kind: str, name: str, tmp_path: Path) -> None:
    try:
        recipe = recipe_with(kind, name)
    except UserError:  # refused with a reason: with what it goes together, test_compositions tries
        assert name in REFUSED
        return
    run(recipe, out=tmp_path / "whole", device="cpu")
    assert run(recipe, out=tmp_path / "parts", device="cpu", max_steps=7).stopped == "steps"
    torch.manual_seed(torch.seed())  # whatever the process has drawn meanwhile
    assert resume(tmp_path / "parts", device="cpu").stopped == ""
    assert len(metrics(tmp_path / "whole")) == 4
    assert_equal(tmp_path / "whole", tmp_path / "parts")


def everything(**changes: Any) -> Recipe:
    """As much state as fits into one recipe."""
    parts: dict[str, Any] = {
        "data": Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip-rotate"),
        "epsilon": ECAS(),
        "attack": PGD(steps=2, objective=KL(), start="gaussian"),
        "target": Momentum(inner=Universal(), start=0.5),
        "loss": Align(label_smoothing=0.1),
        "head": GaussianMixture(centre_lr_scale=0.5),
        "weights": AWP(start=0.5),
        "average": Exponential(rate=0.7, warm_up=0.2),
        "optimizer": SGD(nesterov=True, decay_norm_and_bias=False),
        "schedule": OneCycle(),
    }
    return tiny_recipe(**parts | changes)


def test_stopped_after_every_step(tmp_path: Path) -> None:
    recipe = everything()
    run(recipe, out=tmp_path / "whole", device="cpu")
    for step in range(1, 16):
        go = (
            run(recipe, out=tmp_path / "parts", device="cpu", max_steps=1)
            if step == 1
            else resume(tmp_path / "parts", device="cpu", max_steps=step)
        )
        assert go.stopped == "steps"
    assert resume(tmp_path / "parts", device="cpu").stopped == ""
    assert_equal(tmp_path / "whole", tmp_path / "parts")


COMPOSITIONS = {
    "one-off, probabilities": everything(target=OneOff(inner=Universal(), start=0.5)),
    "one-off, perturbation": everything(target=OneOff(inner=Universal(), start=0.5, freeze="perturbation")),
    "one-off of momentum": everything(target=OneOff(inner=Momentum(start=0.25), start=0.5)),
    "momentum of inverse": everything(target=Momentum(inner=Inverse(steps=1), start=0.5)),
    "target with gradient": everything(loss=Align(detach=False)),
    "joint": everything(target=None, loss=Mixed()),
    "accumulate": everything(
        target=Momentum(inner=Inverse(steps=1), start=0.5), weights=registry("weights").get("still")(), accumulate=2
    ),
    "bfloat16": evolve(everything(), precision=evolve(everything().precision, attack="bf16", outer="bf16")),
    "digits": everything(
        data=Digits(augment="crop"), batch_size=64, validation=Validation(images=1300, train_images=0, attack=None)
    ),
    "no validation": everything(validation=Validation(images=0)),
    "validation now and then": everything(validation=Validation(images=12, train_images=0, every=3, attack=None)),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("step", [4, 9])
def test_compositions(name: str, step: int, tmp_path: Path) -> None:
    recipe = COMPOSITIONS[name]
    run(recipe, out=tmp_path / "whole", device="cpu")
    assert run(recipe, out=tmp_path / "parts", device="cpu", max_steps=step).stopped == "steps"
    resume(tmp_path / "parts", device="cpu")
    if recipe.validation.images == 0:  # then no checkpoint is the best
        for folder in ("whole", "parts"):
            assert not (tmp_path / folder / "checkpoints" / "best.safetensors").exists()
        mine, theirs = (tensors(tmp_path / folder) for folder in ("whole", "parts"))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    else:
        assert_equal(tmp_path / "whole", tmp_path / "parts")


class Dropping(nn.Module):
    """A net with dropout, which draws from torch's global generator."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@register_model
def robustkit_test_dropping(pretrained: bool = False, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    return Dropping(in_chans)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout(mode: Any, tmp_path: Path) -> None:
    model = Model(backbone="robustkit_test_dropping")
    recipe = everything(model=model, attack=PGD(steps=2, mode=mode), target=Universal(mode=mode))
    run(recipe, out=tmp_path / "whole", device="cpu")
    run(recipe, out=tmp_path / "parts", device="cpu", max_steps=7)
    torch.manual_seed(123)
    resume(tmp_path / "parts", device="cpu")
    assert_equal(tmp_path / "whole", tmp_path / "parts")


OWN = """
import torch
from timm.models import register_model

from robustkit import Model
from robustkit.testing import tiny_recipe


@register_model
def robustkit_test_own(pretrained=False, in_chans=3, num_classes=0, **kwargs):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_chans * 64, 8))


recipe = tiny_recipe(model=Model(backbone="robustkit_test_own"), epochs=1)
"""


def forgotten() -> None:
    """As in a process that did not begin the run."""
    timm.models._registry._model_entrypoints.pop("robustkit_test_own")
    assert not timm.is_model("robustkit_test_own")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "own.py").write_text(OWN)
    yield tmp_path / "own.py"
    forgotten()


def test_a_network_of_the_recipe_s_own(own: Path, tmp_path: Path) -> None:
    """Resumed and judged where nobody else knows it: by the folder's copy of the recipe's file."""
    folder = tmp_path / "run"
    run(load_recipe(own), source=own, out=folder, device="cpu", max_steps=1)
    fault = folder / "faults" / "step-000003.safetensors"
    checkpoint.write(fault, {}, {"step": 3, "skipped": []})
    forgotten()
    assert revisit(fault, device="cpu").step == 2
    fault.unlink()
    for go_on in (resume, evaluate_run):
        forgotten()
        assert go_on(folder, device="cpu").stopped == ""
    forgotten()
    assert load_target(str(folder), [], device="cpu").classes
    forgotten()
    assert robustkit.load(folder).classes


def test_a_sweep_goes_on_with_a_network_of_the_recipe_s_own(own: Path, tmp_path: Path) -> None:
    make_sweep([str(own)], ["seed=1,2"], out=tmp_path / "sweep")
    forgotten()
    sweep = open_sweep(tmp_path / "sweep")
    assert work(sweep, device="cpu") == ""
    assert [trial.ended for trial in sweep.trials()] == ["done", "done"]


def test_control(tmp_path: Path) -> None:
    recipe = evolve(tiny_recipe(epochs=2), control=tiny_recipe(attack=None, epochs=3, seed=5))
    run(recipe, out=tmp_path / "whole", device="cpu")
    assert run(recipe, out=tmp_path / "parts", device="cpu", max_steps=5).stopped == "steps"
    assert not (tmp_path / "parts" / "control").exists()
    assert resume(tmp_path / "parts", device="cpu", max_steps=9).stopped == "steps"
    assert resume(tmp_path / "parts", device="cpu").stopped == ""
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    assert_equal(tmp_path / "whole" / "control", tmp_path / "parts" / "control")


def test_what_is_added_to_the_last_checkpoint_is_the_best_one_s_where_they_are_the_same(tmp_path: Path) -> None:
    one, more = Suite(measures=(Clean(),)), Suite(measures=(Clean(), Attacked(key="pgd-2", steps=2)))
    recipe = tiny_recipe(epochs=1, evaluation=(one,))  # one epoch: the best one is the last one
    found = run(recipe, out=tmp_path / "run", device="cpu").results
    assert found["last"] == found["best"] and found["last"].keys() == {"clean"}
    found = evaluate_run(tmp_path / "run", suite=more, checkpoints=("last",), device="cpu").results
    assert found["last"] == found["best"] and found["last"].keys() == {"clean", "pgd-2"}


class Interrupting(Silent):
    """Sends this process a signal after some step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step_to_stop = number, step

    def step(self, progress: Any, totals: Any) -> None:
        if progress.step == self.step_to_stop:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "time")])
def test_interrupt(number: int, reason: str, tmp_path: Path) -> None:
    recipe = everything()
    run(recipe, out=tmp_path / "whole", device="cpu")
    before = signal.getsignal(number)
    outcome = run(recipe, out=tmp_path / "parts", device="cpu", display=Interrupting(number, 6))
    assert outcome.stopped == reason
    assert signal.getsignal(number) is before
    _, facts = checkpoint.read(tmp_path / "parts" / "checkpoints" / "last.safetensors")
    assert facts["step"] == 7
    resume(tmp_path / "parts", device="cpu")
    assert_equal(tmp_path / "whole", tmp_path / "parts")


def test_time_is_up(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    run(recipe, out=tmp_path / "whole", device="cpu")
    assert run(recipe, out=tmp_path / "parts", device="cpu", max_time=0.0).stopped == "time"
    resume(tmp_path / "parts", device="cpu")
    assert_equal(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run(tiny_recipe(), out=tmp_path / "run", device="cpu")
    before = tensors(tmp_path / "run"), metrics(tmp_path / "run")
    assert resume(tmp_path / "run", device="cpu").stopped == ""
    assert before[0].keys() == tensors(tmp_path / "run").keys()
    assert all(torch.equal(bits(tensor), bits(tensors(tmp_path / "run")[key])) for key, tensor in before[0].items())
    assert before[1] == metrics(tmp_path / "run")


DRIVER = """
import sys, types
stub = types.ModuleType("robustkit.reporting.figures")
stub.draw = lambda *arguments: None
sys.modules["robustkit.reporting.figures"] = stub
import torch
torch.set_num_threads(int(sys.argv.pop()))
import robustkit.limits as limits
import robustkit.runs as runs
from robustkit import load_recipe
limits.SAVE_EVERY_SECONDS = 0.0  # a checkpoint after every step
command, recipe, folder = sys.argv[1:]
if command == "run":
    runs.run(load_recipe(recipe), out=folder, device="cpu")
else:
    runs.resume(folder, device="cpu")
"""


def test_killed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """SIGKILL, several times, at moments that nobody chose."""
    recipe = everything()
    save_recipe(recipe, tmp_path / "recipe.json")
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    run(recipe, out=tmp_path / "whole", device="cpu")
    folder = tmp_path / "parts"
    path = folder / "checkpoints" / "last.safetensors"

    def start(command: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(driver), command, str(tmp_path / "recipe.json"), str(folder)]
        words.append(str(torch.get_num_threads()))  # sums of two threads round differently from those of one
        return subprocess.Popen(words)

    def step() -> int:
        return int(checkpoint.facts_of(path)["step"]) if path.is_file() else -1

    seen = []
    for command, beyond in (("run", 2), ("resume", 8)):
        process = start(command)
        try:
            deadline = time.monotonic() + 120
            while step() <= beyond and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait(timeout=60)
        seen.append(step())
    assert 0 <= seen[0] < 16, "the process was not killed in the middle"
    resume(folder, device="cpu")
    assert_equal(tmp_path / "whole", folder)
