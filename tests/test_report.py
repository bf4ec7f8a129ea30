"""Figures of papers: their data computed anew another way, files that are there, and measuring once."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import robustkit
from robustkit import Model, Recipe, Suite, Validation, evaluate, evolve, resume, run
from robustkit.attacks import PGD
from robustkit.cli import report
from robustkit.cli.main import main
from robustkit.cli.options import Parser
from robustkit.datasets import Digits, Synthetic
from robustkit.display import Silent
from robustkit.epsilons import ECAS
from robustkit.evaluation import PGD_20, Attacked, Clean, Detection, MinimumNorm, fixed_part, wilson
from robustkit.evaluation.evaluate import News
from robustkit.evaluation.suites import FAB
from robustkit.losses import Align, CrossEntropy
from robustkit.reporting.paper import FIGURES, budgets, features, iterations, make, strength
from robustkit.reporting.paper.finished import FinishedRun, Judged, open_runs
from robustkit.reporting.paper.inverse import STEPS
from robustkit.schedules import Constant
from robustkit.targets import Momentum, Universal
from robustkit.threats import L2, Linf

PNG = b"\x89PNG\r\n\x1a\n"
EPSILON, RADIUS = 0.1, 0.05
UIAT = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=EPSILON),
    attack=PGD(steps=1),
    target=Momentum(inner=Universal(radius=RADIUS)),
    loss=Align(weight=1.0),
    schedule=Constant(),
    epochs=2,
    batch_size=64,
    validation=Validation(images=64, train_images=64, attack=PGD(steps=2)),
    evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-1", steps=1), PGD_20), images=40),),
)
PLAIN = evolve(UIAT, target=None, loss=CrossEntropy(), validation=Validation(images=0))
MADE = {
    "one": UIAT,
    "three": evolve(UIAT, loss=Align(weight=3.0)),
    "again": evolve(UIAT, loss=Align(weight=3.0), seed=2),
    "plain": PLAIN,
    "cycled": evolve(PLAIN, epsilon=ECAS(values=(0.05, EPSILON), big=1, h_low=1.8, h_high=2.2)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, for reading."""
    folder = tmp_path_factory.mktemp("finished")
    for name, recipe in MADE.items():
        run(recipe, out=folder / name, device="cpu")
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """The same, of one's own, and the current folder's parent."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.fixture
def few(runs: Path) -> Callable[..., tuple[FinishedRun, ...]]:
    """Opens runs by name on 40 test images."""
    return lambda *names, **options: open_runs(
        [str(runs / name) for name in names], **{"images": 40, "device": "cpu"} | options
    )


def images_of(count: int) -> tuple[Tensor, Tensor]:
    """The fixed part of the test images that everything is measured on."""
    test = Digits().load().test
    rows = fixed_part(len(test), count)
    return test.fetch(rows).float() / 255, test.labels[rows]


def right_of(folder: Path, measure: Any, threat: Any, count: int = 40) -> list[bool]:
    """What `evaluate` finds of a run's model."""
    test = Digits().load().test
    settings: dict[str, Any] = {"threat": threat, "suite": [measure], "limit": count, "batch_size": 64}
    return evaluate(robustkit.load(folder), test, preflight=False, **settings)[measure.key].outcomes


def descended(model: Any, x: Tensor, y: Tensor, radius: float, step: float, steps: int) -> Tensor:
    """Sign descent of the cross-entropy in the ball and the box, from x itself."""
    found = x.clone()
    for _ in range(steps):
        found.requires_grad_(True)
        loss = -model(found).log_softmax(1)[torch.arange(len(y)), y].sum()
        (gradient,) = torch.autograd.grad(loss, found)
        found = (found.detach() - step * gradient.sign()).clamp(x - radius, x + radius).clamp(0, 1)
    return found.detach()


