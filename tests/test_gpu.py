"""The same on a GPU: runs wherever there is one, skipped elsewhere."""

import threading
import warnings
from pathlib import Path

import pytest
import torch

from robustkit import Health, Model, Precision, Recipe, Suite, Validation, evolve, resume, run
from robustkit.attacks import PGD
from robustkit.core import checkpoint
from robustkit.core.batch import Budget
from robustkit.core.faults import Fault
from robustkit.core.loop import train_step
from robustkit.core.rng import whole
from robustkit.datasets import Digits
from robustkit.engine import Predictor
from robustkit.engine.graphs import RECORDINGS, graphs_for
from robustkit.epsilons import ECAS
from robustkit.evaluation import PGD_20, Attacked, AutoAttack, Clean
from robustkit.heads import GaussianMixture
from robustkit.losses import Align
from robustkit.opening import load_parts, make_world
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_attacks_are_the_plain_ones(precision: str) -> None:
    """A replay gives the plain attack's images with the weights of the moment; where it cannot, `trouble` says why."""
    recipe = evolve(RECIPE, precision=Precision(attack=precision, outer=precision))  # type: ignore[arg-type]
    parts = load_parts(recipe, make_world(recipe, "cuda"))
    device = parts.world.device
    assert parts.graphs is not None
    plain = Predictor(parts.model, device, precision, parts.folding)
    quick = Predictor(parts.model, device, precision, parts.folding, parts.graphs)
    parts.model.eval()
    for number in range(5):
        x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(number)).to(device)
        y = torch.arange(32, device=device) % 10
        budget = Budget(torch.full((32,), 0.03 * (number + 1), device=device))
        found, expected = (PGD(steps=5)(p, x, y, budget, recipe.threat, whole(x, number)) for p in (quick, plain))
        assert torch.equal(found, expected)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.mul_(1.1)
    assert not parts.graphs.trouble


def _doubled_often(x: torch.Tensor) -> torch.Tensor:
    """Takes 64 times the memory of x on the way."""
    return torch.stack([x * number for number in range(64)]).sum(0)


def test_recordings_leave_other_threads_alone() -> None:
    """The next images are pinned by another thread, which a recording must neither disturb nor be disturbed by."""
    graphs, over, troubles = graphs_for(torch.device("cuda")), threading.Event(), []
    assert graphs is not None

    def pin() -> None:
        try:
            while not over.is_set():
                torch.zeros(1 << 20, dtype=torch.uint8).pin_memory().to("cuda", non_blocking=True)
        except RuntimeError as error:
            troubles.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for size in range(1000, 1000 + RECORDINGS):
            x = torch.rand(size, device="cuda")
            for _ in range(4):
                assert torch.equal(graphs("key", _doubled_often, (x,)), _doubled_often(x))
    finally:
        over.set()
        thread.join()
    assert not troubles and not graphs.trouble


def _asks_for_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def test_what_waits_is_not_recorded_and_leaves_all_as_it_was() -> None:
    graphs = graphs_for(torch.device("cuda"))
    assert graphs is not None
    x, stream = torch.rand(1000, device="cuda"), torch.cuda.current_stream()
    for _ in range(4):
        assert torch.equal(graphs("waits", _asks_for_a_number, (x,)), _asks_for_a_number(x))
        assert torch.cuda.current_stream() == stream
    assert "synchroniz" in graphs.trouble
    graphs.trouble = ""
    for _ in range(4):
        assert torch.equal(graphs("never", _doubled_often, (x,)), _doubled_often(x))
    assert not graphs.trouble and torch.cuda.get_sync_debug_mode() == 0


def test_recordings_share_memory() -> None:
    graphs = graphs_for(torch.device("cuda"))
    assert graphs is not None
    held = []
    for number in range(RECORDINGS):
        x = torch.rand((1 << 18) - number, device="cuda")  # 64 MiB on the way
        for _ in range(3):
            assert torch.equal(graphs("key", _doubled_often, (x,)), _doubled_often(x))
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert not graphs.trouble
    assert held[-1] - held[0] < 64 << 20


def test_a_step_never_waits_for_the_device() -> None:
    parts = load_parts(RECIPE, make_world(RECIPE, "cuda"))
    for _ in range(4):  # recordings are made
        train_step(parts, parts.rows[:64])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            train_step(parts, parts.rows[:64])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]


def test_a_fault_is_noticed_one_step_later_or_at_once() -> None:
    """Later where nothing waits for the device, at once with the policy that waits; a step without a fault never."""
    rows = load_parts(RECIPE, make_world(RECIPE, "cuda")).rows[:64]
    for on_fault, late in (("stop", True), ("rewind", True), ("skip", False)):
        recipe = evolve(RECIPE, health=Health(on_fault=on_fault))  # type: ignore[arg-type]
        parts = load_parts(recipe, make_world(recipe, "cuda"))
        train_step(parts, rows)
        parts.watch.settle()
        with torch.no_grad():
            next(parts.model.head.parameters()).fill_(torch.inf)
        if late:
            train_step(parts, rows)
        with pytest.raises(Fault) as raised:
            train_step(parts, rows)
        assert raised.value.number == 2


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
