"""LAS-AT in whole runs: the same again, stopped and resumed, in two processes; and the recipes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from robustkit_las_at import LASAT
from robustkit_las_at.schedule import Learner
from torch import Tensor

from robustkit import digest, evolve, resume, run
from robustkit.attacks import PGD
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.batch import Budget
from robustkit.core.recipe import Recipe, load_recipes, save_recipe
from robustkit.core.spec import from_json, to_json
from robustkit.core.strategy import Scene
from robustkit.heads import Linear
from robustkit.losses import CrossEntropy, Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.reporting.composition import phases
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.rglob("*.py"))
RECIPES = {f"{path.relative_to(FOLDER)}:{name}": one for path in FILES for name, one in load_recipes(path).items()}
POLICY: dict[str, Any] = {"steps": (1, 2), "backbone": "convnet_small", "interval": 3, "lr": 0.01}
METHODS: dict[str, Recipe] = {
    "pgd-at": tiny_recipe(
        epsilon=LASAT(**POLICY), attack=PGD(steps=2, start_epsilon=8 / 255), loss=CrossEntropy(label_smoothing=1 / 3)
    ),
    "trades": tiny_recipe(
        epsilon=LASAT(**POLICY, weights=(5, 6), mode="train", momentum=0.9, weight_decay=5e-4),
        attack=PGD(steps=2, objective=KL(), start="gaussian"),
        loss=Trades(weight=1.0),
    ),
    "awp": tiny_recipe(
        epsilon=LASAT(**POLICY, rehearsal_loss=CrossEntropy(label_smoothing=0.3), stop_when_fooled=False),
        attack=PGD(steps=2, start_epsilon=8 / 255, final_epsilon=8 / 255),
        weights=AWP(),
    ),
}
DRIVER = """
import sys, types
stub = types.ModuleType("robustkit.reporting.figures")
stub.draw = lambda *arguments, **options: None
sys.modules["robustkit.reporting.figures"] = stub
import torch
from robustkit import load_recipe, run
from robustkit.core.processes import leave
torch.set_num_threads(1)
run(load_recipe(sys.argv[1]), out=sys.argv[2], device="cpu")
leave()
"""


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments, **options: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", stub)


def test_each_epoch_reports_its_mean_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    plain = Learner.reward

    def reward(self: Learner, scene: Scene, budget: Budget) -> Tensor:
        found = plain(self, scene, budget)
        seen.append(found.tolist())
        return found

    monkeypatch.setattr(Learner, "reward", reward)
    run(METHODS["pgd-at"], out=tmp_path / "run", device="cpu", max_steps=6)
    resume(tmp_path / "run", device="cpu")
    reports = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [report["rewards"] for report in reports]
    steps = reports[0]["step"]
    learnt = [[step // steps for step in range(4 * steps) if step % 3 == 0].count(epoch) for epoch in range(4)]
    for mean, count in zip(found, learnt, strict=True):
        three = torch.tensor(seen[:count]).mean(dim=0)
        del seen[:count]
        assert list(mean.values()) == pytest.approx(three.tolist(), rel=1e-5) and list(mean) == ["R1", "R2", "R3"]
    assert not seen


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / "last.safetensors")[0]


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.mark.parametrize("name", METHODS)
def test_resumed_it_is_the_run_never_stopped(name: str, tmp_path: Path) -> None:
    """Two epochs of four steps; stopped between epochs, right before and right after the policy learns."""
    recipe = evolve(METHODS[name], epochs=2)
    run(recipe, out=tmp_path / "whole", device="cpu")
    assert any(".velocity" in key for key in tensors(tmp_path / "whole")) == (name == "trades")
    for step in (4, 6, 7):
        folder = tmp_path / str(step)
        assert run(recipe, out=folder, device="cpu", max_steps=step).stopped == "steps"
        torch.manual_seed(torch.seed())  # whatever the process has drawn meanwhile
        assert resume(folder, device="cpu").stopped == ""
        assert_equal(tmp_path / "whole", folder)


def test_the_seed_decides(tmp_path: Path) -> None:
    recipe = evolve(METHODS["pgd-at"], epochs=1)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(evolve(recipe, seed=seed), out=tmp_path / name, device="cpu")
    assert_equal(tmp_path / "one", tmp_path / "again")
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    key = "strategies.epsilon.policy.heads.0.weight"
    assert not torch.equal(one[key], other[key])


@pytest.mark.parametrize("name", ["pgd-at", "trades"])
def test_two_processes_are_one(name: str, tmp_path: Path) -> None:
    """Weights and the policy's within what halved sums round.

    TRADES climbs a KL that is almost flat before training, where a rounding decides on the sign of a gradient: so it
    starts from larger noise, nothing moves the statistics (by what halved sums round) before its attack, and its
    steps are small. All compute in one thread: more would round differently, too.
    """
    given, mode = METHODS[name], "eval" if name == "trades" else "train"
    changes = {"attack": evolve(given.attack, start="uniform"), "epsilon": evolve(given.epsilon, mode=mode)}
    recipe = evolve(given, **changes, optimizer=SGD(lr=0.0003 if name == "trades" else 0.003), epochs=2)
    save_recipe(recipe, tmp_path / "recipe.json")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        settings = {key: str(value) for key, value in words.items()}
        settings |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "recipe.json"), str(tmp_path / "two")]
        with (tmp_path / f"{rank}.txt").open("w") as log:
            processes.append(subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(recipe, out=tmp_path / "one", device="cpu")
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.kill()
            process.wait(timeout=30)
    assert codes == [0, 0], (tmp_path / "0.txt").read_text()[-3000:] + (tmp_path / "1.txt").read_text()[-3000:]
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    apart = {}
    for key in one:
        if key.startswith(("model.", "strategies.")):
            a, b = one[key].double(), two[key].double()
            apart[key] = float((a - b).norm() / a.norm().clamp_min(1e-12))
    worst = max(apart, key=lambda key: apart[key])
    print(f"{name}: {apart[worst]:.1e} at {worst}")
    assert apart[worst] < 3e-5, worst


# Recipes


def line_of(address: str) -> re.Match[str]:
    """The line of a recipe in its file's header: its published numbers and its cost."""
    file, _, name = address.partition(":")
    header = (FOLDER / file).read_text(encoding="utf-8").split('"""')[1]
    found = re.search(rf"^    {name}  +(.*?) *([\d.]+) \+ ([\d.]+) S$", header, re.MULTILINE)
    assert found is not None
    return found


