"""DeepFool, C&W and DDN: closed forms, foolbox called by hand, and what counts as broken."""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit import Suite, run
from robustkit.cli.main import main
from robustkit.core.errors import SpecError, UserError
from robustkit.core.recipe import result_key
from robustkit.core.spec import flatten, from_json, to_json
from robustkit.core.strategy import Measure, Slice
from robustkit.evaluation import (
    CARLINI_WAGNER,
    DDN,
    DEEPFOOL,
    LDAT,
    LDAT_L2,
    PGD_10,
    SUITES,
    Clean,
    MinimumNorm,
    evaluate,
    minimum_norm,
)
from robustkit.evaluation.logits import judging
from robustkit.evaluation.suites import some_of, suites_of
from robustkit.published import load
from robustkit.testing import tiny_recipe
from robustkit.threats import L1, L2, Linf

needs_foolbox = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs foolbox")
LENGTHS = torch.tensor([0.25, 0.3, 0.35, 0.4, 0.45, 0.5])
CASES = [(DEEPFOOL, Linf), (DEEPFOOL, L2), (CARLINI_WAGNER, L2), (DDN, L2)]
IDS = ["deepfool-linf", "deepfool-l2", "cw", "ddn"]


def linear_case(norm: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes, z_0 - z_1 = v (x - 1/2), images at `LENGTHS` from the boundary; each one's distance in that norm."""
    torch.manual_seed(0)
    v = torch.where(torch.rand(16) < 0.5, -1, 1) * (0.5 + torch.rand(16) / 2)
    layer = nn.Linear(16, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([v, torch.zeros(16)]))
        layer.bias.copy_(torch.stack([-v.sum() / 2, torch.tensor(0.0)]))
    x = (0.5 + LENGTHS[:, None] * v / v.norm()).reshape(-1, 1, 4, 4)
    assert x.min() > 0.1 and x.max() < 0.9  # the box stays out of it
    distances = LENGTHS * (1.0 if norm == "L2" else float(v.norm() / v.abs().sum()))
    return nn.Sequential(nn.Flatten(), layer), x, torch.zeros(len(x), dtype=torch.int64), distances


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    net(torch.rand(64, 3, 8, 8))
    return net


def conv_case() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Random images; three in four are labelled as the model sees them."""
    model, x = conv_net(), torch.rand(24, 3, 8, 8)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(x)
    return model, x, torch.where(torch.arange(24) % 4 == 3, logits.argmin(dim=1), logits.argmax(dim=1))


def outcomes(measure: MinimumNorm, model: nn.Module, x: Tensor, y: Tensor, threat: Any) -> list[bool]:
    return evaluate(model, x, y, threat=threat, suite=[measure], preflight=False)[measure.key].outcomes


# What is found


@needs_foolbox
@pytest.mark.parametrize(("measure", "ball"), CASES, ids=IDS)
def test_the_distances_of_a_linear_model(measure: MinimumNorm, ball: Any) -> None:
    """DeepFool to its overshoot of 2 %, the others to 10 %: images nearer than epsilon are broken, and no others."""
    slack = 0.025 if measure.attack == "deepfool" else 0.1
    model, x, y, distances = linear_case(ball().norm)
    for row, distance in enumerate(distances.tolist()):
        below = outcomes(measure, model, x, y, ball(epsilon=distance * 0.999))
        above = outcomes(measure, model, x, y, ball(epsilon=distance * (1 + slack)))
        assert below == [other >= row for other in range(len(x))]
        assert above == [other > row for other in range(len(x))]


@needs_foolbox
@pytest.mark.parametrize(("measure", "ball"), CASES, ids=IDS)
def test_it_is_foolbox_called_by_hand(measure: MinimumNorm, ball: Any) -> None:
    import foolbox

    attacks = {
        "deepfool Linf": foolbox.attacks.LinfDeepFoolAttack(steps=40),
        "deepfool L2": foolbox.attacks.L2DeepFoolAttack(steps=40),
        "cw L2": foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=9, steps=40, abort_early=False),
        "ddn L2": foolbox.attacks.DDNAttack(steps=40),
    }
    model, x, y = conv_case()
    by_hand = foolbox.PyTorchModel(copy.deepcopy(model).eval(), bounds=(0, 1), device="cpu")
    clean = by_hand(x).argmax(dim=1) == y
    attack = attacks[f"{measure.attack} {ball().norm}"]
    x_adv, _, wrong = attack(by_hand, x[clean], foolbox.criteria.Misclassification(y[clean]), epsilons=None)
    sizes = (x_adv - x[clean]).flatten(1).norm(p=2 if ball().norm == "L2" else torch.inf, dim=1)
    assert wrong.all()
    ordered = sizes.sort().values[4:14]  # DDN's lengths are much the same: between the two that differ most
    widest = int((ordered[1:] - ordered[:-1]).argmax())
    middle = ordered[widest : widest + 2].mean().item()
    expected = clean.clone()
    expected[clean] = sizes > middle
    found = evaluate(model, x, y, threat=ball(epsilon=middle), suite=[measure], exact=True)[measure.key]
    assert found.outcomes == expected.tolist() and 4 <= sum(found.outcomes) <= 13


@needs_foolbox
def test_nothing_else_changes(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = conv_case()
    state, handlers = torch.random.get_rng_state(), list(logging.root.handlers)
    before = copy.deepcopy(model.state_dict())
    first, second = (outcomes(DDN, model, x, y, L2(epsilon=0.1)) for _ in range(2))
    outcomes(DEEPFOOL, model, x, y, L2(epsilon=0.1))
    assert first == second and torch.equal(state, torch.random.get_rng_state()) and model.training
    assert logging.root.handlers == handlers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@needs_foolbox
@pytest.mark.parametrize(
    "measure", [MinimumNorm(steps=3), MinimumNorm(attack="cw", steps=3), MinimumNorm(attack="ddn")]
)
def test_the_passes_are_counted(measure: MinimumNorm) -> None:
    model, x, y = conv_case()
    forwards = []

    class Counted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            forwards.append(len(images))
            return model(images)

    with judging(Counted().eval(), L2(epsilon=0.1), x, exact=True) as subject:
        model.eval()
        list(measure.outcomes(subject, Slice(x[:1], y[:1]), 0))
    declared = measure.passes("L2", 10)
    assert len(forwards) == declared.forward if measure.attack != "deepfool" else 4 < len(forwards) <= declared.forward
    assert declared.input_backward == {"deepfool": 27, "cw": 27, "ddn": 40}[measure.attack]
    assert MinimumNorm(steps=3).passes("Linf", 2).input_backward == 3


# What counts


def found_as(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """An attack that finds what `found(x)` says, in place of foolbox."""
    stub = SimpleNamespace(
        PyTorchModel=lambda module, bounds, device: module,
        criteria=SimpleNamespace(Misclassification=lambda y: y),
    )

    def attack(model: nn.Module, x: Tensor, y: Tensor, epsilons: None) -> tuple[Tensor, None, None]:
        return found(x), None, None

    monkeypatch.setattr(minimum_norm, "_foolbox", lambda: stub)
    monkeypatch.setattr(MinimumNorm, "_in", lambda self, threat: attack)


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (lambda x: 0.5 - 0.02 * (x - 0.5), True),  # just across the boundary, at 1.02 times the distance
        (lambda x: 0.5 - 0.04 * (x - 0.5), False),  # further than epsilon, though a clipped one would be across, too
        (lambda x: 0.5 + 0.01 * (x - 0.5), False),  # near enough, and right
        (lambda x: x * torch.nan, False),
        (lambda x: x, False),
    ],
)
def test_broken_is_misclassified_and_near(found: Any, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, distances = linear_case("L2")
    x, y, distance = x[2:3], y[2:3], float(distances[2])
    found_as(monkeypatch, found)
    assert outcomes(DEEPFOOL, model, x, y, L2(epsilon=1.03 * distance)) == [not broken]


def test_points_outside_the_box_are_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black and white pixels can only move inwards: what lies outside is no image."""
    model, x, y, _ = linear_case("L2")
    corner = (x[:1] > 0.5).float()
    found_as(monkeypatch, lambda images: images + 3 * (images - 0.5))
    assert outcomes(DEEPFOOL, model, corner, y[:1], L2(epsilon=100.0)) == [True]
    found_as(monkeypatch, lambda images: images - 3 * (images - 0.5))
    assert outcomes(DEEPFOOL, model, corner, y[:1], L2(epsilon=4.0)) == [False]  # all 16 pixels from 0 to 1 or back


def test_what_is_wrong_is_not_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _ = linear_case("L2")
    seen = []
    found_as(monkeypatch, lambda images: seen.append(len(images)) or images)
    assert outcomes(DEEPFOOL, model, x, torch.tensor([0, 1, 0, 1, 1, 0]), L2()) == [True, False] * 2 + [False, True]
    assert outcomes(DEEPFOOL, model, x, 1 - y, L2()) == [False] * 6 and seen == [3]


def test_examples_are_what_broke_the_model_or_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrored, every image is wrong, at twice its distance from the boundary: 0.5, 0.6, 0.7, 0.8, 0.9 and 1."""
    model, x, _, _ = linear_case("L2")
    y = torch.tensor([0, 1, 0, 0, 0, 0])  # of these the second is wrong as it is
    found_as(monkeypatch, lambda images: 1 - images)
    with judging(model, L2(epsilon=0.75), x) as subject:
        ((name, images),) = CARLINI_WAGNER.examples(subject, Slice(x, y), 0)
    assert name == "cw" and torch.equal(images, torch.cat([1 - x[:1], x[1:2], 1 - x[2:3], x[3:]]))


# What is missing


@pytest.fixture
def no_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)


def test_without_foolbox_nothing_is_judged(no_foolbox: None) -> None:
    model, x, y = conv_case()
    told: list[str] = []
    with pytest.raises(UserError, match=r"foolbox: is not installed.*pip install foolbox"):
        evaluate(model, x, y, suite="ldat", watch=lambda key, _: told.append(key))
    assert told == []
    some = some_of(suites_of("ldat"), ["clean", "pgd-40", "l2/pgd-40"], None)
    found = evaluate(model, x, y, threat=Linf(epsilon=0.01), suite=some)
    assert list(found) == ["clean", "pgd-40", "l2/pgd-40"] and found.threat == Linf(epsilon=0.01)


def test_a_foolbox_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "foolbox.py").write_text("raise ImportError('no git here')")
    monkeypatch.delitem(sys.modules, "foolbox", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    model, x, y = conv_case()
    with pytest.raises(UserError, match="foolbox: cannot be imported: no git here"):
        evaluate(model, x, y, suite=[DEEPFOOL])


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", stub)


def test_runs_are_refused_before_they_train(
    no_foolbox: None, no_figures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = tiny_recipe(
        epochs=1, evaluation=(Suite(measures=(Clean(),)), Suite(name="l2", threat=L2(), measures=(DDN,)))
    )
    with pytest.raises(UserError, match="pip install foolbox"):
        run(asks, out=tmp_path / "run", device="cpu", preflight=False)
    assert not (tmp_path / "run").exists()
    plain = tiny_recipe(epochs=1, evaluation=(Suite(measures=(Clean(),)),))
    run(plain, out=tmp_path / "run", device="cpu", preflight=False)
    before = (tmp_path / "run" / "results.json").read_text()
    words = ["eval", str(tmp_path / "run"), "--suite", "ldat", "--device", "cpu", "--quiet"]
    assert main([*words, "--measures", "clean,l2/ddn"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: foolbox: ") and "pip install foolbox" in line
    assert (tmp_path / "run" / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("measure", "threat"), [(CARLINI_WAGNER, Linf()), (DDN, Linf()), (DEEPFOOL, L1()), (DDN, L1())]
)
def test_balls_that_an_attack_does_not_know(measure: MinimumNorm, threat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimum_norm, "_foolbox", lambda: SimpleNamespace(attacks=None))
    model, x, y = conv_case()
    with pytest.raises(UserError, match=f"measure '{measure.key}': there is no {measure.attack} for {threat.norm}"):
        evaluate(model, x, y, threat=threat, suite=[measure])


# The suite


@pytest.mark.parametrize("number", [1, 2])
def test_the_suite_has_every_column_of_the_paper(number: int) -> None:
    assert SUITES["ldat"] == (LDAT, LDAT_L2) and LDAT.threat is None and LDAT_L2.threat == L2(epsilon=0.5)
    measures = {result_key(suite, measure): (suite, measure) for suite in SUITES["ldat"] for measure in suite.measures}
    columns = load(f"ldat-table{number}").columns
    assert {column.key for column in columns} == measures.keys() - {"autoattack", "l2/autoattack", "l2/ddn"}
    for column in columns:
        suite, measure = measures[column.key]
        facts = flatten(to_json(measure) | {"threat": to_json(suite.threat or Linf(epsilon=8 / 255))})
        for path, expected in column.settings.items():
            assert facts[path] == (pytest.approx(expected) if isinstance(expected, float) else expected)


def test_suites_are_judged_in_one_go() -> None:
    model, x, y = conv_case()
    told: list[str] = []
    two = (Suite(measures=(Clean(), PGD_10)), Suite(name="l2", threat=L2(epsilon=0.05), measures=(PGD_10,), images=9))
    found = evaluate(model, x, y, threat=Linf(epsilon=0.01), suite=two, watch=lambda key, _: told.append(key))
    assert list(found) == ["clean", "pgd-10", "l2/pgd-10"] == list(dict.fromkeys(told))
    assert found["l2/pgd-10"].n == 9 and found["pgd-10"].n == 24
    alone = evaluate(model, x, y, threat=L2(epsilon=0.05), suite=[PGD_10], limit=9)
    assert alone["pgd-10"].outcomes == found["l2/pgd-10"].outcomes
    alone = evaluate(model, x, y, threat=Linf(epsilon=0.01), suite=[PGD_10])
    assert alone["pgd-10"].outcomes == found["pgd-10"].outcomes
    with pytest.raises(SpecError, match="two measures report as 'l2/pgd-10'"):
        evaluate(model, x, y, suite=(two[1], two[1]))


def test_settings_are_checked() -> None:
    assert [measure.key for measure in (DEEPFOOL, CARLINI_WAGNER, DDN)] == ["deepfool", "cw", "ddn"]
    for measure in (DEEPFOOL, CARLINI_WAGNER, MinimumNorm(key="ddn-100", attack="ddn", steps=100, images=10)):
        assert from_json(Measure, to_json(measure)) == measure
    for wrong in ({"attack": "fab"}, {"steps": 0}, {"images": 0}):
        with pytest.raises(SpecError):
            MinimumNorm(**wrong)


@needs_foolbox
@pytest.mark.parametrize(("measure", "ball"), CASES, ids=IDS)
def test_gone_on_with_after_a_stop(measure: MinimumNorm, ball: Any, tmp_path: Path) -> None:
    model, x, y = conv_case()
    options = {"threat": ball(epsilon=0.02), "suite": [measure], "batch_size": 6, "preflight": False}
    whole = evaluate(model, x, y, **options)[measure.key]
    stops = iter([False, True])
    assert len(evaluate(model, x, y, folder=tmp_path, should_stop=lambda: next(stops), **options)) == 0
    told: list[int] = []
    again = evaluate(model, x, y, folder=tmp_path, watch=lambda _, news: told.append(news.total), **options)
    assert again[measure.key].outcomes == whole.outcomes and set(told) == {18}
