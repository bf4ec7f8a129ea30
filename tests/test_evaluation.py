"""Evaluation: closed forms, the official package as the judge, and independence of everything that must not matter."""

import copy
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from robustkit.core.batch import Output
from robustkit.core.errors import DataError, SpecError
from robustkit.core.model import RobustModel
from robustkit.core.recipe import Suite
from robustkit.core.spec import from_json, to_json
from robustkit.core.strategy import Measure, Outcomes, Slice, Subject
from robustkit.core.world import World
from robustkit.evaluation import (
    CW,
    CW_40,
    PGD_10,
    PGD_20,
    PGD_50_10,
    STANDARD,
    Attacked,
    AutoAttack,
    Clean,
    Detection,
    Result,
    autoattack,
    evaluate,
    fixed_part,
    wilson,
)
from robustkit.evaluation.evaluate import judge_slices, rows_of
from robustkit.evaluation.logits import NOT_FINITE, LogitsOf, judging
from robustkit.evaluation.sources import OwnImages
from robustkit.heads import Linear
from robustkit.objectives import Margin
from robustkit.threats import L2, Linf


@attrs.frozen
class Pictures:
    """Random test images of 8 x 8 pixels."""

    pixels: Tensor
    labels: Tensor
    shape: tuple[int, int, int] = (3, 8, 8)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: Tensor) -> Tensor:
        return self.pixels[index]


def conv_net(classes: int = 10) -> nn.Sequential:
    """A net with batch statistics that are not the initial ones, in training mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes)
    )
    net(torch.rand(64, 3, 8, 8))
    return net


def pictures(model: nn.Module, count: int) -> Pictures:
    """Random images; three in four are labelled as the model sees them."""
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    judge = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = judge(pixels / 255)
    labels = torch.where(torch.arange(count) % 4 == 3, logits.argmin(dim=1), logits.argmax(dim=1))
    return Pictures(pixels, labels)


def world_of(images: Pictures, rank: int = 0, size: int = 1) -> World:
    return World(samples=1, training=1, classes=10, image_shape=images.shape, rank=rank, size=size)


def measured(measure: Measure, model: nn.Module, images: Pictures, limit: int | None = None, **options: Any) -> Result:
    options = {"batch_size": 8, "world": world_of(images), "threat": Linf(epsilon=2 / 255)} | options
    source = OwnImages(images)
    few, _ = source.rows(torch.arange(4))
    with judging(model, options.pop("threat"), few, exact=True) as subject:
        rows = rows_of(measure, limit, len(source))
        result = judge_slices(measure, subject, source, rows, **options)
    assert result is not None
    return result


# --- the linear model, where robustness has a closed form -------------------------------------------------------------


def linear_case(classes: int, count: int = 24) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model, images far from the box, labels of which some are wrong, and the exact radius of each image."""
    torch.manual_seed(classes)
    layer = nn.Linear(16, classes)
    x = 0.3 + 0.4 * torch.rand(count, 1, 4, 4)
    with torch.no_grad():
        layer.bias -= layer(x.flatten(1)).mean(dim=0)  # no class wins everywhere
        logits = layer(x.flatten(1))
        y = torch.where(torch.arange(count) % 6 == 5, logits.argmin(dim=1), logits.argmax(dim=1))
        lengths = (layer.weight[y][:, None] - layer.weight[None]).abs().sum(dim=2)  # |w_y - w_j|_1
        margins = (logits.gather(1, y[:, None]) - logits) / lengths
        radius = margins.scatter(1, y[:, None], torch.inf).amin(dim=1)
    return nn.Sequential(nn.Flatten(), layer), x, y, radius