def test_all_recipes_are_there() -> None:
    full = {
        f"las_{m}.py:{d}-{n}"
        for m in ("pgd_at", "trades", "awp")
        for d in ("cifar10", "cifar100")
        for n in ("rn18", "wrn34")
    }
    assert set(RECIPES) == full | {f"cpu/las_at.py:las-{m}" for m in ("pgd-at", "trades", "awp")}


@pytest.mark.parametrize("address", RECIPES)
def test_recipes_survive_json(address: str) -> None:
    recipe = RECIPES[address]
    again = from_json(Recipe, json.loads(json.dumps(to_json(recipe))))
    assert again == recipe and digest(again) == digest(recipe)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_headers_say_what_how_and_cost(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split('"""')[1]
    for word in (f"robustkit run recipes/{path.relative_to(FOLDER)}:", "Paper:", "Cost:", "forward-units", "Measured:"):
        assert word in header


@pytest.mark.parametrize("address", RECIPES)
def test_headers_name_the_cost(address: str) -> None:
    """On average, in forward-units, and in forwards S of the policy: one a step, three more where it learns."""
    recipe, line = RECIPES[address], line_of(address)
    (phase,) = phases(recipe)
    assert float(line[2]) == pytest.approx(phase.total.units)
    assert float(line[3]) == pytest.approx(1 + 3 / recipe.epsilon.interval)


# Clean and AutoAttack accuracy: sheet 3.3.
PUBLISHED = {
    "las_pgd_at.py": {
        "cifar10-wrn34": "86.23  53.58",
        "cifar100-wrn34": "61.80  29.03",
        "cifar10-rn18": "81.99  49.74",
    },
    "las_trades.py": {
        "cifar10-wrn34": "85.24  54.15",
        "cifar100-wrn34": "60.62  28.12",
        "cifar10-rn18": "82.04  49.75",
    },
    "las_awp.py": {"cifar10-wrn34": "87.74  55.52", "cifar100-wrn34": "64.89  30.77", "cifar10-rn18": "82.61  49.86"},
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_headers_quote_what_was_published(file: str) -> None:
    for name in ("cifar10-wrn34", "cifar10-rn18", "cifar100-wrn34", "cifar100-rn18"):
        assert line_of(f"{file}:{name}")[1].strip() == PUBLISHED[file].get(name, "-      -")


# Sheet 4.2 and 4.4: spaces in 1/255 (steps: numbers), interval, rho2, rho3, the policy's momentum, smoothing, epochs.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "las_pgd_at.py:cifar10": ((3, 15), (3, 14), (1, 5), None, 20, 4, 2, 0.0, 0.7, 110),
    "las_pgd_at.py:cifar100": ((3, 15), (3, 12), (1, 5), None, 20, 4, 2, 0.9, 0.6, 110),
    "las_trades.py:cifar10": ((5, 9), (7, 14), (2, 4), (5, 9), 1, 8, 4, 0.9, None, 100),
    "las_trades.py:cifar100": ((5, 10), (7, 14), (2, 4), (5, 9), 1, 8, 2, 0.9, None, 100),
    "las_awp.py:cifar10": ((7, 15), (8, 16), (2, 5), None, 1, 1, 1, 0.0, 0.7, 200),
    "las_awp.py:cifar100": ((7, 15), (8, 15), (2, 5), None, 10, 4, 2, 0.9, 0.7, 200),
}


@pytest.mark.parametrize("network", ["rn18", "wrn34"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_sheet(name: str, network: str) -> None:
    radii, steps, sizes, weights, interval, rho2, rho3, momentum, factor, epochs = SETTINGS[name]
    recipe = RECIPES[f"{name}-{network}"]
    epsilon = recipe.epsilon

    def spread(values: tuple[float, ...], unit: float = 1.0) -> tuple[int, int] | None:
        whole = [value / unit for value in values]
        assert whole == pytest.approx([round(whole[0]) + k for k in range(len(whole))]) if whole else True
        return (round(whole[0]), round(whole[-1])) if whole else None

    assert (spread(epsilon.radii, 1 / 255), spread(epsilon.steps), spread(epsilon.step_sizes, 1 / 255)) == (
        radii,
        steps,
        sizes,
    )
    assert spread(epsilon.weights) == weights
    assert (epsilon.interval, epsilon.robust_reward, epsilon.natural_reward) == (interval, rho2, rho3)
    assert (epsilon.momentum, epsilon.weight_decay) == (momentum, 5e-4 if momentum else 0.0)
    assert (epsilon.lr, recipe.epochs, recipe.attack.steps, recipe.threat.epsilon) == (1e-4, epochs, steps[1], 8 / 255)
    assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    drops = {110: (99, 104), 100: (75, 90), 200: (100, 150)}[epochs]
    assert recipe.schedule.at == drops
    assert getattr(epsilon.schedule, "at", None) == (drops if "awp" in name else None)
    assert epsilon.stop_when_fooled == ("awp" not in name) and (epsilon.mode == "train") == ("trades" in name)
    assert recipe.attack.final_epsilon == (8 / 255 if "awp" in name else None)
    assert recipe.attack.start_epsilon == (None if "trades" in name else 8 / 255) and recipe.attack.mode == "eval"
    classes = 100 if "cifar100" in name else 10
    smooth = epsilon.rehearsal_loss if "awp" in name else recipe.loss
    if factor is None:
        assert recipe.loss == Trades(weight=1.0) and recipe.attack.objective == KL()
    else:
        assert smooth.label_smoothing == pytest.approx((1 - factor) * classes / (classes - 1), abs=1e-5)
    if "awp" in name:
        assert recipe.loss == CrossEntropy() and recipe.weights == AWP(gamma=0.01)
        assert recipe.model.normalization == ("cifar10" if classes == 10 else "none")
    assert recipe.model.backbone == {"rn18": "resnet18_cifar", "wrn34": "wrn34_10"}[network]
    assert recipe.head == Linear(zero_bias=network == "wrn34")


def test_the_small_ones_use_the_strategies_of_the_large() -> None:
    for name, file in (("las-pgd-at", "pgd_at"), ("las-trades", "trades"), ("las-awp", "awp")):
        small, large = RECIPES[f"cpu/las_at.py:{name}"], RECIPES[f"las_{file}.py:cifar10-rn18"]
        same = evolve(large.epsilon, backbone="resnet18_cifar_w16", schedule=small.epsilon.schedule)
        assert small.epsilon == same
        assert (small.attack, small.loss, small.weights) == (large.attack, large.loss, large.weights)


@pytest.mark.parametrize(
    "address",
    [pytest.param(name, marks=() if name.startswith("cpu") else pytest.mark.slow) for name in RECIPES],
)
def test_smoke(address: str, tmp_path: Path) -> None:
    """Two steps on batches of four images."""
    words = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(["run", str(FOLDER / address), *words]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {"clean", "pgd-20"} <= set(results["last"])
