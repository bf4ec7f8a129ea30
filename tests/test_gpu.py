"""The same on a GPU: runs wherever there is one, skipped elsewhere."""

from pathlib import Path

import pytest
import torch

from robustkit import Model, Precision, Recipe, Suite, Validation, evolve, resume, run
from robustkit.attacks import PGD
from robustkit.core import checkpoint
from robustkit.datasets import Digits
from robustkit.epsilons import ECAS
from robustkit.evaluation import PGD_20, Attacked, AutoAttack, Clean
from robustkit.heads import GaussianMixture
from robustkit.losses import Align
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Momentum, Universal
from robustkit.threats import Linf
from robustkit.weights import AWP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

RECIPE = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    head=GaussianMixture(likelihood=0.1),
    threat=Linf(epsilon=0.15),
    epsilon=ECAS(values=(0.05, 0.1, 0.15, 0.2), big=2),
    attack=PGD(steps=5),
    target=Momentum(inner=Universal(radius=0.075), start=0.5),
    loss=Align(weight=3.5),
    weights=AWP(gamma=0.005),
    optimizer=SGD(lr=0.05, nesterov=True),
    schedule=OneCycle(),
    epochs=6,
    batch_size=64,
    validation=Validation(images=128, train_images=64),
    evaluation=(Suite(measures=(Clean(), PGD_20, AutoAttack(images=16, slice_size=16))),),
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trains_evaluates_and_resumes(precision: str, tmp_path: Path) -> None:
    recipe = evolve(RECIPE, precision=Precision(attack=precision, outer=precision))  # type: ignore[arg-type]
    stopped = run(recipe, out=tmp_path / "run", device="cuda", max_steps=30)
    assert stopped.stopped == "steps"
    done = resume(tmp_path / "run", device="cuda")
    assert not done.stopped
    last = done.results["last"]
    assert last["clean"]["accuracy"] > 0.8 and last["pgd-20"]["accuracy"] > 0.3
    assert last["autoattack"]["accuracy"] <= 1.0


def test_a_checkpoint_moves_between_devices(tmp_path: Path) -> None:
    recipe = evolve(RECIPE, evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-2", steps=2, start="clean"))),))
    here = run(recipe, out=tmp_path / "run", device="cuda")
    before, _ = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.safetensors")
    (tmp_path / "run" / "results.json").unlink()
    there = resume(tmp_path / "run", device="cpu")
    after, _ = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert there.results["last"]["clean"]["accuracy"] == pytest.approx(
        here.results["last"]["clean"]["accuracy"], abs=0.01
    )
