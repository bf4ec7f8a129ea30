"""Preflight: every fault is planted once and found, honest models pass, and nothing is left changed."""

from __future__ import annotations

import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import Model, Suite, runs
from robustkit.cli.main import main
from robustkit.core.errors import UserError
from robustkit.core.parts import Parts, assemble
from robustkit.core.recipe import Recipe
from robustkit.core.spec import setting, spec
from robustkit.core.world import World
from robustkit.datasets import Digits
from robustkit.display import Silent
from robustkit.evaluation import CW, PGD_20, PGD_50_10, AutoAttack, Clean, Finding
from robustkit.evaluation.preflight import CHECKS, costs, lines, passes_of, preflight, preflight_run, refuse, span
from robustkit.evaluation.preflight.images import epsilon
from robustkit.evaluation.preflight.model import pretrained
from robustkit.targets import Universal
from robustkit.testing import tiny_recipe
from robustkit.threats import L1, L2, Linf
from robustkit.weights import AWP

EPSILON = 0.1


def digits() -> tuple[Tensor, Tensor]:
    data = Digits().load().train
    return data.fetch(torch.arange(600)).float() / 255, data.labels[:600]


def net(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def taught(model: nn.Module, x: Tensor, y: Tensor, steps: int = 60, lr: float = 0.01) -> nn.Module:
    """The model after a few steps of Adam, in training mode."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    for step in range(steps):
        rows = torch.arange(64) * 7 % 600 + step
        rows %= len(x)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Tensor, Tensor]:
    """A model that has learnt the digits, and the digits."""
    x, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return taught(net(), x, y), x, y


class Around(nn.Module):
    """A model, with something done before and after it."""

    def __init__(self, inner: nn.Module, before: Callable[[Tensor], Tensor] | None = None, after: Any = None) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before or (lambda x: x), after or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


class Normalize(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def found(findings: tuple[Finding, ...], check: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.check == check)
    return finding


def says(finding: Finding, verdict: str, *words: str) -> None:
    assert finding.verdict == verdict, finding
    for word in words:
        assert word in f"{finding.evidence}; {finding.remedy}", finding


def amiss(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict != "ok"]


# --- honest models ----------------------------------------------------------------------------------------------------


def test_a_model_that_has_learnt_passes(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    findings = preflight(model, x, y, threat=Linf(epsilon=EPSILON), measures=(Clean(), PGD_20), classes=10)
    assert amiss(findings) == []
    says(found(findings, "modes"), "ok", "judged in eval mode")
    assert found(findings, "evaluation time").data["parts"].keys() == {"clean", "pgd-20"}
    assert all(isinstance(finding.to_json(), dict) for finding in findings)
    for threat in (L2(epsilon=1.0), L1(epsilon=6.0)):
        assert amiss(preflight(model, x, y, threat=threat)) == []
    samples = [(x[row], int(y[row])) for row in range(80)]
    assert amiss(preflight(model, samples, threat=Linf(epsilon=EPSILON))) == []
    assert amiss(preflight(model, Digits().load().test, threat=Linf(epsilon=EPSILON))) == []


def test_a_model_that_normalises_inside_passes(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    _, x, y = known
    torch.manual_seed(1)
    model = taught(nn.Sequential(Normalize(0.3, 0.37), net()), x, y)
    findings = preflight(model, x, y, threat=Linf(epsilon=EPSILON))
    assert amiss(findings) == []
    says(found(findings, "normalisation"), "ok", "'0' brings the images to mean")


def test_a_transformer_passes() -> None:
    x, y = digits()
    x = F.interpolate(x, size=32).expand(-1, 3, -1, -1).contiguous()
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=32, num_heads=2, num_classes=10
    )
    assert {finding.check for finding in amiss(preflight(model, x, y, threat=Linf()))} <= {"accuracy"}
    taught(model, x, y, steps=80, lr=0.003)
    findings = preflight(model, x, y, threat=Linf(), measures=(PGD_20,))
    assert amiss(findings) == [] and found(findings, "accuracy").data["right"] > 6


def parts_of(recipe: Recipe) -> Parts:
    data = recipe.data.load()
    world = World(samples=len(data.train), training=0, classes=len(data.classes), image_shape=data.train.shape)
    return assemble(recipe, data, world)


@pytest.mark.parametrize(
    "recipe",
    [
        tiny_recipe(),
        tiny_recipe(evaluation=(Suite(), Suite(name="l2", threat=L2(epsilon=0.5)))),
        tiny_recipe(threat=L2(epsilon=0.5), batch_size=16, accumulate=2),
        tiny_recipe(model=Model(backbone="resnet18_cifar", normalization="cifar10"), data=tiny_recipe().data),
    ],
    ids=["tiny", "suites", "l2", "resnet"],
)
def test_runs_that_are_in_order_begin_without_a_word(recipe: Recipe) -> None:
    if recipe.model.normalization != "none":
        recipe = attrs.evolve(recipe, data=attrs.evolve(recipe.data, channels=3))
    findings = preflight_run(parts_of(recipe))
    assert amiss(findings) == []
    assert found(findings, "training time").data["seconds"] > 0
    assert len(lines(findings)) == 1 and "training predicted" in lines(findings)[0]


def test_a_head_that_starts_at_zero_is_no_fault() -> None:
    parts = parts_of(tiny_recipe())
    for parameter in parts.model.head.parameters():
        nn.init.zeros_(parameter)
    findings = preflight_run(parts)
    says(found(findings, "gradient"), "ok", "the features do")
    assert [finding.check for finding in amiss(findings)] == ["one step"]
    says(found(findings, "one step"), "skipped")
    parts.model.backbone = Around(parts.model.backbone, lambda x: x.detach())
    says(found(preflight_run(parts), "gradient"), "failure", "no gradient")


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (lambda x: 255 * x, "failure", ["to 255", "divide 8-bit pixels by 255"]),
        (lambda x: (255 * x).byte(), "failure", ["divide 8-bit pixels by 255"]),
        (lambda x: x / 255, "failure", ["once, not twice"]),
        (lambda x: x / 16, "warning", ["scale pixels to [0, 1]"]),
        (lambda x: (x - 0.3) / 0.35, "failure", ["normalised already", "inside the model"]),
        (lambda x: 2 * x - 1, "failure", ["[-1, 1]", "(x + 1) / 2"]),
        (lambda x: x - 3e-8, "failure", ["rounding", "clamp"]),
        (lambda x: x * torch.nan, "failure", ["NaN"]),
        (lambda x: 0 * x + 0.5, "failure", ["all pixels are 0.5"]),
        (lambda x: 1000 * x, "failure", ["scale pixels"]),
    ],
)
def test_pixels_on_another_scale(
    known: tuple[nn.Module, Tensor, Tensor], change: Callable[[Tensor], Tensor], verdict: str, words: list[str]
) -> None:
    model, x, y = known
    findings = preflight(model, change(x), y, threat=Linf(epsilon=EPSILON))
    says(found(findings, "input range"), verdict, *words)
    if verdict == "failure":
        assert {finding.check for finding in findings} == {"input range", "epsilon"}
        with pytest.raises(UserError, match="preflight: input range: "):
            refuse(findings)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.rand(4, 8, 8), torch.zeros(4, dtype=torch.int64), "must be (N, C, H, W)"),
        (torch.rand(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "must be (4,)"),
        (torch.rand(4, 1, 8, 8), torch.rand(4), "whole numbers"),
        (torch.rand(4, 1, 8, 8), None, "labels are missing"),
        ([(2 * torch.ones(1, 8, 8), 0)], None, "divide 8-bit pixels by 255"),
    ],
)
def test_what_are_no_images(x: Any, y: Any, words: str) -> None:
    (finding,) = preflight(net(), x, y, threat=Linf())
    assert finding.check == "images"
    says(finding, "failure", words)


@spec
class Pixels:
    """L-inf of a maker who counts in pixels."""

    epsilon: float = setting(default=8.0, above=0)
    norm = "Linf"


@pytest.mark.parametrize(
    ("threat", "channels", "verdict", "words"),
    [
        (Linf(epsilon=8 / 255), 3, "ok", ["8/255"]),
        (Linf(epsilon=0.031), 3, "ok", ["not 8/255"]),
        (Linf(epsilon=0.3), 1, "ok", []),  # usual on MNIST
        (Linf(epsilon=0.3), 3, "warning", ["did you mean 8/255"]),
        (Linf(epsilon=0.6), 1, "warning", ["8/255 = 0.0314"]),
        (Linf(epsilon=8 / 255 / 255), 3, "warning", ["less than the rounding", "divided by 255 twice"]),
        (Pixels(), 3, "failure", ["did you mean 8/255?"]),
        (L2(epsilon=0.5), 3, "ok", []),
        (L2(epsilon=128 / 255), 3, "ok", []),
        (L2(epsilon=2.0), 1, "ok", []),
        (L2(epsilon=8 / 255), 3, "warning", ["another norm"]),
        (L2(epsilon=8.0), 3, "warning", ["0.5 is usual"]),
        (L1(epsilon=12), 3, "ok", []),
        (L1(epsilon=0.5), 3, "warning", ["12 is usual"]),
        (L1(epsilon=1000), 3, "warning", ["12 is usual"]),
    ],
)
def test_radii(threat: Any, channels: int, verdict: str, words: list[str]) -> None:
    says(epsilon(threat, torch.zeros(1, channels, 32, 32)), verdict, *words)


def test_usual_radii_grow_with_images() -> None:
    assert epsilon(L2(epsilon=3.0), torch.zeros(1, 3, 224, 224)).verdict == "ok"  # ImageNet's
    assert epsilon(L2(epsilon=3.0), torch.zeros(1, 3, 32, 32)).verdict == "warning"
    assert epsilon(L1(epsilon=255.0), torch.zeros(1, 3, 224, 224)).verdict == "ok"


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "verdict", "words"),
    [
        (lambda z: z.softmax(dim=1), "failure", ["probabilities", "softmax off"]),
        (lambda z: z.log_softmax(dim=1), "ok", ["log-probabilities"]),
        (torch.sigmoid, "warning", ["sigmoid"]),
        (lambda z: z * torch.nan, "failure", ["NaN", "weights"]),
        (lambda z: z.sum(), "failure", ["(B, K)"]),
        (lambda z: {"logits": z}, "failure", ["does not return logits"]),
        (lambda z: 1 / 0, "failure", ["cannot be called", "division by zero"]),
    ],
)
def test_what_are_no_logits(
    known: tuple[nn.Module, Tensor, Tensor], after: Any, verdict: str, words: list[str]
) -> None:
    model, x, y = known
    findings = preflight(Around(model, after=after), x, y, threat=Linf(epsilon=EPSILON))
    says(found(findings, "logits"), verdict, *words)
    assert (len(findings) == 3) == (verdict == "failure")


def test_images_that_do_not_fit_the_model(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    findings = preflight(known[0], torch.rand(9, 3, 8, 8), torch.zeros(9, dtype=torch.int64), threat=Linf())
    says(found(findings, "logits"), "failure", "cannot take images of 3 x 8 x 8")
    x, y = known[1:]
    findings = preflight(net().double(), x, y, threat=Linf())
    says(found(findings, "logits"), "failure", "torch.float64", "model.float()")


def test_models_of_many_kinds(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    for other in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert amiss(preflight(other, x, y, threat=threat)) == []
    assert amiss(preflight(model.train(), x[:1], y[:1], threat=threat)) == []
    assert amiss(preflight(model, x.numpy(), y.tolist(), threat=threat)) == []
    with torch.inference_mode():
        assert amiss(preflight(model, x.clone(), y.clone(), threat=threat)) == []


def test_labels(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    says(found(preflight(model, x, y + 1, threat=threat), "labels"), "failure", "label 10", "10 logits")
    kept = y != 3
    says(found(preflight(model, x[kept], y[kept], threat=threat), "labels"), "warning", "9 of 10 classes")
    assert found(preflight(model, x[:40][kept[:40]], y[:40][kept[:40]], threat=threat), "labels").verdict == "ok"
    says(found(preflight(model, x, y, threat=threat, classes=12), "labels"), "failure", "10 logits", "12 classes")
    says(found(preflight(model, x, y, threat=threat, classes=8), "labels"), "warning", "8 classes")


def test_accuracy(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    order = torch.tensor([5, 0, 7, 1, 9, 2, 8, 3, 6, 4])
    says(found(preflight(model, x, order[y], threat=threat), "accuracy"), "warning", "in its order")
    fewer = y < 9
    says(found(preflight(model, x[fewer], y[fewer] + 1, threat=threat), "accuracy"), "warning", "count from 1")
    more = y > 0
    says(found(preflight(model, x[more], y[more] - 1, threat=threat), "accuracy"), "warning", "model's classes")
    one = preflight(model, x[:1], (y[:1] + 1) % 10, threat=threat)
    assert found(one, "accuracy").verdict == "ok"  # of one image nothing can be said


@pytest.mark.parametrize("answer", [3, 5])
def test_one_answer_to_all_images_is_no_shift(answer: int) -> None:
    """Of 32 images 10 are of class 4, beside the one answer, and 1 of that: an accident, no counting from 1."""
    x, y = torch.rand(32, 1, 8, 8), torch.tensor([4] * 10 + [answer] + [0, 1, 2, 6, 7, 8, 9] * 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].bias.copy_(50 * F.one_hot(torch.tensor(answer), 10))
    finding = found(preflight(model, x, y, threat=Linf()), "accuracy")
    says(finding, "warning", "1 of 32", "is the model trained")
    assert "shifted" not in finding.evidence


def test_normalisation(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    torch.manual_seed(2)
    outside = Around(net(), lambda images: (images - 1).relu())  # blind to what lies in [0, 1]
    taught(outside, (x - 0.1307) / 0.3081, y)
    finding = found(preflight(outside, x, y, threat=threat), "normalisation")
    says(finding, "warning", "expect normalised images", "mnist")

    twice = nn.Sequential(Normalize(0.13, 0.3), nn.Sequential(Normalize(0.13, 0.3), model))
    finding = found(preflight(twice, x, y, threat=threat), "normalisation")
    says(finding, "warning", "'1.0'", "normalised already", "once, inside")
    ensemble = Around(nn.Identity(), after=None)
    ensemble.members = nn.ModuleList([nn.Sequential(Normalize(0.13, 0.3), model) for _ in range(2)])
    ensemble.after = lambda images: sum(member(images) for member in ensemble.members)
    assert found(preflight(ensemble, x, y, threat=threat), "normalisation").verdict == "ok"  # beside, not behind

    units = nn.Sequential(Normalize(33.3, 78.6), model)
    finding = found(preflight(units, x, y, threat=threat), "normalisation")
    says(finding, "warning", "standard deviation 0.0", "of images in [0, 1]")


def test_modes(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    torch.manual_seed(3)
    says(found(preflight(net(), x, y, threat=threat), "modes"), "warning", "fresh model", "buffers")

    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> nn.Dropout:
            return super().train(True)

    stays = nn.Sequential(nn.Sequential(Stubborn(0.3)), model)
    findings = preflight(stays, x, y, threat=threat)
    says(found(findings, "modes"), "warning", "'0.0' stays in training mode")
    says(found(findings, "determinism"), "warning", "between two forwards", "version='rand'")

    forgetful = taught(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), net()), x, y, steps=20)
    findings = preflight(forgetful, x, y, threat=threat)
    says(found(findings, "modes"), "warning", "1 of 2 batch normalisations keep no statistics")
    says(found(findings, "determinism"), "warning", "other images in the batch")


def kinked(z: Tensor) -> Tensor:
    """Its gradient is infinite at 0."""
    return z + (z - z.detach()).sqrt()


def backwards(x: Tensor) -> Tensor:
    """The images, with a gradient that points the other way."""
    return 2 * x.detach() - x


@pytest.mark.parametrize(
    ("before", "after", "check", "verdict", "words"),
    [
        (None, lambda z: (20 * z).round(), "gradient", "failure", ["zero on all 8 images", "rounding"]),
        (lambda x: x.detach(), None, "gradient", "failure", ["no gradient reaches"]),
        (None, kinked, "gradient", "failure", ["NaN or infinite on 8 of 8", "sqrt"]),
        (None, lambda z: 200 * z, "gradient", "warning", ["saturated", "CW"]),
        (backwards, None, "one step", "warning", ["on 0 of 8", "too high"]),
    ],
)
def test_gradients(
    known: tuple[nn.Module, Tensor, Tensor],
    before: Any,
    after: Any,
    check: str,
    verdict: str,
    words: list[str],
) -> None:
    model, x, y = known
    findings = preflight(Around(model, before, after), x, y, threat=Linf(epsilon=EPSILON))
    says(found(findings, check), verdict, *words)


def test_some_images_without_a_gradient(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    half = Around(model, lambda images: torch.cat([images[::2].detach(), images[1::2]])[torch.arange(len(images))])
    findings = preflight(half, x, y, threat=Linf(epsilon=EPSILON))
    says(found(findings, "gradient"), "warning", "zero on 4 of 8")


class Loose(Linf):
    """A ball that lets images out."""

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        return (x_adv + 0.01).clamp(0, 1)


class Far(Linf):
    """A ball of which `project` knows nothing."""

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        return x_adv if (epsilon == 0).all() else (x + 20 * (x_adv - x)).clamp(0, 1)


def test_threat_models_that_do_not_hold(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    says(found(preflight(model, x, y, threat=Loose(epsilon=EPSILON)), "radius 0"), "failure", "Loose", "0.02")
    says(found(preflight(model, x, y, threat=Far(epsilon=EPSILON)), "one step"), "failure", "Far.project")


def test_a_check_that_breaks_is_skipped(
    known: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = known
    monkeypatch.setitem(CHECKS, "modes", lambda case: 1 / 0)
    findings = preflight(model, x, y, threat=Linf(epsilon=EPSILON))
    says(found(findings, "modes"), "skipped", "ZeroDivisionError: division by zero")
    refuse(findings)
    assert "1 skipped" in lines(findings)[-1]


# --- memory and time --------------------------------------------------------------------------------------------------


def test_memory(known: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = known
    threat = Linf(epsilon=EPSILON)
    finding = found(preflight(model, x, y, threat=threat, batch_size=64), "memory")
    double = found(preflight(model, x, y, threat=threat, batch_size=128), "memory")
    assert double.data["need"] == pytest.approx(2 * finding.data["need"], rel=0.01)
    assert finding.data["need"] > 64 * 12 * 64 * 4  # the first layer's output alone
    monkeypatch.setattr(costs, "free_memory", lambda device: 1000.0)
    says(found(preflight(model, x, y, threat=threat), "memory"), "warning", "1 MiB free", "smaller batch_size")
    says(found(preflight_run(parts_of(tiny_recipe())), "memory"), "warning", "accumulate=2")
    monkeypatch.setattr(costs, "free_memory", lambda device: None)
    assert found(preflight(model, x, y, threat=threat), "memory").verdict == "ok"


def test_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(images: Tensor) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(costs, "free_memory", lambda device: 2.0**30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    class OnGpu:
        device = SimpleNamespace(type="cuda")

        def __len__(self) -> int:
            return 4

        def repeat(self, *counts: int) -> Tensor:
            return torch.zeros(4, 1, 8, 8)

    finding = costs.fits(2.0**31, work, OnGpu(), 4, "a smaller batch_size")  # type: ignore[arg-type]
    says(finding, "failure", "out of memory: about 2.0 GiB for 4 images at once, 1.0 GiB free", "smaller batch_size")


def test_this_machine_has_memory() -> None:
    free = costs.free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    assert costs.free_memory(torch.device("meta")) is None


def test_passes_by_hand() -> None:
    def units(*arguments: Any) -> tuple[int, int]:
        passes = passes_of(*arguments)
        assert passes is not None
        return passes.forward, passes.input_backward

    assert units(Clean(), "Linf", 10) == (1, 0)
    assert units(PGD_20, "Linf", 10) == units(CW, "Linf", 10) == (22, 20)
    assert units(PGD_50_10, "Linf", 10) == (1 + 275 + 10, 275)  # nine restarts see half of the images
    assert units(AutoAttack(), "Linf", 10) == (1 + 100 + (900 + 1800 + 5000) // 2, 100 + (900 + 900) // 2)
    assert units(AutoAttack(), "Linf", 3)[1] == 100 + (200 + 200) // 2
    assert units(AutoAttack(attacks=("square",)), "Linf", 10) == (5001, 0)
    assert units(AutoAttack(version="rand"), "Linf", 10)[1] == 3000
    assert passes_of(SimpleNamespace(key="mine"), "Linf", 10) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01, "1 s"), (89, "89 s"), (180, "3 min"), (3 * 3600, "3 h"), (10 * 86400, "10 days")]
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_days_are_worth_a_word(known: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = known
    monkeypatch.setattr(costs, "seconds_per_image", lambda work, x, batch_size: 0.01)
    measures = (Clean(), AutoAttack(), AutoAttack(key="part", images=100))
    findings = preflight(model, x, y, threat=Linf(epsilon=EPSILON), measures=measures, test_images=10_000)
    finding = found(findings, "evaluation time")
    says(finding, "warning", "days", "limit the images")
    assert finding.data["parts"]["autoattack"] == pytest.approx(100 * finding.data["parts"]["part"])

    recipe = tiny_recipe(evaluation=(Suite(measures=(AutoAttack(images=100_000),)),))
    findings = preflight_run(parts_of(recipe))
    training = found(findings, "training time")  # 4 epochs of 58 images: 2 + 2 passes of the attack, 1 + 1 of the loss
    assert training.data["steps"] == pytest.approx(4 * 58 * 0.01 * 3)
    assert training.data["validation"] == pytest.approx(4 * 18 * 0.01 * 4)
    assert found(findings, "evaluation time").verdict == "ok"  # the test set has 16 images

    monkeypatch.setattr(costs, "seconds_per_image", lambda work, x, batch_size: 5000.0)
    findings = preflight_run(parts_of(recipe))
    says(found(findings, "training time"), "warning", "days", "--smoke")
    brief = Finding(check="training time", verdict="ok", evidence="", data={"seconds": 4000.0})
    judged = Finding(check="evaluation time", verdict="ok", evidence="long", data={"seconds": 5000.0})
    says(costs.worth(brief, judged), "warning", "more than training")
    assert costs.worth(brief, attrs.evolve(judged, data={"seconds": 3000.0})).verdict == "ok"


def test_pretrained_weights_expect_their_own_images() -> None:
    parts = parts_of(tiny_recipe())
    assert pretrained(parts).verdict == "ok"
    known_to_timm = {"mean": (0.485,), "std": (0.229,)}
    parts.model.backbone.pretrained_cfg = known_to_timm  # type: ignore[assignment]
    parts.recipe = attrs.evolve(parts.recipe, model=attrs.evolve(parts.recipe.model, pretrained=True))
    says(pretrained(parts), "warning", "mean 0.485", "model.normalization=none", "normalization=imagenet")
    parts.model.normalize = Normalize(0, 1)  # type: ignore[assignment]
    parts.model.normalize.mean, parts.model.normalize.std = torch.tensor([0.5]), torch.tensor([0.2])  # type: ignore
    assert pretrained(parts).verdict == "ok"


# --- nothing changes --------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws from every global generator, and counts its calls in a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) + 1e-6 * (torch.rand(()) + random.random() + np.random.rand())


def test_models_are_left_as_found(known: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = known
    noisy = Noisy(model).train()
    noisy.inner[3].eval()
    noisy.inner[0].weight.requires_grad_(False)
    noisy.inner[0].weight.grad, noisy.inner[3].weight.grad = None, torch.ones_like(noisy.inner[3].weight)
    try:
        state = {name: tensor.clone() for name, tensor in noisy.state_dict().items()}
        modes = [part.training for part in noisy.modules()]
        draws = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        hooks = [len(part._forward_hooks) for part in noisy.modules()]
        findings = preflight(noisy, x, y, threat=Linf(epsilon=EPSILON), measures=(Clean(), AutoAttack()))
        assert amiss(findings) == []
        assert all(torch.equal(tensor, state[name]) for name, tensor in noisy.state_dict().items())
        assert [part.training for part in noisy.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), draws[0]) and random.getstate() == draws[1]
        assert (np.random.get_state()[1] == draws[2]).all()
        assert [len(part._forward_hooks) for part in noisy.modules()] == hooks
        assert not noisy.inner[0].weight.requires_grad and noisy.inner[3].weight.requires_grad
        assert noisy.inner[0].weight.grad is None and bool((noisy.inner[3].weight.grad == 1).all())
    finally:
        model.train().requires_grad_(True)
        noisy.inner[3].weight.grad = None


@pytest.mark.parametrize(
    "recipe", [tiny_recipe(), tiny_recipe(target=Universal(radius=0.02), weights=AWP())], ids=["plain", "rich"]
)
def test_a_run_is_the_same_with_and_without(recipe: Recipe, tmp_path: Path) -> None:
    said: list[str] = []

    class Ear(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    runs.run(recipe, out=tmp_path / "with", device="cpu", display=Ear())
    runs.run(recipe, out=tmp_path / "without", device="cpu", preflight=False)
    weights = [(tmp_path / name / "checkpoints" / "last.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert sum("preflight: " in line for line in said) == 1
    said.clear()
    runs.resume(tmp_path / "with", device="cpu", display=Ear())
    assert said == []


def test_runs_leave_their_parts_as_found() -> None:
    parts = parts_of(tiny_recipe(target=None))
    state = {name: tensor.clone() for name, tensor in parts.tensors().items()}
    modes = [part.training for part in parts.model.modules()]
    draws = torch.random.get_rng_state()
    preflight_run(parts)
    assert all(torch.equal(tensor, state[name]) for name, tensor in parts.tensors().items())
    assert [part.training for part in parts.model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parts.model.parameters())


# --- runs and the command line ----------------------------------------------------------------------------------------

RECIPE = '''"""Images that are divided once too often before they are stored."""

from robustkit import Model, Recipe, Validation, registry, spec
from robustkit.attacks import PGD
from robustkit.data.images import Data, InMemory
from robustkit.datasets import Synthetic
from robustkit.losses import CrossEntropy
from robustkit.schedules import Constant
from robustkit.threats import Linf


@registry("dataset").register("dim")
@spec
class Dim(Synthetic):
    """Synthetic, but for its brightness."""

    def load(self) -> Data:
        data = Synthetic.load(self)
        dim = [InMemory(part.pixels // 64, part.labels) for part in (data.train, data.test)]
        return Data(*dim, data.classes)


recipe = Recipe(
    data=Dim(train=56, test=12, classes=4, size=8, channels=1),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=8 / 255),
    attack=PGD(steps=1),
    loss=CrossEntropy(),
    schedule=Constant(),
    epochs=1,
    batch_size=16,
    validation=Validation(images=8, train_images=0, attack=None),
    evaluation=(),
)
'''


def test_a_run_that_means_nothing_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dim.py").write_text(RECIPE)
    assert main(["run", "dim.py", "--out", "dim", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: preflight: input range: ") and "not twice" in line
    assert not Path("dim").exists()
    assert main(["run", "dim.py", "--out", "dim", "--device", "cpu", "--no-preflight", "--quiet"]) == 0


def test_the_page_s_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "preflight.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        path = tmp_path / "example.py"
        path.write_text(block, encoding="utf-8")
        runpy.run_path(str(path))
        assert ("print(" in block) == bool(capsys.readouterr().out)
    for check in [*CHECKS, "input range", "epsilon", "logits", "labels", "memory", "training time"]:
        assert f"| {check} |" in page, check