def exact_epsilon(radius: Tensor) -> float:
    """A radius that half of the rightly classified images resist, well between two images."""
    positive = radius[radius > 0].sort().values
    middle = len(positive) // 2
    assert positive[middle] - positive[middle - 1] > 1e-5
    return float(positive[middle - 1 : middle + 1].mean())


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_linear_model_is_as_robust_as_its_margins_say(classes: int) -> None:
    model, x, y, radius = linear_case(classes)
    epsilon = exact_epsilon(radius)
    assert epsilon < 0.3  # the box stays out of it
    results = evaluate(model, x, y, threat=Linf(epsilon=epsilon))
    robust = (radius > epsilon).tolist()
    assert results["clean"].outcomes == (radius > 0).tolist()
    assert results["autoattack"].outcomes == robust
    assert results["autoattack"].accuracy == sum(robust) / len(robust)
    for key in ("pgd-20", "cw"):  # with several wrong classes, plain ascent may choose the wrong one
        assert all(found or not true for found, true in zip(results[key].outcomes, robust, strict=True))
        if classes == 2:
            assert results[key].outcomes == robust


def test_few_classes_are_said_to_be_few() -> None:
    model, x, y, _ = linear_case(3, count=6)
    found = evaluate(model, x, y, threat=Linf(epsilon=1.0), suite=[AutoAttack()])["autoattack"]
    assert list(found.breakdown) == ["apgd-ce", "fab-t", "square"]
    assert len(found.notes) == 1 and "without apgd-t" in found.notes[0] and "needs 4 classes" in found.notes[0]
    assert json.loads(json.dumps(found.to_json()))["notes"] == list(found.notes)
    model, x, y, _ = linear_case(2, count=6)
    found = evaluate(model, x, y, threat=Linf(epsilon=1.0), suite=[AutoAttack(version="rand")])["autoattack"]
    assert list(found.breakdown) == ["apgd-ce"] and "without apgd-dlr" in found.notes[0]


# --- AutoAttack is the package's --------------------------------------------------------------------------------------


