"""Calibration of ECAS's thresholds: against entropies worked out another way, and as the command."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

import robustkit
from robustkit import Model, Recipe, Validation, evolve, run
from robustkit.attacks import PGD
from robustkit.calibration import calibrate_entropy, entropies, first_batches, mean_entropy
from robustkit.cli.main import main
from robustkit.core.errors import CheckpointError
from robustkit.core.recipe import save_recipe
from robustkit.datasets import Digits, Synthetic
from robustkit.epsilons import ECAS
from robustkit.losses import CrossEntropy
from robustkit.opening import load_parts, make_world
from robustkit.schedules import Constant
from robustkit.threats import Linf

RECIPE = Recipe(
    data=Digits(augment="crop-flip"),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=0.1),
    epsilon=ECAS(h_low=1.0, h_high=2.2),
    attack=PGD(steps=1),
    loss=CrossEntropy(),
    schedule=Constant(),
    epochs=2,
    batch_size=64,
    validation=Validation(images=64, train_images=0, attack=PGD(steps=1)),
    evaluation=(),
)
BATCHES = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "run"
    run(RECIPE, out=folder, device="cpu", preflight=False)
    return folder


def by_hand(network: Any, images: Tensor, *, training: bool) -> list[float]:
    """Entropy by `Categorical`, of a copy, batch by batch."""
    network, found = deepcopy(network).train(training), []
    with torch.no_grad():
        for number in range(0, len(images), RECIPE.batch_size):
            logits = network(images[number : number + RECIPE.batch_size]).logits
            found += Categorical(logits=logits).entropy().tolist()
    return found


def plain_images(recipe: Recipe, count: int) -> Tensor:
    """The first images of the first epoch, as they are."""
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    return recipe.data.load().train.fetch(parts.order(0)[:count]).float() / 255


def test_entropies_of_an_untrained_network() -> None:
    recipe = evolve(RECIPE, data=Digits(augment="none"))
    network = load_parts(recipe, make_world(recipe, "cpu")).model
    images = plain_images(recipe, BATCHES * 64)
    found = calibrate_entropy(recipe, batches=BATCHES, device="cpu")
    assert [(r.network, r.mode) for r in found.readings] == [("untrained", "train-frozen"), ("untrained", "eval")]
    assert found.images == BATCHES * 64 and found.classes == 10
    for reading, training in zip(found.readings, (True, False), strict=True):
        wanted = by_hand(network, images, training=training)
        assert reading.entropies.tolist() == pytest.approx(wanted, abs=1e-5)
        assert reading.mean == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
        for threshold in (1.0, 2.2, wanted[5] + 1e-4):
            assert reading.below(threshold) == sum(h < threshold for h in wanted) / len(wanted)
            assert reading.above(threshold) == sum(h > threshold for h in wanted) / len(wanted)
    train, _ = found.readings
    thresholds = {(t.name, t.source): t.value for t in found.thresholds()}
    assert thresholds == {
        ("h_low", "published"): 1.3,
        ("h_low", "recipe"): 1.0,
        ("h_high", "published"): 2.274,
        ("h_high", "recipe"): 2.2,
        ("h_high", "measured"): train.mean,
    }
    beyond = {(t.name, t.source): t.beyond(train) for t in found.thresholds()}
    assert beyond["h_low", "recipe"] == train.below(1.0) and beyond["h_high", "recipe"] == train.above(2.2)


def test_a_trained_network_gives_h_low(trained: Path) -> None:
    found = calibrate_entropy(RECIPE, run=trained, batches=BATCHES, device="cpu")
    assert [r.network for r in found.readings] == ["untrained"] * 2 + ["after 2 of 2 epochs"] * 2
    parts = load_parts(RECIPE, make_world(RECIPE, "cpu"))
    images = torch.cat(list(first_batches(parts, BATCHES)))
    networks = [parts.model, parts.model, robustkit.load(trained).network, robustkit.load(trained).network]
    for reading, network, training in zip(found.readings, networks, (True, False, True, False), strict=True):
        assert reading.entropies.tolist() == pytest.approx(by_hand(network, images, training=training), abs=1e-4)
    values = {(t.name, t.source): t.value for t in found.thresholds()}
    assert values["h_high", "measured"] == found.readings[0].mean
    assert values["h_low", "measured"] == found.readings[2].mean < values["h_high", "measured"]


def test_first_batches_are_those_that_training_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmented, over the end of an epoch."""
    small = evolve(RECIPE, data=Synthetic(train=40, test=8, size=8, classes=4, augment="crop-flip"), batch_size=16)
    small = evolve(small, validation=Validation(images=4, train_images=0, attack=None))
    parts = load_parts(small, make_world(small, "cpu"))
    seen: list[Tensor] = []
    monkeypatch.setattr(ECAS, "__call__", lambda self, scene: seen.append(scene.batch.x) or self.adjust(*draw(scene)))

    def draw(scene: Any) -> tuple[Tensor, float, float]:
        return torch.ones(len(scene.batch.y)), 0.1, 0.1

    from robustkit.core.loop import train_step

    wanted = list(first_batches(parts, 5))
    for step in range(5):
        place = step % parts.steps_per_epoch * 16
        train_step(parts, parts.order(step // parts.steps_per_epoch)[place : place + 16])
    assert parts.steps_per_epoch < 5 and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_nothing_is_changed() -> None:
    model = load_parts(RECIPE, make_world(RECIPE, "cpu")).model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(2, 16, 1, 8, 8)
    frozen = mean_entropy(model, images)
    assert frozen == pytest.approx(float(entropies(model, images, "train-frozen").mean()))
    assert mean_entropy(model, images, "eval") != pytest.approx(frozen, abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    entropies(model, images, "train")
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bounds() -> None:
    """Uniform predictions have ln K, certain ones 0, and neither is NaN."""
    model = load_parts(RECIPE, make_world(RECIPE, "cpu")).model
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.zero_()
    images = torch.rand(1, 8, 1, 8, 8)
    assert mean_entropy(model, images) == pytest.approx(math.log(10), abs=1e-6)
    with torch.no_grad():
        model.head.linear.bias[3] = 1e4
    assert mean_entropy(model, images) == 0


def test_other_numbers_of_classes() -> None:
    recipe = evolve(RECIPE, data=Synthetic(train=80, test=8, size=8, classes=4), epsilon=ECAS(h_low=-math.inf))
    recipe = evolve(recipe, validation=Validation(images=4, train_images=0, attack=None))
    found = calibrate_entropy(recipe, batches=1, device="cpu")
    assert [(t.name, t.source) for t in found.thresholds()] == [("h_high", "measured")]


# The command


def test_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(trained), "--calibrate-entropy", "--batches", "2", "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert captured.err == "" and (data["classes"], data["batches"], data["images"]) == (10, 2, 128)
    found = calibrate_entropy(RECIPE, run=trained, batches=2, device="cpu")
    assert [r["mean"] for r in data["readings"]] == pytest.approx([r.mean for r in found.readings])
    for entry, threshold in zip(data["thresholds"], found.thresholds(), strict=True):
        assert (entry["name"], entry["source"]) == (threshold.name, threshold.source)
        assert entry["beyond"] == pytest.approx([threshold.beyond(reading) for reading in found.readings])


def test_table(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--calibrate-entropy", "--batches", "1", "--device", "cpu"]
    assert main(["show", str(trained), *words]) == 0
    out = capsys.readouterr().out
    assert "64 images in 1 batch; nats, at most ln 10 = 2.303" in out
    for text in ("untrained", "after 2 of 2 epochs", "train-frozen", "1.300", "2.274", "% below", "% above"):
        assert text in out
    assert "To measure h_low" not in out
    save_recipe(RECIPE, tmp_path / "alone.json")
    assert main(["show", str(tmp_path / "alone.json"), *words]) == 0
    out = capsys.readouterr().out
    assert "To measure h_low, give the folder of a run" in out and "after" not in out


def test_a_run_that_has_not_trained_yet_has_no_h_low(tmp_path: Path) -> None:
    save_recipe(RECIPE, tmp_path / "recipe.json")
    found = calibrate_entropy(RECIPE, run=tmp_path, batches=1, device="cpu")
    assert {r.network for r in found.readings} == {"untrained"}


def test_mistakes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(words: list[str], *said: str) -> None:
        capsys.readouterr()
        assert main(["show", *words]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert captured.out == "" and line.startswith("error: ") and all(text in line for text in said), line

    recipes = Path(__file__).parents[1] / "recipes"
    fails([str(trained), "--batches", "3"], "--batches", "without --calibrate-entropy")
    fails([str(trained), "--device", "cpu"], "--device", "without --calibrate-entropy")
    fails([str(trained), "--calibrate-entropy", "--batches", "0"], "at least 1")
    fails([str(trained), "epsilon.h_low=1.5", "--calibrate-entropy"], "another recipe", "epsilon.h_low")
    for variable in ("ROBUSTKIT_CIFAR10_DIR", "ROBUSTKIT_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    words = [f"{recipes}/ecas_table3.py:cifar10-ecas-pgd-at", f"data.root={tmp_path}", "data.download=false"]
    fails([*words, "--calibrate-entropy"], "CIFAR-10", str(tmp_path))
    broken = shutil.copytree(trained, tmp_path / "broken")
    last = broken / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1000])
    fails([str(broken), "--calibrate-entropy"], "damaged", "last.safetensors")
    with pytest.raises(CheckpointError):
        calibrate_entropy(RECIPE, run=broken, batches=1, device="cpu")
