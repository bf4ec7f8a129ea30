"""Numbers gone wrong: a step whose objective or gradient is NaN or infinite, and each thing that a run may do then.

Every fault strikes in one step of the sixteen (four epochs of four). In one of two processes: `test_processes`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import driver
import pytest
import torch
from driver import Faulty
from rich.console import Console
from torch import Tensor

from robustkit import Health, Recipe, Suite, evolve, registry, resume, run, setting, spec
from robustkit.attacks import PGD
from robustkit.cli.main import main
from robustkit.core import checkpoint, faults, loop
from robustkit.core.batch import Budget, Passes, Prepared, Progress
from robustkit.core.errors import UserError
from robustkit.core.loop import Failure, train_step
from robustkit.core.recipe import save_recipe
from robustkit.core.rng import Generator
from robustkit.core.strategy import Predict, Scene, ThreatModel
from robustkit.datasets import Synthetic
from robustkit.evaluation import Clean
from robustkit.losses import Align, CrossEntropy
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.reporting.terminal import TerminalDisplay
from robustkit.revisit import revisit
from robustkit.targets import Momentum, Universal
from robustkit.testing import tiny_recipe
from robustkit.weights import AWP, Exponential

CLOCKS = ("seconds", "images_per_second")


@spec
class Dazed:
    """PGD whose image of one training row becomes NaN in step 6; rows are known by their label and place alone."""

    steps: int = setting(default=2, at_least=1)
    reach: ClassVar[float] = 1.0
    now: bool = False

    def at(self, progress: Progress) -> Dazed:
        return evolve(self, now=progress.step == 5)

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        x_adv = PGD(steps=self.steps)(predict, x, y, budget, threat, generator)
        if self.now:
            x_adv[3] = torch.nan
        return x_adv

    def passes(self, progress: Progress) -> Passes:
        return PGD(steps=self.steps).passes(progress)


@pytest.fixture(autouse=True, scope="module")
def known() -> Iterator[None]:
    with driver.faulty_known():
        yield


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry("attack").register("dazed")(Dazed)
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", driver.no_figures())


def faulty(on_fault: Any = "stop", most_skipped: int = 10, loss: Any = None, **changes: Any) -> Recipe:
    health = Health(on_fault=on_fault, most_skipped=most_skipped)
    return tiny_recipe(**{"loss": loss or Faulty(), "health": health} | changes)


def everything(on_fault: Any, loss: Faulty) -> Recipe:
    """As much state as fits into one recipe."""
    return faulty(
        on_fault,
        loss=evolve(loss, base=Align()),
        data=Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip"),
        target=Momentum(inner=Universal(), start=0.25),
        weights=AWP(start=0.25),
        average=Exponential(rate=0.7),
        optimizer=SGD(lr=0.05, nesterov=True),
    )


def tensors(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / f"{name}.safetensors")[0]


def facts(folder: Path, name: str = "last") -> dict[str, Any]:
    return checkpoint.facts_of(folder / "checkpoints" / f"{name}.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """All that a finished run holds, bit for bit; recipes may differ in their health."""
    for name in ("last", "best"):
        mine, theirs = tensors(one, name), tensors(other, name)
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    for key in ("step", "best", "skipped", "course", "metrics"):
        assert facts(one)[key] == facts(other)[key]
    assert metrics(one) == metrics(other)


def culprit(folder: Path, step: int = 6) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return checkpoint.read(folder / "faults" / f"step-{step:06d}.safetensors")


# What is noticed, said and kept


def test_a_fault_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 1, the batch, and a last checkpoint from before."""
    given, folder = faulty(loss=Faulty()), tmp_path / "run"
    save_recipe(given, tmp_path / "recipe.json")
    assert main(["run", str(tmp_path / "recipe.json"), "--out", str(folder), "--device", "cpu", "--quiet"]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    for part in (
        "epoch 2, step 6: term 'struck' is nan",
        "learning rate 0.1, radii 0.03137 to 0.03137",
        "the logits are finite, the loss is not",
        f"{folder}/faults/step-000006.safetensors",
        "health.on_fault=skip",
    ):
        assert part in line
    assert facts(folder)["step"] == 4 and all(tensor.isfinite().all() for tensor in tensors(folder).values())
    assert len(metrics(folder)) == 1

    batch, found = culprit(folder)
    parts = load_parts(given, make_world(given, "cpu"))
    rows = parts.order(1)[16:32]  # the second batch of the second epoch
    pixels = parts.data.train.fetch(rows).float() / 255
    assert torch.equal(batch["rows"], rows) and torch.equal(batch["labels"], parts.data.train.labels[rows])
    assert torch.equal(batch["images"], pixels)
    moved = (batch["adversarial"] - pixels).abs().amax()
    assert 0 < moved <= 8 / 255 + 1e-6 and batch["epsilon"].tolist() == pytest.approx([8 / 255] * 16)
    assert found["terms"]["struck"] == "nan" and float(found["terms"]["cross-entropy"]) > 0
    assert found["objective"] == "nan" and found["rows that are not finite"] == {}


@pytest.mark.parametrize("fault", ["inf", "gradient"])
def test_infinities(fault: Any, tmp_path: Path) -> None:
    """An infinite gradient of a finite objective is one of the gradient alone, as an infinite number is of a term."""
    with pytest.raises(Failure, match="not a finite number in epoch 2, step 6") as raised:
        run(faulty(loss=Faulty(fault=fault)), out=tmp_path / "run", device="cpu")
    _, found = culprit(tmp_path / "run")
    assert ("term" in str(raised.value).partition("(")[0]) == (fault == "inf")
    assert (float(found["objective"]) == torch.inf) == (fault == "inf")
    for part in ("step 6: gradient of model.backbone.layers.0.0.weight and 10 others of 11", "for sqrt or norm at 0"):
        assert (part in str(raised.value)) == (fault == "gradient")


def test_the_row_is_named_where_one_is_to_blame(tmp_path: Path) -> None:
    with pytest.raises(Failure) as raised:
        run(faulty(loss=CrossEntropy(), attack=Dazed()), out=tmp_path / "run", device="cpu")
    batch, found = culprit(tmp_path / "run")
    row = int(batch["rows"][3])
    assert found["rows that are not finite"]["adversarial images"] == [row]
    assert f"adversarial images of training row {row} (" in str(raised.value)
    assert "the attack's gradient is not finite" in str(raised.value)
    assert batch["adversarial"][3].isnan().all() and batch["images"].isfinite().all()


def test_a_piece_of_the_batch(tmp_path: Path) -> None:
    """With `accumulate`, the fault may be in the first piece, whose objective the second does not know."""
    given = faulty(accumulate=2, loss=Faulty(where="first"))
    with pytest.raises(Failure):
        run(given, out=tmp_path / "run", device="cpu")
    parts = load_parts(given, make_world(given, "cpu"))
    batch, found = culprit(tmp_path / "run")
    assert torch.equal(batch["rows"], parts.order(1)[16:32]) and found["terms"]["struck"] == "nan"


def test_looking_at_it_again(tmp_path: Path) -> None:
    """The state is that of a run which stood there, and the step fails once more; the folder stays as it was."""
    for name, on_fault in (("stop", "stop"), ("skip", "skip"), ("there", "stop")):
        try:
            run(
                everything(on_fault, Faulty()), out=tmp_path / name, device="cpu", max_steps=5 if name == "there" else 7
            )
        except Failure:
            assert name == "stop"
    there = tensors(tmp_path / "there")
    for name in ("stop", "skip"):
        held = {path: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()}
        fault = tmp_path / name / "faults" / "step-000006.safetensors"
        parts = revisit(fault, device="cpu")
        assert parts.step == 5
        state = parts.tensors()
        assert [key for key in there if not torch.equal(there[key], state[key])] == []
        with pytest.raises(faults.Fault):
            train_step(parts, checkpoint.read(fault)[0]["rows"])
        assert held == {path: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match="is no fault of a run"):
        revisit(tmp_path / "stop" / "checkpoints" / "last.safetensors")


# What a run does then


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that skips steps 6 and 8, the last of its epoch."""
    folder = tmp_path_factory.mktemp("skipped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "robustkit.reporting.figures", driver.no_figures())
        run(everything("skip", Faulty(steps=(6, 8))), out=folder, device="cpu")
    yield folder


def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    """Weights, statistics, momentum, memories, perturbations and averages; the totals of the epoch, too."""
    given = everything("skip", Faulty(fault="gradient"))
    for steps in (5, 6):
        run(given, out=tmp_path / str(steps), device="cpu", max_steps=steps)
    before, after = tensors(tmp_path / "5"), tensors(tmp_path / "6")
    assert {name.split(".")[0] for name in before} == {"model", "average", "strategies", "optimizer", "totals"}
    assert before.keys() == after.keys() and facts(tmp_path / "6")["step"] == 6
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    with pytest.raises(Failure):  # the step itself would have changed much
        run(evolve(given, health=Health()), out=tmp_path / "stop", device="cpu")


def test_skipped_steps_are_counted(skipped: Path) -> None:
    assert [report.get("skipped") for report in metrics(skipped)] == [None, [6, 8], None, None]
    assert sum(metrics(skipped)[1]["radii"]["counts"]) == 32  # of 58 images: two batches of 16 are left
    assert facts(skipped)["skipped"] == [6, 8]
    assert all(tensor.isfinite().all() for tensor in tensors(skipped).values())
    kept = sorted(path.name for path in (skipped / "checkpoints").glob("before-*.safetensors"))
    assert kept == ["before-000006.safetensors", "before-000008.safetensors"]


def test_rewinding_is_skipping(skipped: Path, tmp_path: Path) -> None:
    """From a checkpoint, whichever it is, training comes by the same state."""
    out = io.StringIO()
    shown = TerminalDisplay(Console(file=out, width=500))
    run(everything("rewind", Faulty(steps=(6, 8))), out=tmp_path / "run", device="cpu", display=shown)
    assert_same(skipped, tmp_path / "run")
    assert out.getvalue().count("not a finite number") == 2 and out.getvalue().count("back to step 4") == 2


@pytest.mark.parametrize("on_fault", ["skip", "rewind"])
def test_killed_anywhere_and_resumed(on_fault: Any, skipped: Path, tmp_path: Path) -> None:
    """Before, between and after the faults, and in the middle of the way back to one."""
    given, folder = everything(on_fault, Faulty(steps=(6, 8))), tmp_path / "run"
    for steps in (5, 6, 7, 8):
        go = resume(folder, device="cpu", max_steps=steps) if folder.exists() else None
        go = go or run(given, out=folder, device="cpu", max_steps=steps)
        assert go.stopped == "steps" and facts(folder)["step"] == steps
    resume(folder, device="cpu")
    assert_same(skipped, folder)


class Killed(Exception):
    """What stands for SIGKILL: nothing is saved."""


def test_killed_on_the_way_back(skipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint knows nothing of the fault yet: it is met again, and counted once."""
    given, folder, made = everything("rewind", Faulty(steps=(6, 8))), tmp_path / "run", []
    plain = loop.train_step

    def counted(parts: Any, rows: Tensor) -> None:
        made.append(parts.step + 1)
        if made[-2:] == [5, 7]:
            raise Killed
        plain(parts, rows)

    monkeypatch.setattr(loop, "train_step", counted)
    with pytest.raises(Killed):
        run(given, out=folder, device="cpu")
    assert made == [1, 2, 3, 4, 5, 6, 5, 7] and facts(folder)["step"] == 4
    made.append(0)
    monkeypatch.setattr(loop, "train_step", plain)
    resume(folder, device="cpu")
    assert_same(skipped, folder)


@pytest.mark.parametrize("on_fault", ["skip", "rewind"])
def test_no_more_than_so_many(on_fault: Any, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"step 8: .*health.most_skipped=1 steps are skipped already"):
        run(faulty(on_fault, 1, Faulty(steps=(6, 8))), out=tmp_path / "run", device="cpu")
    assert facts(tmp_path / "run")["step"] == 4
    with pytest.raises(Failure, match="every step of epoch 2 was skipped"):
        run(faulty(on_fault, 10, Faulty(steps=(5, 6, 7, 8))), out=tmp_path / "other", device="cpu")


def test_the_first_step(tmp_path: Path) -> None:
    """There is no momentum yet, and the first batch that is made adopts its statistics."""
    given = faulty("skip", loss=Faulty(steps=(1,)))
    given = evolve(given, model=evolve(given.model, adopt_first_batch=True))
    for on_fault in ("skip", "rewind"):
        health = Health(on_fault=on_fault)
        run(evolve(given, health=health), out=tmp_path / on_fault, device="cpu")
        run(evolve(given, health=health), out=tmp_path / f"{on_fault}-1", device="cpu", max_steps=1)
    assert_same(tmp_path / "skip", tmp_path / "rewind")
    assert not any(key.startswith("optimizer") for key in tensors(tmp_path / "skip-1"))
    run(given, out=tmp_path / "2", device="cpu", max_steps=2)
    parts = load_parts(given, make_world(given, "cpu"))
    norm = next(name for name, _ in parts.model.named_buffers() if name.endswith("running_mean"))
    seen = tensors(tmp_path / "2")
    assert bool((seen[f"model.{norm}"] != 0).any())


# One step late, as on a GPU


@pytest.mark.parametrize("steps", [(6,), (8,), (15,), (16,)])
def test_one_step_late(steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept before it is looked at; what is said and what comes of it is the same."""

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    class Later(faults.Watch):
        def __init__(self, device: torch.device, *, at_once: bool = False) -> None:
            super().__init__(device)
            self._later = not at_once

    run(faulty("skip", loss=Faulty(steps=steps)), out=tmp_path / "skip", device="cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("robustkit.core.parts.Watch", Later)
    made = []
    plain = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda parts, rows: (made.append(parts.step + 1), plain(parts, rows)))
    run(faulty("rewind", loss=Faulty(steps=steps)), out=tmp_path / "rewind", device="cpu")
    assert_same(tmp_path / "skip", tmp_path / "rewind")
    (step,) = steps
    late = step + (step % 4 != 0)  # the last step of an epoch is looked at before it is reported
    assert made[: made.index(late) + 1] == list(range(1, late + 1)) and made[late] == step - (step - 1) % 4
    with pytest.raises(Failure, match=f"step {step}:"):
        run(faulty(loss=Faulty(steps=steps)), out=tmp_path / "stop", device="cpu")
    assert facts(tmp_path / "stop")["step"] == (step - 1) // 4 * 4


# Warnings of an epoch


def said(folder: Path, given: Recipe) -> list[str]:
    shown = TerminalDisplay(Console(file=io.StringIO(), width=500))
    run(given, out=folder, device="cpu", display=shown)
    assert isinstance(shown.console.file, io.StringIO)
    return shown.console.file.getvalue().splitlines()


@spec
class Leaping:
    """Cross-entropy, a hundred times as large in some steps."""

    steps: tuple[int, ...] = (6, 11)
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def passes(self, progress: Progress) -> Passes:
        return CrossEntropy().passes(progress)

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        return CrossEntropy().prepare(scene, budget, x_adv)

    def __call__(self, *given: Any) -> dict[str, Tensor]:
        scale = 100.0 if given[-1].step + 1 in self.steps else 1.0
        return {name: scale * term for name, term in CrossEntropy()(*given).items()}


def test_a_leap_is_said_once(tmp_path: Path) -> None:
    registry("loss").register("leaping")(Leaping)
    given = faulty(loss=Leaping(), optimizer=SGD(lr=0.01, clip_norm=1.0))
    lines = [line for line in said(tmp_path / "run", given) if line.startswith("Gradients leap")]
    assert len(lines) == 1 and "in step 6 their norm is" in lines[0] and "optimizer.clip_norm=" in lines[0]
    reports = [report["gradient"] for report in metrics(tmp_path / "run")]
    assert ["leap" in report for report in reports] == [False, True, True, False]
    assert [report["step"] for report in reports[1:3]] == [6, 11]
    assert facts(tmp_path / "run")["course"]["leap"] == 8
    run(given, out=tmp_path / "parts", device="cpu", max_steps=7)
    resume(tmp_path / "parts", device="cpu")
    assert_same(tmp_path / "run", tmp_path / "parts")


def test_robust_overfitting_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The course is scripted, all else is real; stopped between, it is the same."""
    robust = [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]
    training = [0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.95, 1.0, 1.0, 1.0, 1.0]

    def measure(parts: Any, rows: Tensor, attacks: dict[str, Any]) -> dict[str, float]:
        course = robust if torch.equal(rows, parts.validation_rows) else training
        return {name: course[parts.step // parts.steps_per_epoch - 1] for name in ("natural", *attacks)}

    monkeypatch.setattr(loop, "measure", measure)
    given = evolve(tiny_recipe(), epochs=12)
    lines = [line for line in said(tmp_path / "run", given) if line.startswith("Robust overfitting")]
    first = next(report["epoch"] for report in metrics(tmp_path / "run") if "overfitting" in report)
    held = [report["epoch"] for report in metrics(tmp_path / "run") if "overfitting" in report]
    assert len(lines) == 1 and held == list(range(first, 13)) and first > 7
    assert "since epoch 6" in lines[0] and "fell to" in lines[0] and "checkpoints/best is the one to use" in lines[0]
    run(given, out=tmp_path / "parts", device="cpu", max_steps=4 * first - 3)
    resume(tmp_path / "parts", device="cpu")
    assert_same(tmp_path / "run", tmp_path / "parts")


def test_no_nan_is_right_in_validation() -> None:
    """Labels are all class 0, which argmax takes for the largest of NaNs."""
    given = tiny_recipe(evaluation=(Suite(measures=(Clean(),)),))
    parts = load_parts(given, make_world(given, "cpu"))
    parts.data.train.labels.zero_()
    with torch.no_grad():
        next(parts.model.head.parameters()).fill_(torch.nan)
    found = loop.measure(parts, parts.validation_rows, {"robust": PGD(steps=1)})
    assert found == {"natural": 0.0, "robust": 0.0}