def test_autoattack_finds_what_the_package_finds(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = conv_net().eval()
    images = pictures(model, 16)
    threat = Linf(epsilon=2 / 255)
    state = torch.random.get_rng_state()
    found = measured(AutoAttack(), model, images, threat=threat, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    caplog.set_level(logging.DEBUG, "auto-attack")
    package = pyautoattack.AutoAttack(model, norm="Linf", eps=threat.epsilon, seed=3, version="standard")
    _, predicted = package.run_standard_evaluation(images.pixels / 255, images.labels, batch_size=250)
    assert found.outcomes == (predicted == images.labels).tolist()
    said = [message for message in caplog.messages if message.startswith("robust accuracy after")]
    for message, (part, accuracy) in zip(said, found.breakdown.items(), strict=True):
        assert message.startswith(f"robust accuracy after {part.upper()}: {accuracy:.2%} ")
    values = list(found.breakdown.values())
    assert values == sorted(values, reverse=True) and values[-1] == found.accuracy
    assert 0 < found.accuracy < values[0] < 0.75 and found.notes == ()


def test_slices_of_autoattack_are_calls_of_their_own() -> None:
    model = conv_net().eval()
    images = pictures(model, 12)
    threat = L2(epsilon=2.0)  # nothing survives, so that Square is skipped

    def tracer(*_: Any) -> None:
        """A debugger's, say."""

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        both = measured(AutoAttack(slice_size=6), model, images, threat=threat)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    x, y = images.pixels / 255, images.labels
    with judging(model, threat, x, exact=True) as subject:
        *_, one = AutoAttack(slice_size=6).outcomes(subject, Slice(x[:6], y[:6], 0), 0)
    assert both.outcomes[:6] == one.right.tolist() and both.accuracy == 0
    assert both.breakdown.keys() == one.breakdown.keys() == {"apgd-ce", "apgd-t", "fab-t", "square"}


@pytest.mark.parametrize("lie", ["outside the ball", "outside the box", "not broken", "nan"])
def test_autoattack_is_not_taken_at_its_word(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_net().eval()
    images = pictures(model, 4)

    class Liar:
        attacks_to_run = ["apgd-ce"]

        def run_standard_evaluation(self, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
            shift = {"outside the ball": 0.5 - x, "outside the box": -x - 0.01, "nan": x * torch.nan}
            return x + shift.get(lie, torch.zeros_like(x)), y + 1

    monkeypatch.setattr(autoattack, "_package", lambda *_: Liar())
    monkeypatch.setattr(autoattack, "_fit", lambda package, attacks, classes: (["apgd-ce"], []))
    epsilon = 1.0 if lie in ("outside the box", "nan") else 0.01
    found = measured(AutoAttack(), model, images, threat=Linf(epsilon=epsilon))
    assert found.accuracy == found.breakdown["apgd-ce"] == 0.75
    assert len(found.notes) == 1 and "did not" not in found.notes[0] and "stood our check" in found.notes[0]


class Steps(nn.Module):
    """A linear model whose logits are rounded: no gradient anywhere, though it is not robust at all."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(200 * self.inner(x))


def test_masked_gradients_are_noted() -> None:
    model, x, y, radius = linear_case(4, count=16)
    threat = Linf(epsilon=float(radius.amax()))
    found = evaluate(Steps(model), x, y, threat=threat, suite=[AutoAttack(slice_size=8)])["autoattack"]
    assert any("points with zero gradient" in note for note in found.notes)
    assert any("Square Attack has decreased the robust accuracy" in note for note in found.notes)
    assert len(found.notes) == 2 and not any("flags_doc" in note for note in found.notes)
    assert found.accuracy < found.breakdown["fab-t"]


# --- the measures of our own ------------------------------------------------------------------------------------------


def test_restarts_only_lower_accuracy() -> None:
    model = conv_net()
    images = pictures(model, 64)
    weak = {"steps": 1, "step_size": 0.5 / 255}
    once = measured(Attacked(key="a", **weak), model, images)
    often = measured(Attacked(key="a", **weak, restarts=8), model, images)
    assert often.accuracy < once.accuracy <= 0.75
    assert all(first or not later for first, later in zip(once.outcomes, often.outcomes, strict=True))


def test_attacks_work_in_any_grad_mode() -> None:
    model = conv_net()
    images = pictures(model, 16)
    x, y = images.pixels / 255, images.labels
    expected = evaluate(model, x, y, threat=Linf(), suite=[PGD_20])["pgd-20"].outcomes
    with torch.no_grad():
        assert evaluate(model, x, y, threat=Linf(), suite=[PGD_20])["pgd-20"].outcomes == expected
        with judging(model, Linf(), x) as subject:
            (found,) = PGD_20.outcomes(subject, Slice(x, y), 0)
        right = found.right
        assert right.dtype == torch.bool and not right.requires_grad
    with torch.inference_mode():
        assert evaluate(model, x.clone(), y, threat=Linf(), suite=[PGD_20])["pgd-20"].outcomes == expected


def test_nan_is_not_class_zero() -> None:
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.constant_(broken[1].bias, torch.nan)
    images = Pictures(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    assert measured(Clean(), broken, images).accuracy == 0


class Undefined(nn.Module):
    """Linear, and class 0 for images as they are; NaN, which argmax takes for class 0, or infinite, for any other."""

    def __init__(self, clean: Tensor, value: float) -> None:
        super().__init__()
        self.clean, self.value = clean, value
        self.weight = nn.Parameter(torch.tensor([[1.0], [-1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        logits = (x.flatten(1).sum(dim=1, keepdim=True) + 1) @ self.weight.T
        known = (x.flatten(1)[:, None] == self.clean.flatten(1)).all(dim=2).any(dim=1)
        return torch.where(known[:, None], logits, logits * self.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "measure", [PGD_10, CW, AutoAttack(), Detection(threshold=0.6, steps=2)], ids=lambda measure: measure.key
)
def test_what_is_not_finite_is_never_robust_silently(measure: Measure, value: float) -> None:
    """Only attacks come where it is not."""
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    results = evaluate(
        Undefined(x, value), x, torch.zeros(6, dtype=torch.int64), threat=Linf(), suite=[Clean(), measure]
    )
    assert results["clean"].accuracy == 1 and results["clean"].notes == ()
    result = results[measure.key]
    assert NOT_FINITE in result.notes and any(found.evidence == NOT_FINITE for found in results.findings)
    if measure in (PGD_10, CW) and value != value:
        assert result.accuracy == 0


def test_the_ready_made_measures() -> None:
    assert [m.key for m in (PGD_10, PGD_20, PGD_50_10, CW, CW_40)] == ["pgd-10", "pgd-20", "pgd-50-10", "cw", "cw-40"]
    assert (CW_40.steps, CW_40.step_size, CW_40.objective) == (40, 0.01, Margin())
    assert (PGD_50_10.steps, PGD_50_10.restarts) == (50, 10)
    assert Suite() == STANDARD
    for measure in (*STANDARD.measures, CW_40, AutoAttack(version="plus", images=1000)):
        assert from_json(Measure, to_json(measure)) == measure
    for wrong in ({"version": "custom"}, {"slice_size": 0}, {"images": 0}):
        with pytest.raises(SpecError):
            AutoAttack(**wrong)


# --- the driver -------------------------------------------------------------------------------------------------------


def test_wilson_by_hand() -> None:
    low, high = wilson(50, 100)  # 1.959964^2 = 3.841459; (50 + 1.920729) / 103.841459 -+ 0.096163
    assert low == pytest.approx(0.403832, abs=1e-6) and high == pytest.approx(0.596168, abs=1e-6)
    low, high = wilson(0, 10)  # 0 and z^2 / (10 + z^2)
    assert low == 0 and high == pytest.approx(3.841459 / 13.841459, abs=1e-6)
    low, high = wilson(10, 10)
    assert low == pytest.approx(10 / 13.841459, abs=1e-6) and high == pytest.approx(1)
    assert wilson(0, 0) == (0, 1)


def test_fixed_parts_are_nested() -> None:
    small, large = fixed_part(1000, 100), fixed_part(1000, 400)
    assert torch.equal(small, large[:100]) and torch.equal(small, fixed_part(1000, 100))
    assert len(set(large.tolist())) == 400 and not torch.equal(small, torch.arange(100))
    assert torch.equal(fixed_part(5, None), torch.arange(5)) and torch.equal(fixed_part(5, 9), torch.arange(5))


def test_limits_and_progress() -> None:
    model = conv_net()
    images = pictures(model, 40)
    whole = measured(Clean(), model, images)
    told: list[tuple[int, int, int]] = []
    part = measured(Clean(images=30), model, images, 20, watch=lambda _, news: told.append(news[:2] + news[3:4]))
    assert part.n == 20 and part.outcomes == [whole.outcomes[row] for row in fixed_part(40, 20).tolist()]
    assert measured(Clean(images=10), model, images, 20).n == 10
    assert [(done, total) for done, total, _ in told] == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert told[-1][2] == sum(part.outcomes)
    assert part.ci95 == wilson(sum(part.outcomes), 20) and part.accuracy == sum(part.outcomes) / 20
    assert set(part.to_json()) == {"accuracy", "n", "ci95", "seconds", "path"} and part.path == "float32, as given"


@attrs.frozen
class Parts:
    """A measure with a breakdown and a note for each slice."""

    key: str = "parts"

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        right = part.y % 2 == part.number % 2
        breakdown = {"first": len(part.x) / 7, "last": float(right.float().mean())}
        yield Outcomes(right, breakdown, ("all say", f"slice {part.number}"))


class Exchange:
    """Collectives between threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.held = threading.Barrier(size, timeout=60), [torch.empty(0)] * size

    def swap(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.held[rank] = tensor.clone()
        self.barrier.wait()
        held = list(self.held)
        self.barrier.wait()
        return held


@attrs.frozen(kw_only=True)
class ThreadWorld(World):
    exchange: Exchange

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.exchange.swap(self.rank, tensor)).sum(dim=0))

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.exchange.swap(self.rank, rows))


@pytest.mark.parametrize(("measure", "ranks"), [(Clean(), 2), (PGD_10, 2), (Parts(), 2), (Parts(), 6)])
def test_outcomes_do_not_depend_on_ranks(measure: Measure, ranks: int) -> None:
    model = conv_net()
    images = pictures(model, 36)  # five slices, the last of four: with six ranks one has nothing to do
    alone = measured(measure, model, images)
    exchange = Exchange(ranks)
    results: dict[int, Result] = {}

    def work(rank: int) -> None:
        world = ThreadWorld(
            samples=1, training=1, classes=10, image_shape=images.shape, rank=rank, size=ranks, exchange=exchange
        )
        results[rank] = measured(measure, copy.deepcopy(model), images, world=world)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(ranks):
        assert attrs.evolve(results[rank], seconds=0) == attrs.evolve(alone, seconds=0)
    if isinstance(measure, Parts):
        assert alone.breakdown["first"] == pytest.approx((4 * 8 * 8 / 7 + 4 * 4 / 7) / 36)
        assert alone.breakdown["last"] == pytest.approx(alone.accuracy)
        assert len(alone.notes) == 6 and alone.notes[0] == "all say"


def test_the_model_is_left_as_it_was_found() -> None:
    model = conv_net()
    model.train()
    model[1].eval()  # a mixture of modes
    model[4].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    images = pictures(model, 8)
    results = evaluate(model, images.pixels / 255, images.labels, threat=Linf(epsilon=1.0))
    assert list(results) == ["clean", "pgd-20", "cw", "autoattack"] and results["autoattack"].accuracy == 0
    assert [module.training for module in model] == [True, False, True, True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[4].bias.requires_grad and model[0].bias.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None


def test_our_own_models_are_judged_alike_by_either_path() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 9))
    model = RobustModel(backbone, Linear().build(9, 4), None)
    model.train()
    images = pictures(LogitsOf(model), 8)
    x, y = images.pixels / 255, images.labels
    assert isinstance(model(x), Output)
    plain = evaluate(model, x, y, threat=Linf(epsilon=1.0), batch_size=4)
    for measure in STANDARD.measures:
        found = evaluate(model, images, threat=Linf(epsilon=1.0), suite=[measure], batch_size=4)[measure.key]
        assert found.outcomes == plain[measure.key].outcomes and model.training


@contextmanager
def refused(*words: str) -> Any:
    with pytest.raises(DataError) as caught:
        yield
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_what_cannot_be_judged_is_refused() -> None:
    model = conv_net()
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    with refused("[0, 1]", "-2.5", "1.75", "normalisation inside the model"):
        evaluate(model, x.index_fill(0, torch.tensor(0), -2.5).index_fill(0, torch.tensor(1), 1.75), y, threat=Linf())
    with refused("[0, 1]", "nan"):
        evaluate(model, x * torch.nan, y, threat=Linf())
    with refused("images", "uint8", "255"):
        evaluate(model, (x * 255).to(torch.uint8), y, threat=Linf())
    with refused("label 10 of image 2", "0..9"):
        evaluate(model, x, torch.tensor([0, 1, 10, 3]), threat=Linf())
    with refused("label -1 of image 0"):
        evaluate(model, x, torch.tensor([-1, 1, 1, 3]), threat=Linf())
    with refused("labels", "(4, 10)"):
        evaluate(model, x, torch.zeros(4, 10), threat=Linf())
    with refused("model", "(B, K)"):
        evaluate(nn.Flatten(0), x, y, threat=Linf())
    with pytest.raises(SpecError, match="'clean'"):
        evaluate(model, x, y, threat=Linf(), suite=[Clean(), Clean(images=2)])
    assert model.training
