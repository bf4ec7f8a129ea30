"""The audit catches planted frauds by the checks that are meant for them, and passes honest models."""

from __future__ import annotations

import copy
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import Model, Recipe, Validation, evolve, load, run
from robustkit.attacks import PGD
from robustkit.backbones.convnet import ConvNet
from robustkit.cli.main import main
from robustkit.core.errors import DataError
from robustkit.core.strategy import ThreatModel
from robustkit.datasets import Digits
from robustkit.evaluation import Finding
from robustkit.evaluation.audit import CHECKS, Audit, Case, Detector, audit, others
from robustkit.evaluation.audit.case import GAP, GAP_FRAUD, grade
from robustkit.losses import Align, CrossEntropy
from robustkit.optimizers import SGD
from robustkit.schedules import OneCycle
from robustkit.targets import Universal
from robustkit.threats import L1, L2, Linf

LINF = Linf(epsilon=0.15)
ROBUST = Recipe(
    data=Digits(),
    model=Model(backbone="convnet_small"),
    threat=LINF,
    attack=PGD(steps=3),
    loss=CrossEntropy(),
    optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=OneCycle(),
    epochs=5,
    batch_size=64,
    validation=Validation(images=16, train_images=0),
    evaluation=(),
)
RECIPES = {
    "natural": evolve(ROBUST, attack=None, epochs=8),
    "PGD-AT": ROBUST,
    "UIAT": evolve(ROBUST, target=Universal(radius=0.075), loss=Align(weight=3.5)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of trained models."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(recipe, out=folder / name, device="cpu").folder for name, recipe in RECIPES.items()}


@pytest.fixture
def natural(runs: dict[str, Path]) -> nn.Module:
    """A model that PGD breaks, on which all frauds are built."""
    return load(runs["natural"])


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    test = Digits().load().test
    return test.fetch(torch.arange(len(test))).float() / 255, test.labels


@pytest.fixture(autouse=True)
def cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attacks with less effort: digits are small."""
    for name, value in {"QUERIES": 300, "PAIRS": 10, "SCORE_STEPS": 10, "IMITATION_STEPS": 100}.items():
        monkeypatch.setattr(others, name, value)


def audited(model: nn.Module, digits: tuple[Tensor, Tensor], *checks: str, **options: Any) -> Audit:
    """The audit of 50 digits, by some checks or by all."""
    wanted = {name: CHECKS[name] for name in checks} if checks else CHECKS
    return audit(model, *digits, **{"threat": LINF, "limit": 50, "checks": wanted} | options)


def failed(found: Audit) -> set[str]:
    return {finding.check for finding in found.findings if finding.verdict == "failure"}


def accuracy(found: Audit) -> float:
    """After PGD-20 on cross-entropy: the claim."""
    steps = found["steps"].data
    return float(steps["accuracy"][steps["steps"].index(20)])


# --- honest models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_honest_models_pass(name: str, runs: dict[str, Path], digits: tuple[Tensor, Tensor]) -> None:
    found = audited(load(runs[name]), digits)
    assert found.verdict == "trustworthy", str(found)
    assert [finding.check for finding in found.findings] == list(CHECKS)
    assert {finding.verdict for finding in found.findings if finding.check != "detector"} == {"ok"}
    assert all(finding.remedy == "" and "\n" not in finding.evidence for finding in found.findings)
    assert accuracy(found) < 0.4 if name == "natural" else accuracy(found) > 0.5


@pytest.mark.parametrize("threat", [L2(epsilon=0.8), L1(epsilon=4.0)], ids=["L2", "L1"])
def test_other_norms(threat: ThreatModel, runs: dict[str, Path], digits: tuple[Tensor, Tensor]) -> None:
    model = load(runs["PGD-AT"])
    assert audited(model, digits, threat=threat, limit=30).verdict == "trustworthy"
    found = audited(Scaled(model), digits, "zero gradients", "unbounded", "losses", threat=threat)
    assert {"zero gradients", "unbounded"} <= failed(found)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    few = labels < classes
    model = few_classes(classes)
    found = audited(model, (images[few], labels[few]), limit=30)
    assert found.verdict == "trustworthy", str(found)
    assert ("DLR" in found["losses"].data["accuracy"]) == (classes > 2)
    caught = failed(
        audited(Quantised(model), (images[few], labels[few]), "zero gradients", "minimum norm", "by scores")
    )
    assert "zero gradients" in caught


def few_classes(classes: int) -> nn.Module:
    train = Digits().load().train
    x, y = train.fetch(torch.arange(len(train))).float() / 255, train.labels
    x, y = x[y < classes], y[y < classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ConvNet(num_classes=classes, in_chans=1)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net


# --- frauds: a natural model, and something that hides its gradient ---------------------------------------------------


class Fraud(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.hide(x))

    def hide(self, x: Tensor) -> Tensor:
        return x


class Scaled(Fraud):
    """Logits so large that the softmax is one or zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.inner(x)


class Quantised(Fraud):
    """Rounded pixels: the gradient is zero."""

    def hide(self, x: Tensor) -> Tensor:
        return torch.round(x * 7) / 7


class StraightThrough(Fraud):
    """Rounded pixels, with the gradient of the pixels."""

    def hide(self, x: Tensor) -> Tensor:
        return x + (torch.round(x * 7) / 7 - x).detach()


class Detached(Fraud):
    """Pixels that leave torch, as for a JPEG library: there is no gradient to ask for."""

    def hide(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().round(1))


class Staged(Fraud):
    """Features that are cut into steps in the middle of the network."""

    def forward(self, x: Tensor) -> Tensor:
        features = torch.floor(self.inner.network.backbone(x) * 4) / 4
        return self.inner.network.head(features, None).logits


class _Away(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Reversed(Fraud):
    """A layer whose backward pass points the wrong way."""

    def hide(self, x: Tensor) -> Tensor:
        return _Away.apply(x)


class Shattered(Fraud):
    """Small fast waves: the gradient is theirs, the function hardly."""

    def hide(self, x: Tensor) -> Tensor:
        return x + 0.03 * torch.sin(100 * x)


class Randomised(Fraud):
    """Such waves, with another phase for each pixel of each forward."""

    def hide(self, x: Tensor) -> Tensor:
        return x + 0.03 * torch.sin(200 * x + 2 * torch.pi * torch.rand_like(x))


BY_OTHERS = {"transfer", "by scores"}
MEANT: dict[type[Fraud], set[str]] = {
    Scaled: {"zero gradients", "saturation", "loss landscape", "unbounded", "losses"},
    Quantised: {"zero gradients", "loss landscape", "unbounded", *BY_OTHERS},
    Staged: {"zero gradients", "loss landscape", "unbounded", *BY_OTHERS},
    Reversed: {"gradient correctness", "loss landscape", "unbounded", *BY_OTHERS},
    Shattered: {"loss landscape", "unbounded", "smoothing", "minimum norm", *BY_OTHERS},
    Randomised: {"determinism", "smoothing", *BY_OTHERS},
}


@pytest.mark.parametrize("fraud", MEANT)
def test_frauds_are_caught(fraud: type[Fraud], natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = audited(fraud(natural), digits)
    assert found.verdict == "false robustness"
    assert accuracy(found) > 0.8  # it does look robust
    assert failed(found) >= MEANT[fraud], str(found)
    assert all(finding.remedy for finding in found.findings if finding.verdict in ("warning", "failure"))


def test_a_model_that_leaves_torch_is_judged_too(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    checks = ("zero gradients", "gradient correctness", "unbounded", "minimum norm", "transfer", "detector")
    blind = Detector(lambda x: -Detached(nn.Identity())(x).flatten(1).mean(dim=1), -1.0)
    found = audited(Detached(natural), digits, *checks, limit=30, detector=blind)
    assert failed(found) >= {"zero gradients", "unbounded", "transfer"}
    assert found["gradient correctness"].verdict == "skipped"


def test_gradients_that_are_no_numbers(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    class NotANumber(Fraud):
        def hide(self, x: Tensor) -> Tensor:
            return x + 0 * (x - x.detach()).abs().sqrt()  # 0 times the infinite slope of the root at 0

    found = audited(NotANumber(natural), digits, limit=20)
    assert failed(found) >= {"zero gradients", "loss landscape", "unbounded", "transfer"}
    assert "not finite for" in found["zero gradients"].evidence
    json.dumps(found.to_json(), allow_nan=False)


def test_a_straight_through_gradient_is_a_warning(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = audited(
        StraightThrough(natural), digits, "zero gradients", "gradient correctness", "unbounded", "by scores"
    )
    assert found.verdict == "suspicious"
    assert found["gradient correctness"].verdict == "warning" and "substitute" in found["gradient correctness"].remedy


def test_a_randomised_model_that_hides_nothing_is_a_warning(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    class Noisy(Fraud):
        def hide(self, x: Tensor) -> Tensor:
            return x + 0.05 * torch.randn_like(x)

    found = audited(Noisy(natural), digits, "determinism", "batch independence", "loss landscape", "smoothing", "steps")
    assert found.verdict == "suspicious" and found["determinism"].verdict == "warning"
    assert found["batch independence"].verdict == "skipped"


def test_batch_statistics_at_test_time(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = copy.deepcopy(natural)
    assert audited(model.train(), digits, "batch independence").verdict == "trustworthy"
    assert model.training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    assert failed(audited(model, digits, "batch independence")) == {"batch independence"}


def test_a_surrogate_breaks_what_the_model_s_own_gradient_cannot(
    runs: dict[str, Path], natural: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    found = audited(Quantised(natural), digits, "transfer", surrogate=natural)
    assert failed(found) == {"transfer"} and "surrogate" in found["transfer"].evidence
    assert audited(natural, digits, "transfer", surrogate=load(runs["PGD-AT"])).verdict == "trustworthy"


# --- detectors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def learnt(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A network that tells PGD's images from clean ones (Metzen et al. 2017), and no others."""
    train = Digits().load().train
    x, y = train.fetch(torch.arange(len(train))).float() / 255, train.labels
    found: list[Tensor] = []

    def keep(case: Case) -> Finding:
        found.extend([case.x, case.pgd])
        return Finding(check="keep", verdict="ok", evidence="")

    audit(natural, x, y, threat=LINF, limit=500, checks={"keep": keep})
    images, adversarial = torch.cat(found), torch.arange(2 * len(found[0])) >= len(found[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ConvNet(num_classes=1, in_chans=1)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(6):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.soft_margin_loss(net(images[rows])[:, 0], 1 - 2.0 * adversarial[rows]).backward()
                optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "stepped"])
def test_a_detector_of_one_attack_is_caught(
    smooth: bool, learnt: nn.Module, natural: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    def score(images: Tensor) -> Tensor:
        accepted = learnt(images)[:, 0]
        return accepted if smooth else torch.round(accepted.detach() * 20) / 20

    found = audited(natural, digits, "detector", limit=30, detector=Detector(score, 0.0))["detector"]
    assert found.verdict == "failure", found.evidence
    assert found.data["plain"] <= 0.2 * found.data["fooled"] and found.data["adaptive"] >= 0.3 * found.data["fooled"]
    assert found.data["rejected_clean"] <= 3


def test_a_detector_that_promises_nothing_is_no_fraud(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = audited(natural, digits, "detector", detector=Detector(lambda x: x.flatten(1).mean(dim=1), 0.0))
    assert found.verdict == "trustworthy" and found["detector"].data["rejected_clean"] == 0
    assert audited(natural, digits, "detector")["detector"].verdict == "skipped"


# --- the audit itself -------------------------------------------------------------------------------------------------


def test_what_counts_as_more_than_luck() -> None:
    assert [grade(count, 100) for count in (0, 7, 8, 15, 16)] == ["ok", "ok", "warning", "warning", "failure"]
    assert [grade(count, 50) for count in (4, 5, 9, 10)] == ["ok", "warning", "warning", "failure"]
    gaps = [grade(count, 100, GAP, GAP_FRAUD) for count in (13, 14, 21, 22)]
    assert gaps == ["ok", "warning", "warning", "failure"]
    assert [grade(count, 50, GAP, GAP_FRAUD) for count in (7, 8, 12, 13)] == gaps


def test_it_is_repeatable_and_leaves_no_trace(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = Randomised(natural).train()
    state, told = torch.random.get_rng_state(), []
    checks = ("determinism", "noise", "transfer")
    first = audited(model, digits, *checks, limit=20, watch=lambda *news: told.append(news))
    assert told == [(name, number, 3) for number, name in enumerate(checks)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.inference_mode():
        again = audited(model, digits, *checks, limit=20)
    assert again.to_json() == first.to_json() == json.loads(json.dumps(first.to_json()))
    assert audited(model, digits, *checks, limit=20, seed=1).to_json() != first.to_json()


def test_a_check_of_one_s_own(natural: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    def size(case: Case) -> Finding:
        return Finding(check="size", verdict="warning", evidence=f"{len(case)} of {case.total} images")

    found = audit(natural, *digits, limit=20, checks={"size": size})
    assert found["size"].evidence == f"{found.right} of 20 images" and found.verdict == "suspicious"
    with pytest.raises(KeyError):
        found["steps"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: ({"labels": (y + 1) % 10}), "too few to attack"),
        (lambda x, y: ({"images": 255 * x}), "pixels must be in"),
        (lambda x, y: ({"surrogate": ConvNet(num_classes=3, in_chans=1)}), "surrogate: does not have the model's 10"),
    ],
)
def test_mistakes(
    change: Callable[[Tensor, Tensor], dict[str, Any]], said: str, natural: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    given = {"images": digits[0], "labels": digits[1]} | change(*digits)
    with pytest.raises(DataError, match=said):
        audit(natural, given.pop("images"), given.pop("labels"), limit=20, **given)


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_command_audits_a_run(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs["PGD-AT"]
    assert main(["audit", str(folder), "--limit", "20", "--device", "cpu", "--surrogate", str(runs["natural"])]) == 0
    captured = capsys.readouterr()
    assert "Verdict: trustworthy (16 ok, 1 skipped)" in captured.out and "unbounded" in captured.out
    assert "check 1 of 17: determinism" in captured.err and f"Written to {folder / 'audit.json'}" in captured.err
    assert main(["audit", str(folder), "--limit", "20", "--device", "cpu", "--checkpoint", "best", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    held = json.loads((folder / "audit.json").read_text())
    assert held["best"] == data and data["verdict"] == "trustworthy" and data["threat"]["epsilon"] == 0.15
    assert held["last"]["surrogate"].startswith(str(runs["natural"])) and data["surrogate"] is None


def test_the_command_audits_a_function_s_model(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "import torch, robustkit\n\n\nclass Scaled(torch.nn.Module):\n    def __init__(self, inner):\n"
    text += "        super().__init__()\n        self.inner = inner\n\n    def forward(self, x):\n"
    text += "        return 1000 * self.inner(x)\n\n\ndef made():\n"
    text += f"    return Scaled(robustkit.load({str(runs['natural'])!r}))\n"
    (tmp_path / "audited_models.py").write_text(text)
    words = ["audit", "audited_models:made", "data=digits", "threat.epsilon=0.15", "--limit", "20", "--device", "cpu"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "Verdict: false robustness" in captured.out and "Written" not in captured.err
    assert "losses: report AutoAttack" in captured.out
    assert main(["audit", "audited_models:made", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_the_command_s_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path)], [str(tmp_path), "--limit", "0"], []):
        assert main(["audit", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("error: ") == 1 and len(captured.err.splitlines()) == 1


# --- its page ---------------------------------------------------------------------------------------------------------


def test_the_page_tells_of_every_check_and_its_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(CHECKS)
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            path = tmp_path / "example.py"
            path.write_text(example, encoding="utf-8")
            runpy.run_path(str(path))
        assert capsys.readouterr().out