def fails(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    """Exit code 2, and one line that says it all."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured.err
    for text in said:
        assert text in captured.err


# What the figures say


def test_strength_by_halves(few: Any, finished: Path) -> None:
    (opened,) = few("one")
    data, _ = make("strength", [opened])
    (panel,) = data["panels"]
    strengths = panel["strengths"]
    assert json.loads(json.dumps(data)) == data and data["runs"] == [str(opened.folder)]
    assert strengths == pytest.approx([quarters * EPSILON / 4 for quarters in range(-4, 9)])
    model, (x, y) = robustkit.load(finished / "one"), images_of(40)
    logits = model(x).detach()
    losses = [-math.log(float(row.exp()[label] / row.exp().sum())) for row, label in zip(logits, y, strict=True)]
    order = sorted(range(40), key=lambda number: losses[number])
    halves = {"top": order[:20], "bottom": order[20:]}
    for half, members in halves.items():
        assert panel[half]["n"] == 20
        for radius, accuracy, interval in zip(strengths, panel[half]["accuracies"], panel[half]["ci95"], strict=True):
            assert interval == list(wilson(round(20 * accuracy), 20))
            if radius < 0:  # never less than natural, and what a plain descent finds but for an image or two
                assert accuracy >= panel[half]["accuracies"][4]
                helped = descended(model, x, y, -radius, -radius / 4, 20)
                right = (model(helped).argmax(1) == y).tolist()
                assert accuracy == pytest.approx(sum(right[m] for m in members) / 20, abs=0.11)
            else:
                right = right_of(finished / "one", PGD_20 if radius else Clean(), Linf(epsilon=radius or EPSILON))
                assert accuracy == sum(right[member] for member in members) / 20
    assert panel["top"]["accuracies"][4] > panel["bottom"]["accuracies"][4]
    assert panel["gap"] == panel["top"]["accuracies"][8] - panel["bottom"]["accuracies"][8]
    assert panel["epsilon"] == EPSILON == strengths[8]


def test_a_point_is_the_number_that_eval_reports(few: Any, finished: Path) -> None:
    (opened,) = few("one")
    outcomes = json.loads((finished / "one" / "outcomes.json").read_text())["last"]["pgd-20"]
    judged = opened.judged(PGD_20, Linf(epsilon=EPSILON))
    assert (judged.images, judged.right) == (outcomes["images"], outcomes["right"])


def test_the_paper_s_strengths(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run at 8/255: -8/255 to 16/255 in steps of 2/255, each in steps of a quarter."""
    (opened,) = few("one")
    opened.recipe = evolve(opened.recipe, threat=Linf(epsilon=8 / 255))
    asked = []

    def judged(self: FinishedRun, measure: Any, threat: Any) -> Judged:
        asked.append((measure.key, round(255 * threat.epsilon, 6)))
        return Judged("same", "1" * 40)

    monkeypatch.setattr(FinishedRun, "judged", judged)
    monkeypatch.setattr(FinishedRun, "remember", lambda *_: {"images": "same", "easy": "10" * 20})
    data, figure = make("strength", [opened])
    assert [round(255 * s, 6) for s in data["panels"][0]["strengths"]] == list(range(-8, 17, 2))
    helped = [("inverse-pgd-20", float(k)) for k in (8, 6, 4, 2)]
    assert asked == [*helped, ("clean", 8.0), *(("pgd-20", float(k)) for k in range(2, 17, 2))]
    assert any(text.get_text() == "gap 0.0" for text in figure.axes[0].texts)


def test_overfitting_is_what_was_logged(few: Any, finished: Path) -> None:
    data, figure = make("overfitting", few("one", "three"))
    assert [panel["run"] for panel in data["panels"]] == ["one", "three"] and len(figure.axes) == 2
    lines = [json.loads(line) for line in (finished / "three" / "metrics.jsonl").read_text().splitlines()]
    panel = data["panels"][1]
    assert panel["attack"] == "pgd-2" and len(lines) == 2
    assert panel["held_out"]["robust"] == [[1, lines[0]["validation"]["robust"]], [2, lines[1]["validation"]["robust"]]]
    assert panel["training"]["natural"] == [[line["epoch"], line["training"]["natural"]] for line in lines]
    assert len(figure.axes[0].lines) == 4


def test_sweep_finds_the_setting(few: Any, finished: Path) -> None:
    data, figure = make("sweep", few("three", "one", "again"))
    assert (data["setting"], data["measure"], data["also"]) == ("loss.weight", "pgd-20", [])
    assert [(point["run"], point["value"], point["seed"]) for point in data["points"]] == [
        ("one", 1.0, 1),
        ("three", 3.0, 1),
        ("again", 3.0, 2),
    ]
    for point in data["points"]:
        results = json.loads((finished / point["run"] / "results.json").read_text())["last"]
        assert results["pgd-20"]["accuracy"] <= results["pgd-1"]["accuracy"]
        for kind, key in (("natural", "clean"), ("robust", "pgd-20")):
            assert point[kind]["accuracy"] == results[key]["accuracy"] and point[kind]["n"] == 40
            assert point[kind]["ci95"] == list(wilson(round(40 * results[key]["accuracy"]), 40))
    natural, robust = figure.axes
    assert "40 images" in natural.get_ylabel() and "pgd-20, the hardest that all have" in robust.get_ylabel()


def test_sweep_prefers_autoattack_where_all_have_it(few: Any, runs: Path) -> None:
    for number, name in enumerate(("one", "three")):
        path = runs / name / "results.json"
        results = json.loads(path.read_text())
        results["last"]["autoattack"] = results["last"]["clean"]  # no matter that others leave less
        results["last"]["l2/autoattack"] = results["last"]["clean"] | {"accuracy": 0.0}
        path.write_text(json.dumps(results))
        assert make("sweep", few("one", "three"))[0]["measure"] == ("autoattack" if number else "pgd-20")


def test_sweep_along_a_named_setting(few: Any) -> None:
    opened = list(few("one", "three"))
    opened[1].recipe = evolve(opened[1].recipe, batch_size=32)
    data, _ = make("sweep", opened, setting="batch_size")
    assert [point["value"] for point in data["points"]] == [32, 64] and data["also"] == ["loss.weight"]
    opened[1].recipe = evolve(opened[0].recipe, threat=Linf(epsilon=12 / 255))
    opened[0].recipe = evolve(opened[0].recipe, threat=Linf(epsilon=8 / 255))
    figure = make("sweep", opened)[1]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["8/255", "12/255"]


def test_difference_is_paired(few: Any, finished: Path) -> None:
    data, figure = make("difference", few("one", "plain"))
    assert [point["radius"] for point in data["points"]] == pytest.approx([k * EPSILON / 4 for k in range(1, 9)])
    for point in data["points"]:
        measured = [right_of(finished / name, PGD_20, Linf(epsilon=point["radius"])) for name in ("one", "plain")]
        pairs = list(zip(*measured, strict=True))
        b, c = pairs.count((True, False)), pairs.count((False, True))
        assert (point["only_first"], point["only_second"], point["n"]) == (b, c, 40)
        assert point["difference"] == (b - c) / 40 == pytest.approx(point["first"] - point["second"])
        low, high = point["ci95"]
        assert low <= point["difference"] <= high and 0 <= point["p"] <= 1
    clean = [sum(right_of(finished / name, Clean(), Linf())) / 40 for name in ("one", "plain")]
    assert (data["natural"]["first"], data["natural"]["second"]) == tuple(clean)
    assert figure.axes[0].get_title() == "one minus plain"


def test_difference_by_autoattack(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustkit.evaluation import AutoAttack
    from robustkit.reporting.paper import difference

    assert difference.ATTACKS["autoattack"] == AutoAttack()
    monkeypatch.setitem(difference.ATTACKS, "autoattack", AutoAttack(attacks=("apgd-ce",)))
    monkeypatch.setattr(difference, "QUARTERS", (4,))
    data, _ = make("difference", few("one", "three", images=6), attack="autoattack")
    assert data["attack"] == "autoattack" and [point["n"] for point in data["points"]] == [6]
    assert data["points"][0]["first"] <= data["natural"]["first"]


def test_inverse_examples(few: Any, finished: Path) -> None:
    data, figure = make("inverse", few("one", "plain", images=5))
    learnt, plain = data["blocks"]
    assert [row["label"] for row in learnt["rows"]] == ["natural", "instance-wise", "example", "universal", "example"]
    assert [row["label"] for row in plain["rows"]] == ["natural", "instance-wise", "example"]
    assert learnt["radius"] == RADIUS and plain["radius"] == EPSILON / 2 and learnt["shape"] == [1, 8, 8]

    def pixels(row: dict[str, Any]) -> Tensor:
        flat = [list(bytes.fromhex(picture)) for picture in row["pictures"]]
        return torch.tensor(flat).float().view(-1, *learnt["shape"]) / 255

    model = robustkit.load(finished / "one")
    natural, instance, example, universal, class_wise = learnt["rows"]
    x, y = pixels(natural), torch.tensor([int(name) for name in learnt["classes"]])
    assert len(set(y.tolist())) == len(y) == 5  # of different classes
    test = Digits().load().test
    rows = [int((test.labels == label).nonzero()[0]) for label in y.tolist()]
    assert torch.equal(x, test.fetch(torch.tensor(rows)).float() / 255)

    def probabilities(images: Tensor) -> list[float]:
        return [float(row.softmax(0)[label]) for row, label in zip(model(images).detach(), y, strict=True)]

    (name,) = (key for key in load_file(finished / "one/checkpoints/last.safetensors") if key.endswith(".z"))
    z = load_file(finished / "one/checkpoints/last.safetensors")[name][y]
    assert natural["probabilities"] == pytest.approx(probabilities(x), abs=1e-4)
    assert class_wise["probabilities"] == pytest.approx(probabilities((x + z).clamp(0, 1)), abs=1e-4)
    assert torch.equal(pixels(universal), (255 * (0.5 + z / (2 * RADIUS))).round() / 255)
    assert torch.equal(pixels(class_wise), (255 * (x + z).clamp(0, 1)).round() / 255)
    assert instance["probabilities"] is None and universal["probabilities"] is None
    assert float((pixels(example) - x).abs().max()) <= RADIUS + 1 / 255
    expected = probabilities(descended(model, x, y, RADIUS, RADIUS / 2, STEPS))
    assert example["probabilities"] == pytest.approx(expected, abs=0.02)
    assert all(e > n for e, n in zip(example["probabilities"], natural["probabilities"], strict=True))
    shown = (pixels(example) - x) / (2 * RADIUS) + 0.5
    assert float((pixels(instance) - shown).abs().max()) < 0.06  # of 8-bit pixels
    assert figure.subfigs[0].axes[0].get_title() == f"{100 * natural['probabilities'][0]:.1f} %"


def test_universal_levels(few: Any, finished: Path) -> None:
    data, _ = make("universal", few("one"))
    (panel,) = data["panels"]
    tensors = load_file(finished / "one/checkpoints/last.safetensors")
    z = next(tensor for name, tensor in tensors.items() if name.endswith(".z"))
    for level in (-1, 0, 1):
        share = float(((z - level * RADIUS).abs() < 1e-6).float().mean())
        assert panel["levels"][str(level)] == pytest.approx(share)
    assert sum(panel["counts"]) == panel["values"] == z.numel() == 10 * 64
    assert panel["counts"][0] == int((z / RADIUS < -0.975).sum())
    assert panel["counts"][20] == int(((z / RADIUS).abs() < 0.025).sum())
    assert panel["levels"]["-1"] + panel["levels"]["1"] > 0.5

    model, test = robustkit.load(finished / "one"), Digits().load().test
    x, y = test.fetch(torch.arange(len(test))).float() / 255, test.labels
    with torch.no_grad():
        before, after = (
            -model(images).log_softmax(dim=1)[torch.arange(len(y)), y] for images in (x, (x + z[y]).clamp(0, 1))
        )
    found = panel["cross-entropy"]
    assert found["images"] == len(test)
    assert found["without"] == pytest.approx(float(before.mean()), rel=1e-4)
    assert found["with"] == pytest.approx(float(after.mean()), rel=1e-4)
    assert found["lower"] == pytest.approx(float((after < before).float().mean()), abs=1 / len(test))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adjusted_radii_are_counted_by_entropy(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ECAS sheet 12: by epoch, whatever radius an image ends with: also where the cycle stands at the smallest one."""
    seen: list[Tensor] = []

    def recorded(logits: Tensor) -> Tensor:
        seen.append(torch.distributions.Categorical(logits=logits).entropy())
        return seen[-1]

    monkeypatch.setattr("robustkit.epsilons.ecas.entropy", recorded)
    recipe = evolve(MADE["cycled"], epochs=3, accumulate=accumulate, evaluation=())
    run(recipe, out=tmp_path / "run", device="cpu", max_steps=5, preflight=False)  # stops within the first epoch
    resume(tmp_path / "run", device="cpu")
    data, figure = make("radii", open_runs([str(tmp_path / "run")], device="cpu"))
    epochs = data["panels"][0]["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert [epoch["cycle"] for epoch in epochs] == [0.05, EPSILON, 0.05] and json.loads(json.dumps(data)) == data
    each = torch.cat(seen).split(len(torch.cat(seen)) // 3)
    assert len(each) == 3
    for epoch, entropies in zip(epochs, each, strict=True):
        raised, lowered = (entropies < 1.8).double().mean(), (entropies > 2.2).double().mean()
        assert (epoch["raised"], epoch["lowered"]) == pytest.approx((float(raised), float(lowered)))
        small = lowered if epoch["cycle"] > 0.05 else 1 - raised
        wanted = {0.05: float(small), EPSILON: 1 - float(small)}
        found = {round(radius, 2): share for radius, share in epoch["radii"]}
        assert found == pytest.approx({radius: share for radius, share in wanted.items() if share})
    assert 0 < epochs[0]["lowered"] < 1 and 0 < epochs[0]["raised"] < 1  # its histogram shows these alone
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars[3:6]] == pytest.approx([100 * epoch["raised"] for epoch in epochs])
    assert [bar.get_y() + bar.get_height() for bar in bars[6:9]] == pytest.approx([100] * 3)


@pytest.fixture
def no_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Measures and balls, instead of what would be found."""
    heard: list[tuple[Any, Any]] = []

    def judged(self: FinishedRun, measure: Any, threat: Any) -> Judged:
        heard.append((measure, threat))
        return Judged("same", "1" * 30 + "0" * 10)

    monkeypatch.setattr(FinishedRun, "judged", judged)
    return heard


def test_budgets_of_several_runs(few: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "SHARES", {"Linf": (0.0, 0.0625, 1.0), "L2": (0.0, 1.0)})
    data, figure = make("budgets", few("one", "plain", images=20))
    assert json.loads(json.dumps(data)) == data
    linf, l2 = data["panels"]
    assert (linf["norm"], linf["epsilon"], l2["norm"], l2["epsilon"]) == ("Linf", EPSILON, "L2", 0.5)
    short, plain = Attacked(key="pgd-40", steps=40, step_size=EPSILON / 8), Attacked(key="pgd-40", steps=40)
    points = {
        "Linf": [(Clean(), Linf()), (short, Linf(epsilon=EPSILON / 16)), (plain, Linf(epsilon=EPSILON))],
        "L2": [(Clean(), Linf()), (plain, L2(epsilon=0.5))],
    }
    for panel in data["panels"]:
        assert [line["run"] for line in panel["lines"]] == ["one", "plain"]
        for line in panel["lines"]:
            right = [sum(right_of(finished / line["run"], *point, count=20)) for point in points[panel["norm"]]]
            assert line["accuracies"] == [count / 20 for count in right] and line["n"] == 20
            assert line["ci95"] == [list(wilson(count, 20)) for count in right]
    assert len(figure.axes) == 2 and len(figure.legends[0].get_texts()) == 2


def test_the_sheet_s_budgets(few: Any, asked: list[tuple[Any, Any]]) -> None:
    """LDAT sheet 12: L-inf radii in steps of max(eps / 4, 1/255), L2 ones of eps / 4; AutoAttack at four of each."""
    (opened,) = few("one")
    opened.recipe = evolve(opened.recipe, threat=Linf(epsilon=8 / 255))
    data, figure = make("budgets", [opened], attack="autoattack")
    pgd = [(measure, ball) for measure, ball in asked if measure.key == "pgd-40"]
    linf = [(round(255 * ball.epsilon, 6), measure) for measure, ball in pgd if ball.norm == "Linf"]
    assert [radius for radius, _ in linf] == [1, 2, 4, 6, 8, 10, 12, 16, 24, 32]
    for radius, measure in linf:
        step = radius / 4 if measure.step_size is None else 255 * measure.step_size
        assert measure.steps == 40 and step == pytest.approx(max(radius / 4, 1))
    l2 = [(ball.epsilon, measure.step_size) for measure, ball in pgd if ball.norm == "L2"]
    assert l2 == [(radius, None) for radius in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)]
    verdicts = [(ball.norm, ball.epsilon) for measure, ball in asked if measure.key == "autoattack"]
    assert verdicts == [*(("Linf", k / 255) for k in (4, 8, 12, 16)), *(("L2", r) for r in (0.25, 0.5, 0.75, 1.0))]
    assert "AutoAttack" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert data["panels"][1]["autoattack"][0]["values"] == [0.25, 0.5, 0.75, 1.0]


def test_the_norm_that_a_run_reports_in_sets_the_radii(few: Any, asked: list[tuple[Any, Any]]) -> None:
    (opened,) = few("one")
    suites = (*opened.recipe.evaluation, Suite(name="l2", threat=L2(epsilon=1.0), measures=(Clean(),)))
    opened.recipe = evolve(opened.recipe, evaluation=suites)
    panels = make("budgets", [opened])[0]["panels"]
    assert [panel["epsilon"] for panel in panels] == [EPSILON, 1.0]
    opened.recipe = evolve(opened.recipe, threat=L2(epsilon=0.25), evaluation=())
    panels = make("budgets", [opened])[0]["panels"]
    assert [panel["epsilon"] for panel in panels] == [8 / 255, 0.25]
    opened.recipe = evolve(opened.recipe, threat=Linf(epsilon=0.5))
    assert make("budgets", [opened])[0]["panels"][0]["lines"][0]["values"][-1] == 1.0  # all of a pixel's range


def test_iterations_without_foolbox(
    few: Any, runs: Path, no_foolbox: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(iterations, "ITERATIONS", (1, 20))
    data, figure = make("iterations", few("one", "plain", images=20))
    (panel,) = data["panels"]
    assert (panel["attack"], panel["norm"], panel["epsilon"]) == ("PGD", "Linf", EPSILON)
    for line in panel["lines"]:
        right = [
            right_of(runs / line["run"], attack, Linf(epsilon=EPSILON), 20)
            for attack in (Attacked(key="pgd-1", steps=1), PGD_20)
        ]
        assert line["accuracies"] == [sum(found) / 20 for found in right] and line["values"] == [1, 20]
    (lacking,) = data["missing"]
    assert "C&W" in lacking and "robustkit[foolbox]" in lacking
    assert figure.legends[0].get_title().get_text().replace("\n", " ") == lacking
    words = ["report", str(runs / "one"), str(runs / "plain"), "--figure", "iterations", "--images", "20"]
    assert main([*words, "--device", "cpu"]) == 0
    assert capsys.readouterr().err.strip().splitlines()[-1] == lacking


def test_the_sheet_s_iterations(few: Any, asked: list[tuple[Any, Any]]) -> None:
    (opened,) = few("one")
    opened.recipe = evolve(opened.recipe, threat=Linf(epsilon=8 / 255))
    data, figure = make("iterations", [opened])
    steps = [1, 5, 10, 20, 40, 60, 80, 100, 200, 500]
    pgd, cw = asked[:10], asked[10:]
    assert [(m.key, m.steps, m.step_size, ball) for m, ball in pgd] == [
        (f"pgd-{count}", count, None, Linf(epsilon=8 / 255)) for count in steps
    ]
    assert [(m.attack, m.steps, ball) for m, ball in cw] == [("cw", count, L2(epsilon=0.5)) for count in steps]
    assert data["missing"] == [] and [axes.get_title() for axes in figure.axes] == ["PGD, Linf 8/255", "C&W, L2 0.5"]


def test_bars_of_what_runs_report(few: Any, runs: Path) -> None:
    data, figure = make("bars", few("one", "three", "again"))
    assert data["measures"] == ["clean", "pgd-20"]  # the hardest that all have
    for bar in data["bars"]:
        results = json.loads((runs / bar["run"] / "results.json").read_text())["last"]
        for key, entry in bar["results"].items():
            assert entry == {name: results[key][name] for name in ("accuracy", "n", "ci95")}
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [100 * bar["results"][key]["accuracy"] for key in data["measures"] for bar in data["bars"]]
    for number, name in enumerate(("one", "three")):
        path = runs / name / "results.json"
        results = json.loads(path.read_text())
        results["last"] |= {"pgd-40": results["last"]["pgd-1"], "autoattack": results["last"]["clean"]}
        if number == 0:  # where not all have it, it is not shown
            del results["last"]["autoattack"]
        path.write_text(json.dumps(results))
    assert make("bars", few("one", "three"))[0]["measures"] == ["clean", "pgd-40"]
    assert make("bars", few("three"))[0]["measures"] == ["clean", "pgd-40", "autoattack"]


def test_features(few: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers anew, by sums over pairs; the vectors are those of the model's head."""
    seen: list[tuple[Any, float]] = []

    def embedded(vectors: Any, perplexity: float) -> Any:
        seen.append((vectors, perplexity))
        return np.arange(2.0 * len(vectors)).reshape(-1, 2)

    monkeypatch.setattr(features, "embedded", embedded)
    data, figure = make("features", few("one"))
    (panel,), ((vectors, perplexity),) = data["panels"], seen
    assert json.loads(json.dumps(data)) == data and vectors.shape == (80, 64)
    assert perplexity == panel["perplexity"] == pytest.approx(79 / 3)
    x, y = images_of(40)
    order = y.argsort(stable=True)
    assert panel["labels"] == y[order].tolist()
    assert panel["natural"]["points"][0] == [0, 1] and panel["attacked"]["points"][0] == [80, 81]
    network = robustkit.load(finished / "one").network
    with torch.no_grad():
        natural = network(x[order]).features
        logits = [network.head(torch.tensor(part).float()).logits for part in np.split(vectors, 2)]
    assert np.allclose(vectors[:40], natural.numpy(), atol=1e-5)
    losses = [torch.nn.functional.cross_entropy(part, y[order], reduction="none") for part in logits]
    assert bool((losses[1] > losses[0]).all())  # those of images that were attacked
    labels = panel["labels"]
    for part, kind in ((vectors[:40], "natural"), (vectors[40:], "attacked")):
        assert panel[kind]["silhouette"] == pytest.approx(silhouette(part, labels), abs=1e-6)
        pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
        within = [math.dist(part[i], part[j]) for i, j in pairs if labels[i] == labels[j]]
        between = [math.dist(part[i], part[j]) for i, j in pairs if labels[i] != labels[j]]
        ratio = (sum(within) / len(within)) / (sum(between) / len(between))
        assert panel[kind]["within / between"] == pytest.approx(ratio)
        if kind == "natural":
            unit = sum(between) / len(between)
    shift = sum(math.dist(vectors[i], vectors[40 + i]) for i in range(40)) / 40
    assert panel["shift"] == pytest.approx(shift) and panel["relative shift"] == pytest.approx(shift / unit)
    assert len(figure.axes[0].collections) == 2
    monkeypatch.setattr(features, "PER_CLASS", 3)
    labels = make("features", few("one", images=50))[0]["panels"][0]["labels"]
    assert max(Counter(labels).values()) == 3 and labels == sorted(labels) and len(set(labels)) == 10
    assert seen[-1][1] == (2 * len(labels) - 1) / 3
    monkeypatch.setattr(features, "PER_CLASS", 100)
    make("features", few("one", images=50))
    assert seen[-1][1] == 30


def silhouette(points: Any, labels: list[int]) -> float:
    """Rousseeuw's (1987), as it is defined; 0 of a point that is alone in its class."""
    values = []
    for number, label in enumerate(labels):
        to: dict[int, list[float]] = {}
        for other, its in enumerate(labels):
            if other != number:
                to.setdefault(its, []).append(math.dist(points[number], points[other]))
        if label not in to:
            values.append(0.0)
            continue
        a = sum(to[label]) / len(to[label])
        b = min(sum(found) / len(found) for its, found in to.items() if its != label)
        values.append((b - a) / max(a, b))
    return sum(values) / len(values)


def test_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sheet has it; equal vectors in, equal points out; what is far apart stays so."""
    import sklearn.manifold

    settings: list[dict[str, Any]] = []

    class Heard(sklearn.manifold.TSNE):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            settings.append(given)
            super().__init__(**given)

    monkeypatch.setattr(sklearn.manifold, "TSNE", Heard)
    vectors = np.random.default_rng(0).normal(size=(24, 5)) + 100 * np.repeat([0, 1], 12)[:, None]
    first = features.embedded(vectors, 5.0)
    assert np.array_equal(first, features.embedded(vectors, 5.0)) and first.shape == (24, 2)
    assert settings[0] == {"perplexity": 5.0, "init": "pca", "random_state": 0}
    nearest = [min((math.dist(p, q), j) for j, q in enumerate(first) if j != i)[1] for i, p in enumerate(first)]
    assert all((i < 12) == (j < 12) for i, j in enumerate(nearest))


@pytest.fixture
def some_cw(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of foolbox's attack one that turns every second image upside down."""

    def examples(self: Any, subject: Any, part: Any, seed: int) -> Iterator[tuple[str, Tensor]]:
        made = part.x.clone()
        made[::2] = made[::2].flip(2)
        yield self.key, made

    monkeypatch.setattr(MinimumNorm, "examples", examples)


def test_likelihoods_and_defence(few: Any, finished: Path, some_cw: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data, figure = make("likelihoods", few("one"))
    (row,) = data["rows"]
    sets = {found["set"]: found for found in row["sets"]}
    assert list(sets) == ["natural", "attack", "cw", "fab", "adaptive"] and data["missing"] == []
    assert json.loads(json.dumps(data)) == data and row["classes"] == 10
    x, y = images_of(40)
    upside = x.clone()
    upside[::2] = upside[::2].flip(2)
    model = robustkit.load(finished / "one")
    for name, images in (("natural", x), ("cw", upside)):
        found = sets[name]
        told = [(row.softmax(0).max().item(), int(row.argmax())) for row in model(images).detach()]
        counted = Counter()
        for side, wanted in (("right", True), ("wrong", False)):
            scores = [score for (score, label), true in zip(told, y.tolist(), strict=True) if (label == true) == wanted]
            assert found[side] == np.histogram(scores, bins=50, range=(0.1, 1))[0].tolist()
            for score in scores:
                counted[(side, "accepted" if score >= 0.6 else "rejected")] += 1
        names = {
            "classified": ("right", "accepted"),
            "detected": ("wrong", "rejected"),
            "falsely accepted": ("wrong", "accepted"),
            "falsely rejected": ("right", "rejected"),
        }
        assert found["fates"] == {fate: counted[key] for fate, key in names.items()}
    for axes, found in zip(figure.axes, row["sets"], strict=True):
        assert sum(found["right"]) + sum(found["wrong"]) == found["n"] == 40
        assert sum(bar.get_width() * bar.get_height() for bar in axes.patches) == pytest.approx(1)
    settings: dict[str, Any] = {"threat": Linf(epsilon=EPSILON), "limit": 40, "batch_size": 64, "preflight": False}
    results = evaluate(model, Digits().load().test, suite=[Detection(threshold=0.6), FAB], **settings)
    for stage, shares in results["detection"].shares.items():
        for fate, count in sets[stage]["fates"].items():
            assert count / 40 == pytest.approx(shares[fate])
    assert sum(sets["fab"]["right"]) / 40 == results["fab"].accuracy < sum(sets["natural"]["right"]) / 40

    for name in ("load", "judge_slices", "opened"):  # the same sets: nothing is left to be measured
        monkeypatch.delattr(f"robustkit.reporting.paper.finished.{name}")
    assert make("likelihoods", few("one"))[0] == data
    data, figure = make("defence", few("one"))
    (panel,) = data["panels"]
    assert [found["set"] for found in panel["sets"]] == list(sets)
    for found in panel["sets"]:
        fates = sets[found["set"]]["fates"]
        defended, right = fates["classified"] + fates["detected"], sum(sets[found["set"]]["right"])
        assert found["defence success"] == {"share": defended / 40, "ci95": list(wilson(defended, 40))}
        assert found["accuracy"] == {"share": right / 40, "ci95": list(wilson(right, 40))}
        assert sum(found["shares"].values()) == pytest.approx(1)
    assert panel["false rejections"] == sets["natural"]["fates"]["falsely rejected"] / 40
    stacks = figure.axes[0].patches[:4]
    assert stacks[0].get_height() == 100 * panel["sets"][0]["accuracy"]["share"]
    assert stacks[2].get_y() + stacks[2].get_height() == pytest.approx(
        100 * panel["sets"][0]["defence success"]["share"]
    )


def test_sets_without_foolbox(few: Any, no_foolbox: None) -> None:
    for name in ("likelihoods", "defence"):
        data, figure = make(name, few("one", "one", images=6))
        parts = data["rows" if name == "likelihoods" else "panels"]
        assert [[found["set"] for found in part["sets"]] for part in parts] == [
            ["natural", "attack", "fab", "adaptive"]
        ] * 2
        (lacking,) = data["missing"]  # once, of both runs
        assert figure.legends[0].get_title().get_text().replace("\n", " ") == lacking


def test_examples_of_a_measure_are_what_it_broke(few: Any) -> None:
    from robustkit.core.strategy import Slice

    (opened,) = few("one")
    x, y = images_of(12)
    with opened.opened(Linf(epsilon=EPSILON)) as (subject, _, _):
        (outcomes,) = FAB.outcomes(subject, Slice(x, y), 0)
        ((name, images),) = FAB.examples(subject, Slice(x, y), 0)
        natural, right = (subject.logits(part).argmax(1) == y for part in (x, images))
    assert name == "fab" and torch.equal(right, outcomes.right)
    moved = (images != x).flatten(1).any(1)
    assert torch.equal(moved, natural & ~right) and 0 < int(moved.sum()) < 12
    assert float((images - x).abs().max()) <= EPSILON + 1e-5


# Measuring once


def test_drawing_again_measures_and_loads_nothing(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"strength": ("one",), "difference": ("one", "plain"), "inverse": ("one",)}
    before = {name: make(name, few(*names, images=12))[0] for name, names in wanted.items()}
    for name in ("load", "judge_slices", "opened"):
        monkeypatch.delattr(f"robustkit.reporting.paper.finished.{name}")
    monkeypatch.delattr("robustkit.datasets.Digits.load")
    assert {name: make(name, few(*names, images=12))[0] for name, names in wanted.items()} == before
    with pytest.raises((AttributeError, NameError)):  # other images are another measurement
        make("strength", few("one", images=13))


def test_what_was_begun_goes_on(few: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(Silent):
        """Ends it after the first slice of the third measure."""

        def __init__(self) -> None:
            self.heard: list[tuple[str, int]] = []

        def measuring(self, checkpoint: str, key: str, news: News) -> None:
            self.heard.append((key, news.done))
            if len({key for key, _ in self.heard}) == 3 and news.done:
                raise KeyboardInterrupt

    first, second = Interrupting(), Silent()
    with pytest.raises(KeyboardInterrupt):
        make("strength", few("one", images=70, display=first))
    assert first.heard[-1] == ("inverse-pgd-20 at 12.8/255", 64)
    assert list((runs / "one" / "evaluation").iterdir())
    assert len(json.loads((runs / "one" / "figures.json").read_text())) == 3
    heard: list[tuple[str, News]] = []
    second.measuring = lambda checkpoint, key, news: heard.append((key, news))  # type: ignore[method-assign]
    monkeypatch.setattr(strength, "QUARTERS", (-4, -3, -2, 4))
    make("strength", few("one", images=70, display=second))
    assert heard[0] == (first.heard[-1][0], News(0, 6, 0, 0))  # the slice that was left
    assert {key for key, _ in heard} == {"inverse-pgd-20 at 12.8/255", "pgd-20 at 25.5/255"}
    assert not (runs / "one" / "evaluation").exists()
    kept = few("one", images=70)[0].judged(strength.Helped(), Linf(epsilon=EPSILON / 2))
    (runs / "one" / "figures.json").write_text("no JSON")
    assert few("one", images=70)[0].judged(strength.Helped(), Linf(epsilon=EPSILON / 2)) == kept


# The command


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(
    name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(iterations, "ITERATIONS", (1, 5))
    single = {"radii": ("cycled",)} | dict.fromkeys(("strength", "universal", "budgets", "likelihoods"), ("one",))
    paths = [str(runs / run) for run in single.get(name, ("one", "three"))]
    images = ["--images", "8"] if "images" in FIGURES[name].takes else []
    assert main(["report", *paths, "--figure", name, *images, "--quiet", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    path = Path(paths[0], "figures", f"{name}.png")
    assert captured.out.strip() == str(path) and captured.err == ""
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def test_files_and_data(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(runs / "one"), "--figure", "universal", "--checkpoint", "best", "--json"]
    for suffix, start in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        out = tmp_path / "new" / f"z{suffix}"
        assert main([*words, "--out", str(out), "--data", str(tmp_path / "z.json")]) == 0
        assert out.read_bytes().startswith(start)
    data = json.loads(capsys.readouterr().out.partition("}\n{")[2].join(("{", "")))
    assert data == json.loads((tmp_path / "z.json").read_text())
    assert (data["figure"], data["checkpoint"]) == ("universal", "best")


def test_unknown_figure_and_help(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["report", str(runs / "one"), "--figure", "strenght"], "did you mean 'strength'")
    assert main(["report", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(entry.shows in out for entry in FIGURES.values())
    assert 2 <= out.partition("examples:\n")[2].count("robustkit report ") <= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plain", "--figure", "universal"], ["plain", "no universal perturbations: its target is none"]),
        (["one", "--figure", "radii"], ["one", "no counts of adjusted radii", "fixed", "epsilon=ecas"]),
        (["plain", "--figure", "overfitting"], ["plain", "no learning curves", "validation.images"]),
        (["plain", "--figure", "strength", "--checkpoint", "best"], ["no checkpoint 'best'", "--checkpoint last"]),
        (["one", "--figure", "strength", "--images", "1"], ["--images", "at least 2"]),
        (["one", "--figure", "strength", "--out", "x.gif"], ["x.gif", ".png"]),
        (["one", "--figure", "sweep"], ["at least two"]),
        (["three", "three", "--figure", "sweep"], ["differ in no setting"]),
        (["three", "again", "--figure", "sweep"], ["differ in no setting"]),
        (["one", "plain", "--figure", "sweep"], ["several settings", "name one", "loss.weight"]),
        (["one", "three", "--figure", "sweep", "--setting", "loss.wieght"], ["did you mean 'loss.weight'"]),
        (["one", "three", "--figure", "sweep", "--setting", "loss"], ["loss is align, no number"]),
        (["one", "--figure", "difference"], ["between two runs, not 1"]),
        (["one", "three", "--figure", "difference", "--attack", "fgsm"], ["--attack", "autoattack"]),
        (["one", "three", "--figure", "sweep", "--attack", "pgd-20"], ["--attack", "means nothing to sweep"]),
        (["one", "--figure", "universal", "--images", "5"], ["--images", "means nothing to universal"]),
        (["one", "--figure", "features", "--images", "1"], ["--images", "too few images: 1", "give more"]),
        (["one", "--figure", "budgets", "--attack", "pgd-20"], ["--attack", "'pgd-20' cannot be added", "autoattack"]),
        (["one", "--figure", "bars", "--images", "5"], ["--images", "means nothing to bars"]),
        (["nowhere", "--figure", "universal"], ["nowhere", "is not a run folder"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(
    words: list[str],
    said: list[str],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    fails(capsys, ["report", *words, "--quiet", "--device", "cpu"], *said)


def test_runs_that_do_not_fit(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not finished; of other data; of another norm; not judged."""
    half, other, l2 = (str(tmp_path / name) for name in ("half", "other", "l2"))
    run(PLAIN, out=half, device="cpu", max_steps=3)
    fails(capsys, ["report", half, "--figure", "universal"], "half", "not finished: 0 of 2", f"robustkit resume {half}")
    small = Synthetic(train=80, test=6, classes=4, size=8, channels=1)
    for folder, recipe in ((other, evolve(PLAIN, data=small)), (l2, evolve(PLAIN, data=small, threat=L2(epsilon=0.5)))):
        run(evolve(recipe, epochs=1, evaluation=()), out=folder, device="cpu", preflight=False)
    one = str(runs / "one")
    for name in ("difference", "sweep", "budgets", "iterations", "bars"):
        fails(capsys, ["report", one, other, "--figure", name], "other", "not on the data", "classes differ")
    fails(capsys, ["report", other, l2, "--figure", "difference"], "l2", "is judged in L2", "Linf")
    both = [other, l2, "--figure", "sweep", "--setting", "threat.epsilon"]
    fails(capsys, ["report", *both], "no clean and robust measure in common", "robustkit eval")
    fails(capsys, ["report", other, "--figure", "bars"], "no clean and robust measure in common", "robustkit eval")
    assert main(["report", l2, "--figure", "strength", "--device", "cpu", "--quiet"]) == 0


def test_the_page_shows_commands_that_exist() -> None:
    page = (Path(__file__).parents[1] / "docs" / "figures.md").read_text(encoding="utf-8")
    named = []
    for line in re.findall(r"^robustkit report .*$", page, re.MULTILINE):
        parser = Parser(prog="robustkit report", description="", examples="")
        report.add_arguments(parser)
        arguments = parser.parse_intermixed_args(shlex.split(line, comments=True)[2:])
        named.append(report._wanted(arguments)[0])
    assert set(named) == set(FIGURES)
    for name in FIGURES:
        assert f"## {name.capitalize()}" in page
