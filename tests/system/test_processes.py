"""Two processes that share a global batch train what one process trains.

Sums over images round differently when they are cut in two, and an L-inf step takes the sign of a gradient: where one
is almost zero, two processes may move a pixel the other way. So weights are compared within a tolerance, stated below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import driver
import numpy as np
import pytest
import torch
from torch import Tensor

from robustkit import Health, Model, evolve, run
from robustkit.attacks import LDAT, PGD, RSFGSM, Calibrated, Dynamic, Friendly, Grouped, Within
from robustkit.core import checkpoint
from robustkit.core.recipe import Recipe, Suite, Validation, save_recipe
from robustkit.core.registry import registry
from robustkit.datasets import Synthetic, WithSynthetic
from robustkit.epsilons import ECAS, Curriculum
from robustkit.evaluation import Attacked, Clean
from robustkit.heads import GaussianMixture
from robustkit.losses import ALP, LBGAT, Align, GradAlign, Hat, Mart, Mixed, SelfWeighted, Trades
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Inverse, Momentum, Natural, OneOff, Universal
from robustkit.testing import tiny_recipe
from robustkit.threats import L2
from robustkit.weights import AWP, Exponential

DEADLINE = 240.0
WEIGHTS, MOMENTUM = 3e-5, 2e-4
"""How far weights, statistics and averages, and the optimiser's momentum, may lie apart: |a - b| / |a|, per tensor.

