"""Curves: closed forms of a linear model, numbers by hand, and pictures that are there."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustkit.core.errors import DataError, SpecError, UserError
from robustkit.evaluation import CW, PGD_10, Attacked, AutoAttack, Result, evaluate, fixed_part, wilson
from robustkit.evaluation.curves import RESTARTS, SHARES, STEPS, ClassAccuracy, by_class, curve, per_class
from robustkit.reporting.curves import CURVES, classes_figure, draw_curves
from robustkit.threats import L2, Linf

PNG = b"\x89PNG\r\n\x1a\n"


def linear_case(count: int = 40) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes, images far from the box, some labels wrong, and the exact L-inf radius of each image."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 2)
    x = 0.3 + 0.4 * torch.rand(count, 1, 4, 4)
    with torch.no_grad():
        layer.bias -= layer(x.flatten(1)).mean(dim=0)
        logits = layer(x.flatten(1))
        y = torch.where(torch.arange(count) % 6 == 5, logits.argmin(dim=1), logits.argmax(dim=1))
        other = logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])
        radius = -other.squeeze(1) / (layer.weight[0] - layer.weight[1]).abs().sum()
    return nn.Sequential(nn.Flatten(), layer), x, y, radius


def kinked_net() -> tuple[nn.Module, Tensor, Tensor]:
    """A net on which a weak attack leaves something to be found."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    return net, x, y


def test_the_curve_of_a_linear_model_is_known() -> None:
    model, x, y, radius = linear_case()
    positive = radius[radius > 0].sort().values
    between = [float((low + high) / 2) for low, high in zip(positive[:-1:6], positive[1::6], strict=True)]
    values = [0.0, *between, float(positive[-1]) * 1.1]
    assert values[-1] < 0.3  # the box stays out of it
    found = curve(model, x, y, along="epsilon", values=values[::-1])
    assert found.values == tuple(values) and found.n == len(x)
    exact = [float((radius > value).double().mean()) for value in values]
    assert found.accuracies == pytest.approx(exact)
    assert list(found.accuracies) == sorted(found.accuracies, reverse=True) and found.accuracies[-1] == 0
    assert found.ci95 == tuple(wilson(round(share * len(x)), len(x)) for share in exact)
    assert (found.along, found.key, found.norm, found.epsilon) == ("epsilon", "pgd-20", "Linf", 8 / 255)
    assert json.loads(json.dumps(found.to_json()))["accuracies"] == list(found.accuracies)


def test_every_point_is_the_measure_itself() -> None:
    model, x, y = kinked_net()
    threat = Linf(epsilon=4 / 255)

    def measured(measure: Any, epsilon: float = threat.epsilon) -> float:
        return evaluate(model, x, y, threat=Linf(epsilon=epsilon), suite=[measure], seed=3)[measure.key].accuracy

    weak = Attacked(key="weak", steps=2, step_size=1 / 255)
    found = curve(model, x, y, along="steps", values=(0, 1, 5), attack=weak, threat=threat, seed=3)
    expected = [measured(Attacked(key="weak", steps=steps, step_size=1 / 255)) for steps in (1, 5)]
    assert found.accuracies == (1.0, *expected) and expected[0] > expected[1]
    found = curve(model, x, y, along="epsilon", values=(2 / 255, 6 / 255), attack=weak, threat=threat, seed=3)
    assert found.accuracies == (measured(weak, 2 / 255), measured(weak, 6 / 255))

    found = curve(model, x, y, along="restarts", values=(0, 1, 2, 6), attack=weak, threat=threat, seed=3)
    fresh = [measured(Attacked(key="weak", steps=2, step_size=1 / 255, restarts=count)) for count in (1, 2, 6)]
    assert found.accuracies == pytest.approx([1.0, *fresh]) and fresh[0] > fresh[2]
    assert found.values == (0, 1, 2, 6)


def test_values_that_are_taken_unasked() -> None:
    model, x, y = kinked_net()
    quick = Attacked(key="quick", steps=1, images=10)
    found = curve(model, x, y, attack=quick)
    assert found.values == tuple(share * 8 / 255 for share in SHARES) and found.n == 10
    assert curve(model, x, y, attack=quick, threat=Linf(epsilon=0.3), limit=5).values[-1] == pytest.approx(0.9)
    assert curve(model, x, y, attack=quick, threat=L2(epsilon=0.5), limit=5).values[-1] == 4.0
    steps, restarts = (curve(model, x, y, along=along, attack=quick, limit=5) for along in ("steps", "restarts"))
    assert steps.values == STEPS and restarts.values == RESTARTS and steps.n == restarts.n == 5


