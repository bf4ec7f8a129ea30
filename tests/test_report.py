"""Figures of papers: their data computed anew another way, files that are there, and measuring once."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from robustkit.epsilons import ECAS
from robustkit.evaluation import PGD_20, Attacked, Clean, fixed_part, wilson
from robustkit.evaluation.evaluate import News
from robustkit.losses import Align, CrossEntropy
from robustkit.reporting.paper import FIGURES, make, strength
from robustkit.reporting.paper.finished import FinishedRun, open_runs
from robustkit.reporting.paper.inverse import STEPS
from robustkit.runs import Silent
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
    from robustkit.reporting.paper.finished import Judged

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
def test_every_figure_is_drawn(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = {"strength": ("one",), "universal": ("one",), "radii": ("cycled",)}
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
    for name in ("difference", "sweep"):
        fails(capsys, ["report", one, other, "--figure", name], "other", "not on the data", "classes differ")
    fails(capsys, ["report", other, l2, "--figure", "difference"], "l2", "is judged in L2", "Linf")
    both = [other, l2, "--figure", "sweep", "--setting", "threat.epsilon"]
    fails(capsys, ["report", *both], "no clean and robust measure in common", "robustkit eval")
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