Most recipes below reach 2e-6. A single process whose initial weights are changed by one unit in the last place drifts
from itself as far, until something turns: an activation at the kink of its ReLU, or the sign of a pixel's gradient.
Either is a leap of 1e-3 and more, at any rate, and which recipe meets one depends on the processor. So most strategies
are tried in a net without kinks, where all of them stay within 5e-6 at the rate 0.1, L-inf or not. Recipes that name no
net have ReLUs; where their rate is lower, they have met a leap at a higher one.
"""


def recipe(**parts: Any) -> Recipe:
    given = {
        "data": Synthetic(train=70, test=21, classes=4, size=8, channels=1, augment="crop-flip"),
        "epochs": 3,
        "schedule": OneCycle(),
        "validation": Validation(images=19, train_images=9, attack=PGD(steps=2)),
        "evaluation": (Suite(measures=(Clean(), Attacked(steps=3))),),
        "batch_size": 16,
        **parts,
    }
    return tiny_recipe(**given)


PLAIN, SMOOTH = Model(backbone="robustkit_test_plain"), Model(backbone="robustkit_test_smooth")
with driver.faulty_known():  # a NaN in the second process's objective alone, whose gradients are finite
    FAULTY = {
        f"faulty-{on_fault}": recipe(
            loss=driver.Faulty(steps=(5,), where="last"), health=Health(on_fault=on_fault), optimizer=SGD(lr=0.01)
        )
        for on_fault in ("skip", "rewind")
    }
RECIPES = {
    "plain-adversarial-training": recipe(),
    "l2": recipe(threat=L2()),
    "momentum-of-universal": recipe(model=SMOOTH, target=Momentum(inner=Universal(), start=0.3)),
    "one-off": recipe(target=OneOff(inner=Universal(), start=0.5)),
    "one-off-perturbation": recipe(target=OneOff(inner=Universal(), start=0.5, freeze="perturbation")),
    "ecas": recipe(epsilon=ECAS()),
    "ecas-universal-momentum-mixture": recipe(
        model=SMOOTH,
        epsilon=ECAS(),
        target=Momentum(inner=Universal(), start=0.3),
        head=GaussianMixture(),
        loss=Align(),
    ),
    "awp": recipe(weights=AWP()),
    "gaussian-mixture": recipe(model=SMOOTH, head=GaussianMixture()),
    "mixed-joint": recipe(model=SMOOTH, loss=Mixed()),
    "mixed-joint-mixture-awp": recipe(model=SMOOTH, loss=Mixed(), head=GaussianMixture(), weights=AWP(), threat=L2()),
    "trades": recipe(model=SMOOTH, loss=Trades(), attack=PGD(steps=2, objective=KL())),
    "mart": recipe(model=SMOOTH, loss=Mart()),
    "hat": recipe(model=SMOOTH, loss=Hat(), attack=PGD(steps=2, objective=KL())),
    "ldat": recipe(model=SMOOTH, loss=Mixed(), head=GaussianMixture(), attack=Within(inner=LDAT(steps=2))),
    "alp": recipe(model=SMOOTH, loss=ALP()),
    "lbgat": recipe(model=SMOOTH, loss=LBGAT(teacher=SMOOTH), attack=PGD(steps=2, objective=KL())),
    "lbgat-awp": recipe(model=SMOOTH, loss=LBGAT(teacher=SMOOTH), attack=PGD(steps=2, objective=KL()), weights=AWP()),
    "rs-fgsm": recipe(model=SMOOTH, attack=RSFGSM()),
    "grad-align": recipe(model=SMOOTH, loss=GradAlign(weight=1.0), attack=RSFGSM(noise=0.0, mode="train-frozen")),
    "attack-in-training-mode": recipe(attack=PGD(steps=2, mode="train")),
    "attack-with-frozen-statistics": recipe(attack=PGD(steps=2, mode="train-frozen")),
    "friendly": recipe(model=SMOOTH, attack=Friendly(steps=2, tau=(0, 1), switch=(0.5,))),
    "dynamic-self-weighted": recipe(model=SMOOTH, attack=Dynamic(steps=2, threshold=0.1), loss=SelfWeighted()),
    "cat": recipe(
        epsilon=Curriculum(patience=1, train_accuracy=0.0, stages=2),
        attack=Grouped(inner=PGD(mode="train")),
        epochs=6,
        optimizer=SGD(lr=0.01),
    ),
    "cat-with-empty-groups": recipe(  # up to seven groups of nine images, of which one process has four
        epsilon=Curriculum(rule="training", train_accuracy=0.0),
        attack=Grouped(inner=PGD(mode="train")),
        epochs=7,
        batch_size=9,
        optimizer=SGD(lr=0.001),
    ),
    "daat": recipe(model=SMOOTH, attack=Calibrated(inner=PGD(steps=2))),
    "inverse": recipe(target=Inverse(steps=2)),
    "target-with-gradient": recipe(target=Natural(), loss=Align(detach=False)),
    "average": recipe(average=Exponential(rate=0.8)),
    "with-synthetic": recipe(  # pixels in a file, fetched ahead
        data=WithSynthetic(
            inner=Synthetic(train=70, test=21, classes=4, size=8, channels=1, augment="crop-flip"), file="made.npz"
        ),
        model=Model(backbone="convnet_small", adopt_first_batch=True),
        target=Momentum(inner=Inverse(steps=1), start=0.3),
        optimizer=SGD(lr=0.03, decay_norm=False),
    ),
    "uneven-batches": recipe(batch_size=17, target=Momentum(inner=Universal(), start=0.3)),
    "uneven-last-batch": recipe(batch_size=12, validation=Validation(images=11)),  # 59 images: 4 x 12 and 11
    "accumulate": recipe(model=PLAIN, accumulate=2, target=Momentum(inner=Inverse(steps=1), start=0.3)),
    "at-once": recipe(model=PLAIN, target=Momentum(inner=Inverse(steps=1), start=0.3)),
    "accumulate-in-many-pieces": recipe(  # the last batch has 9 images, fewer than 2 processes x 8 pieces
        data=Synthetic(train=76, test=21, classes=4, size=8, channels=1), model=PLAIN, accumulate=8
    ),
    "resnet": recipe(model=Model(backbone="resnet18_cifar_w16"), threat=L2(), epochs=1, optimizer=SGD(lr=0.003)),
    "control": evolve(recipe(epochs=1), control=recipe(epochs=1, attack=None)),
    **FAULTY,
    "resumed": recipe(epsilon=ECAS(), target=Momentum(inner=Universal(), start=0.3), average=Exponential(rate=0.8)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The runs of one process, and of two."""
    base = tmp_path_factory.mktemp("processes")
    (base / "recipes").mkdir()
    draws = np.random.default_rng(0)
    image, label = draws.integers(0, 256, (90, 8, 8, 1), dtype=np.uint8), draws.integers(0, 4, 90)
    np.savez(base / "made.npz", image=image, label=label)
    with driver.faulty_known():
        for name, value in RECIPES.items():
            save_recipe(value, base / "recipes" / f"{name}.json")
    with (
        pytest.MonkeyPatch.context() as patch,
        driver.faulty_known(),
        driver.started(2, base / "recipes", base / "two", base) as processes,
    ):
        patch.setitem(sys.modules, "robustkit.reporting.figures", driver.no_figures())
        patch.setenv("ROBUSTKIT_DATA_DIR", str(base))
        for name, value in RECIPES.items():
            run(value, out=base / "one" / name, device="cpu")
        codes = [process.wait(timeout=DEADLINE) for process in processes]
    logs = [(base / "two" / f"rank-{rank}.txt").read_text()[-3000:] for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    yield base / "one", base / "two"


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| relative to |a|, as vectors; 0 for equal ones."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


def tensors(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")[0]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", RECIPES)
def test_weights(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (tensors(folder / name) for folder in folders)
    assert one.keys() == two.keys()
    found = {
        key: distance(one[key], two[key])
        for key in one
        if key.startswith(("model.", "average.", "optimizer.")) and one[key].is_floating_point()
    }
    for prefixes, tolerance in ((("model.", "average."), WEIGHTS), (("optimizer.",), MOMENTUM)):
        chosen = [key for key in found if key.startswith(prefixes)]
        worst = max(chosen, key=lambda key: found[key])
        print(f"{name}: {found[worst]:.1e} at {worst}")
        assert found[worst] < tolerance, f"{worst}: {found[worst]:.1e}"


def test_two_processes_are_one_that_accumulates(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit for bit, in a net without batch statistics: the same pieces, and a sum of two has no order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(evolve(RECIPES["at-once"], accumulate=2), out=tmp_path / "run", device="cpu")
    finally:
        torch.set_num_threads(threads)
    one, two = tensors(tmp_path / "run"), tensors(folders[1] / "at-once")
    for key in one:
        if not key.startswith("totals."):  # means over the epoch are summed by process first
            assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("name", RECIPES)
def test_strategy_state(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (tensors(folder / name) for folder in folders)
    for key in one:
        if key.startswith("strategies."):
            if key.endswith(("visited", ".z")):
                assert torch.equal(one[key], two[key]), key
            else:
                assert torch.allclose(one[key], two[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize("name", RECIPES)
def test_metrics(name: str, folders: tuple[Path, Path]) -> None:
    """Counts and accuracies are equal; means over the epoch within rounding."""
    one, two = (metrics(folder / name) for folder in folders)
    assert len(one) == len(two) == RECIPES[name].epochs
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("epoch", "step", "lr", "radii", "validation", "training"):
            assert mine[key] == theirs[key], key
        assert mine["train"] == pytest.approx(theirs["train"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_results(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / name / "results.json").read_text()) for folder in folders)
    assert one.keys() == two.keys() == {"last", "best"}
    for which in one:
        for key in ("clean", "pgd-20"):
            mine, theirs = one[which][key], two[which][key]
            assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert (folders[0] / name / "control").exists() == (folders[1] / name / "control").exists()


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_in_one_process(name: str, folders: tuple[Path, Path]) -> None:
    """All notice it, and skip the same step; the batch is kept whole, in its order."""
    assert [report.get("skipped") for report in metrics(folders[1] / name)] == [None, [5], None]
    one, two = (checkpoint.read(folder / name / "faults" / "step-000005.safetensors") for folder in folders)
    for key in ("rows", "labels", "images", "epsilon"):
        assert torch.equal(one[0][key], two[0][key])
    assert len(two[0]["rows"]) == 16 and one[1]["terms"]["struck"] == two[1]["terms"]["struck"] == "nan"
    assert one[1]["gradients that are not finite"] == two[1]["gradients that are not finite"] == []


def test_what_is_covered() -> None:
    """Every target, loss, head, weight perturbation and epsilon schedule that has something to add up."""
    for kind in ("target", "loss", "weights", "head"):
        used = {registry(kind).name_of(type(getattr(value, kind))) for value in RECIPES.values()} - {None}
        nested = {"universal"} if kind == "target" else set()
        assert used | nested >= set(registry(kind).names()), kind