def test_a_watcher_hears_every_point() -> None:
    model, x, y = kinked_net()
    heard: list[tuple[float, float]] = []
    found = curve(model, x, y, along="steps", values=(1, 0), watch=lambda *news: heard.append(news))
    assert heard == list(zip(found.values, found.accuracies, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"along": "step"}, "did you mean 'steps'"),
        ({"values": ()}, "there are no values"),
        ({"values": (-0.1,)}, "radii of at least 0, not -0.1"),
        ({"values": (float("nan"),)}, "not nan"),
        ({"along": "steps", "values": (1.5,)}, "whole numbers of at least 0, not 1.5"),
        ({"attack": AutoAttack()}, "AutoAttack has no epsilon to vary"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    model, x, y = kinked_net()
    with pytest.raises(UserError, match=words):
        curve(model, x, y, **options)


def test_radii_beyond_the_range_are_refused() -> None:
    model, x, y = kinked_net()
    with pytest.raises(SpecError, match="at most 1"):
        curve(model, x, y, values=(2.0,))


def result_of(outcomes: list[bool]) -> Result:
    n = len(outcomes)
    return Result("pgd-20", sum(outcomes) / n, n, (0.0, 1.0), 0.0, {}, (), outcomes)


def test_classes_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    found = per_class(result_of([True, True, False, True, False, False, True]), labels, ("a", "b", "c", "d"))
    assert found == (
        ClassAccuracy("a", 3, 4),
        ClassAccuracy("b", 0, 2),
        ClassAccuracy("c", 1, 1),
        ClassAccuracy("d", 0, 0),
    )
    assert found[0].accuracy == 0.75 and found[0].ci95 == wilson(3, 4) and found[3].ci95 == (0, 1)
    assert found[1].to_json() == {"name": "b", "accuracy": 0.0, "n": 2, "ci95": list(wilson(0, 2))}
    rows = fixed_part(7, 3)
    part = per_class(result_of([True, False, True]), labels, ("a", "b", "c"))
    for number, entry in enumerate(part):
        mine = labels[rows] == number
        assert (entry.n, entry.right) == (int(mine.sum()), int((mine & torch.tensor([True, False, True])).sum()))
    with pytest.raises(DataError, match="label 2"):
        per_class(result_of([True] * 7), labels, ("a", "b"))


def test_classes_of_a_model() -> None:
    model, x, y, radius = linear_case()
    epsilon = float(radius[radius > 0].median()) * 1.0001
    samples = [(x[row], int(y[row])) for row in range(len(x))]
    for images, labels in ((x, y), (samples, None)):
        found = by_class(model, images, labels, names=("left", "right"), attack=CW, threat=Linf(epsilon=epsilon))
        assert list(found) == ["clean", "cw"]
        for number, (clean, robust) in enumerate(zip(*found.values(), strict=True)):
            mine = radius[y == number]
            assert (clean.right, robust.right) == (int((mine > 0).sum()), int((mine > epsilon).sum()))
            assert clean.n == robust.n == len(mine)


def test_models_are_left_as_found() -> None:
    model, x, y = kinked_net()
    model.train()
    model[1].weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    curve(model, x, y, along="restarts", values=(2,), attack=PGD_10)
    assert model.training and not model[1].weight.requires_grad and model[3].weight.requires_grad
    assert torch.equal(state, torch.random.get_rng_state())


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures(tmp_path: Path) -> None:
    model, x, y = kinked_net()
    said: list[str] = []
    options: dict[str, Any] = {"threat": Linf(), "names": ("a", "b", "c", "d"), "limit": 12, "say": said.append}
    paths = draw_curves(tmp_path / "run", model, x, y, wanted=("epsilon", "classes"), **options)
    assert paths == [tmp_path / "run" / "figures" / f"curve-{name}.png" for name in ("epsilon", "classes")]
    first = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert set(first) == {"epsilon", "classes"} and set(first["classes"]) == {"clean", "pgd-20"}
    assert first["epsilon"]["n"] == 12 == sum(entry["n"] for entry in first["classes"]["clean"])
    paths += draw_curves(tmp_path / "run", model, x, y, wanted=("steps", "restarts", "steps"), **options)
    kept = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert set(kept) == set(CURVES) and kept["epsilon"] == first["epsilon"]
    for path in paths:
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert len(said) == 4 and said[0].startswith("epsilon: 100.0 % at 0/255, ") and "8/255" in said[0]
    assert said[1].startswith("classes: clean from 100.0 %") and "pgd-20 from" in said[1]

    options["threat"] = L2(epsilon=0.5)
    (path,) = draw_curves(tmp_path / "l2", model, x, y, wanted=("epsilon",), **options)
    assert path.read_bytes().startswith(PNG) and " at 0.5, " in said[-1]
    (tmp_path / "l2" / "curves.json").write_text("no JSON")
    draw_curves(tmp_path / "l2", model, x, y, wanted=("classes",), **options)
    assert set(json.loads((tmp_path / "l2" / "curves.json").read_text())) == {"classes"}


def test_curves_that_do_not_exist(tmp_path: Path) -> None:
    model, x, y = kinked_net()
    with pytest.raises(UserError, match=r"'epsilons'.*epsilon, steps, restarts, classes"):
        draw_curves(tmp_path / "run", model, x, y, threat=Linf(), names=(), wanted=("steps", "epsilons"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "columns"), [(2, 1), (10, 1), (50, 1), (100, 2), (101, 3)])
def test_every_class_has_its_bar(count: int, columns: int) -> None:
    clean = tuple(ClassAccuracy(f"class {number}", 90, 100) for number in range(count))
    robust = tuple(ClassAccuracy(f"class {number}", (7 * number) % 90, 100) for number in range(count))
    figure = classes_figure({"clean": clean, "pgd-20": robust}, Linf())
    assert len(figure.axes) == columns
    shown = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
    assert sorted(shown) == sorted(f"class {number} (100)" for number in range(count))
    widths = [bar.get_width() for axes in figure.axes for bar in list(axes.containers[1])[::-1]]
    assert widths == sorted(widths, reverse=True)


def test_the_page_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "curves.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        (tmp_path / "example.py").write_text(block, encoding="utf-8")
        runpy.run_path(str(tmp_path / "example.py"))
    for name in CURVES:
        assert f"| `{name}` |" in page
