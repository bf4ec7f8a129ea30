"""Catastrophic overfitting: which courses of training raise the alarm, and what a run does then."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import driver
import pytest
import torch
from rich.console import Console

from robustkit import Recipe, Suite, Validation, evolve, registry, resume, run, spec
from robustkit.attacks import PGD, RSFGSM
from robustkit.cli.main import main
from robustkit.core import checkpoint, loop
from robustkit.core.collapse import Seen, collapsed
from robustkit.core.parts import Parts
from robustkit.core.recipe import save_recipe
from robustkit.datasets import Digits
from robustkit.evaluation import Clean
from robustkit.export import export
from robustkit.opening import load_parts, make_world
from robustkit.reporting.terminal import TerminalDisplay
from robustkit.runs import evaluate_run
from robustkit.testing import tiny_recipe
from robustkit.threats import Linf

# The rule


def alarms(course: list[tuple[float, float]], images: int = 1024) -> list[int]:
    """In which epochs of a course of (robust, FGSM) accuracies the rule fires."""
    best, found = Seen(-1.0, -1.0), []
    for epoch, accuracies in enumerate(course, start=1):
        now = Seen(*accuracies)
        if now.robust >= best.robust:
            best = now
        elif collapsed(now, best, images):
            found.append(epoch)
    return found


def line(*corners: tuple[int, float]) -> list[float]:
    """Values for epochs 1, 2, ... on straight lines between (epoch, value)."""
    values = []
    for (first, start), (last, end) in pairwise(corners):
        values += [start + (end - start) * (epoch - first) / (last - first) for epoch in range(first, last)]
    return [*values, corners[-1][1]]


RICE = {  # sheet 2.2: best and last of 200 epochs
    "CIFAR-10": line((1, 0.25), (100, 0.46), (106, 0.5349), (200, 0.4559)),
    "CIFAR-100": line((1, 0.08), (100, 0.2815), (200, 0.2187)),
    "SVHN": line((1, 0.2), (16, 0.6104), (200, 0.5430)),
}


@pytest.mark.parametrize("name", RICE)
@pytest.mark.parametrize("images", [256, 1024])
def test_ordinary_robust_overfitting_is_no_collapse(name: str, images: int) -> None:
    """Nor are the errors of few images; accuracy under FGSM even rises meanwhile."""
    for seed in range(20):
        draws = random.Random(seed)

        def measured(share: float, draws: random.Random = draws) -> float:
            return sum(draws.random() < share for _ in range(images)) / images

        course = [(measured(share), measured(share + 0.05 + epoch / 2000)) for epoch, share in enumerate(RICE[name])]
        assert alarms(course, images) == []


HEALTHY = [(0.2, 0.25), (0.3, 0.36), (0.38, 0.44), (0.42, 0.49), (0.44, 0.52)]


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ([*HEALTHY, (0.01, 0.85)], [6]),  # from one epoch to the next
        ([*HEALTHY, (0.30, 0.6), (0.25, 0.6), (0.15, 0.6), (0.0, 0.8)], [8, 9]),  # by and by
        ([*HEALTHY, (0.02, 0.45)], [6]),  # accuracy under FGSM need not rise
        ([*HEALTHY, (0.02, 0.9), (0.40, 0.5), (0.45, 0.5)], [6]),  # it may recover
        ([*HEALTHY, (0.02, 0.9), (0.5, 0.6), (0.45, 0.6)], [6]),
        ([(0.1, 0.12), (0.14, 0.3), (0.16, 0.35), (0.005, 0.5)], [4]),  # a large radius, a small model
        ([*HEALTHY, (0.1, 0.1), (0.1, 0.1)], []),  # diverged: one class is predicted for all
        ([*HEALTHY, (0.062, 0.223), (0.004, 0.113)], []),  # trained without an attack from here on
        ([(0.1, 0.1), (0.0, 0.05), (0.01, 0.1), (0.02, 0.2)], []),  # the first epochs
        ([(0.0, 0.3), (0.01, 0.3), (0.0, 0.4)], []),  # never robust
        (HEALTHY, []),
    ],
)
def test_courses(course: list[tuple[float, float]], expected: list[int]) -> None:
    assert alarms(course) == expected


def test_cycles_of_radii_are_no_collapse() -> None:
    """ECAS: ten epochs from 3/255 to 12/255, judged at 8/255; the weak ones cost two fifths, under either attack."""
    robust = [0.3 + 0.2 * (epoch % 10) / 9 for epoch in range(110)]
    assert alarms([(share, 1.1 * share) for share in robust]) == []


def test_few_images_tell_little() -> None:
    course = [(0.25, 0.3), (0.0, 0.35)]
    assert alarms(course, images=12) == [] and alarms(course, images=256) == [2]


# A run: the course is scripted, all else is real


COURSE = [(0.6, 0.7), (0.9, 0.92), (0.0, 0.95), (0.05, 0.97)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes validation find a course of (robust, FGSM) accuracies."""

    def follow(course: list[tuple[float, float]]) -> None:
        def measure(parts: Parts, rows: torch.Tensor, attacks: dict[str, Any]) -> dict[str, float]:
            robust, fgsm = course[parts.step // parts.steps_per_epoch - 1]
            found = {"natural": 0.98, "robust": robust, "fgsm": fgsm}
            return {name: found[name] for name in ("natural", *attacks)}

        monkeypatch.setattr(loop, "measure", measure)

    follow(COURSE)
    return follow


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", driver.no_figures())


def recipe(on_collapse: Any = "warn", **changes: Any) -> Recipe:
    validation = Validation(images=12, train_images=6, attack=PGD(steps=2), on_collapse=on_collapse)
    given = {"attack": RSFGSM(), "validation": validation, "evaluation": (Suite(measures=(Clean(),)),)}
    return tiny_recipe(**given | changes)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def display() -> TerminalDisplay:
    return TerminalDisplay(Console(file=io.StringIO(), width=300))


def said(shown: TerminalDisplay) -> list[str]:
    assert isinstance(shown.console.file, io.StringIO)
    return shown.console.file.getvalue().splitlines()


def test_warning_goes_on(scripted: Any, tmp_path: Path) -> None:
    shown = display()
    outcome = run(recipe(), out=tmp_path / "run", device="cpu", display=shown)
    assert outcome.stopped == "" and set(outcome.results) == {"last", "best"}
    reports = metrics(tmp_path / "run")
    before = {"epoch": 2, "robust": 0.9, "fgsm": 0.92}
    assert [report.get("collapse") for report in reports] == [None, None, before, before]
    (warning,) = [text for text in said(shown) if text.startswith("Catastrophic overfitting")]
    assert "since epoch 2" in warning and "fell to 0.0 % (from 90.0 %)" in warning and "95.0 % (from 92.0 %)" in warning
    assert "checkpoints/best keeps epoch 2, training goes on" in warning
    assert [text.split()[-1] for text in said(shown) if "/4 " in text and "%" in text][-2:] == ["collapsed"] * 2


def test_stopping_ends_the_run(scripted: Any, tmp_path: Path) -> None:
    """Three epochs of four; last and best are judged, and there is nothing to go on with."""
    shown, folder = display(), tmp_path / "run"
    outcome = run(recipe("stop"), out=folder, device="cpu", display=shown)
    assert outcome.stopped == "collapse" and len(metrics(folder)) == 3
    assert any("training ends here" in text for text in said(shown))
    facts = {name: checkpoint.facts_of(folder / "checkpoints" / f"{name}.safetensors") for name in ("last", "best")}
    assert (facts["last"]["epoch"], facts["best"]["epoch"]) == (3, 2)
    assert all(outcome.results[name]["clean"]["n"] == 16 for name in ("last", "best"))

    held = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    again = display()
    assert resume(folder, device="cpu", display=again).stopped == "collapse"
    assert held == {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert any("Training is finished" in text for text in said(again))

    quiet = display()
    assert evaluate_run(folder, device="cpu", again=True, display=quiet).results.keys() == {"last", "best"}
    assert not any("Provisional" in text for text in said(quiet))


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
@pytest.mark.parametrize("step", [7, 12])
def test_resumed_anywhere_it_is_the_same(on_collapse: str, step: int, scripted: Any, tmp_path: Path) -> None:
    given = recipe(on_collapse)
    whole = run(given, out=tmp_path / "whole", device="cpu")
    first = run(given, out=tmp_path / "parts", device="cpu", max_steps=step)
    assert first.stopped == ("collapse" if (on_collapse, step) == ("stop", 12) else "steps")
    assert resume(tmp_path / "parts", device="cpu").stopped == whole.stopped
    one, other = (metrics(tmp_path / name) for name in ("whole", "parts"))
    clocks = ("seconds", "images_per_second")
    assert [{k: v for k, v in report.items() if k not in clocks} for report in one] == [
        {k: v for k, v in report.items() if k not in clocks} for report in other
    ]
    mine, theirs = (
        checkpoint.read(tmp_path / name / "checkpoints" / "last.safetensors")[0] for name in ("whole", "parts")
    )
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_control_is_trained_all_the_same(scripted: Any, tmp_path: Path) -> None:
    given = evolve(recipe("stop"), control=recipe(attack=None))
    outcome = run(given, out=tmp_path / "run", device="cpu")
    assert outcome.stopped == "collapse" and outcome.control is not None and "last" in outcome.control
    assert len(metrics(tmp_path / "run" / "control")) == 4


def test_robustness_that_comes_back(scripted: Any, tmp_path: Path) -> None:
    scripted([(0.8, 0.85), (0.0, 0.9), (0.9, 0.95), (0.0, 0.95)])
    shown = display()
    run(recipe(), out=tmp_path / "run", device="cpu", display=shown)
    assert [report.get("collapse", {}).get("epoch") for report in metrics(tmp_path / "run")] == [None, 1, None, 3]
    assert sum(text.startswith("Catastrophic") for text in said(shown)) == 2


def test_the_command_line(scripted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1: all that could be done is done, but this is not the end that was wanted."""
    save_recipe(recipe("stop"), tmp_path / "recipe.json")
    words = ["--device", "cpu"]
    assert main(["run", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run"), *words]) == 1
    captured = capsys.readouterr()
    assert "clean" in captured.out and "robustness collapsed" in captured.err and "resume" not in captured.err
    assert "results.json" in captured.err
    assert main(["resume", str(tmp_path / "run"), "--json", *words]) == 1
    assert json.loads(capsys.readouterr().out)["stopped"] == "collapse"
    save_recipe(recipe("warn"), tmp_path / "recipe.json")
    assert main(["run", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "other"), *words]) == 0


def test_an_exported_model_says_so(scripted: Any, tmp_path: Path) -> None:
    run(recipe("stop"), out=tmp_path / "run", device="cpu")
    for name, words in (("last", "epoch 3 of 4"), ("best", "epoch 2 of 4")):
        export(tmp_path / "run", "safetensors", checkpoint=name, out=tmp_path / name)
        (card,) = tmp_path.glob(f"{name}/*.md")
        text = " ".join(card.read_text(encoding="utf-8").split())
        assert words in text and ("robustness collapsed in epoch 3" in text) == (name == "last")


# When FGSM is measured


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({}, True),
        ({"attack": PGD(steps=1)}, True),
        ({"attack": PGD(steps=2)}, False),
        ({"attack": None}, False),
        ({"validation": Validation(images=12, train_images=0, attack=None)}, False),
    ],
)
def test_where_training_attacks_in_a_single_step(changes: dict[str, Any], measured: bool, tmp_path: Path) -> None:
    run(recipe(**changes, epochs=1, evaluation=()), out=tmp_path / "run", device="cpu")
    (report,) = metrics(tmp_path / "run")
    assert ("fgsm" in report["validation"]) == measured and "fgsm" not in report.get("training", {})


@registry("attack").register("test-vanishing")
@spec
class Vanishing(RSFGSM):  # type: ignore[misc]
    """FGSM for three epochs, then hardly anything."""

    def at(self, progress: Any) -> RSFGSM:
        return RSFGSM(noise=0.0, step=1.0 if progress.epoch < 3 else 1e-3)


def test_numbers_of_a_real_training() -> None:
    """What is reported is FGSM's accuracy by hand; a network that loses its robustness under both has not collapsed."""
    given = recipe(data=Digits(), threat=Linf(epsilon=0.25), attack=Vanishing(), epochs=5, batch_size=32, evaluation=())
    given = evolve(given, validation=Validation(images=256, train_images=0))
    parts = load_parts(given, make_world(given, "cpu"))
    reports = []
    while not parts.finished:
        progress = parts.progress
        position = progress.step % parts.steps_per_epoch
        loop.train_step(parts, parts.order(progress.epoch)[32 * position : 32 * (position + 1)])
        if parts.step % parts.steps_per_epoch == 0:
            reports.append(loop.finish_epoch(parts, progress))
    robust = [report["validation"]["robust"] for report in reports]
    assert robust[2] > 0.2 and robust[4] < robust[2] / 2
    assert not any("collapse" in report for report in reports)

    x = (parts.data.train.fetch(parts.validation_rows).float() / 255).requires_grad_()
    y = parts.data.train.labels[parts.validation_rows]
    parts.model.eval()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(parts.model(x).logits, y), x)
    attacked = (x + 0.25 * gradient.sign()).clamp(0, 1)
    accuracy = (parts.model(attacked).logits.argmax(dim=1) == y).float().mean().item()
    assert reports[-1]["validation"]["fgsm"] == pytest.approx(accuracy, abs=1 / 256)
