"""MART and HAT: values from naive loops, gradients, limits, costs; and HAT's helper, which only looks on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_losses import PROGRESS, B, K, assert_close, draw, forwarded, log_probability, output, value, weights_gradient
from test_passes import BATCH, one_step, parts_of, recipe, rows, weights_after
from tiny import CLASSES, SHAPE, Backbone, assert_same, batch, images, labels, scene, snapshot, tiny_model, world
from torch import Tensor
from torch.nn import functional as F

from robustkit import Model, Recipe, UserError, digest, evolve, load, override, resume, run
from robustkit.attacks import PGD
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.batch import Batch, Budget, Passes
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.recipe import Suite, Validation, rehearsed
from robustkit.core.spec import from_json, to_json
from robustkit.core.strategy import build
from robustkit.core.world import World
from robustkit.datasets import Synthetic
from robustkit.display import Silent
from robustkit.engine import count_passes
from robustkit.evaluation import Clean
from robustkit.heads import GaussianMixture, Linear
from robustkit.losses import Hat, Helper, Mart, Trades, Untrained
from robustkit.objectives import KL
from robustkit.runs import Outcome, evaluate_run
from robustkit.schedules import Constant
from robustkit.smoke import smoke
from robustkit.targets import Inverse
from robustkit.testing import check, tiny_recipe
from robustkit.weights import AWP

TINY = Untrained(model=Model(backbone="convnet_small"), head=Linear())
MART = {"loss": Mart(), "attack": PGD(start="gaussian")}
HAT = {"loss": Hat(helper=TINY), "attack": PGD(objective=KL(), start="gaussian")}


def two(natural: Tensor, adversarial: Tensor) -> dict[str, Any]:
    return {"natural": output(natural), "adversarial": output(adversarial)}


# MART


def mart_by_hand(natural: list[list[float]], adversarial: list[list[float]], y: list[int], weight: float) -> float:
    """UIAT sheet, section 4, one number at a time; k* by the sheet's rule of the two likeliest classes."""
    total = 0.0
    for row, row_adv, true in zip(natural, adversarial, y, strict=True):
        p = [math.exp(log_probability(row, k)) for k in range(len(row))]
        q = [math.exp(log_probability(row_adv, k)) for k in range(len(row))]
        second, first = sorted(range(len(row)), key=lambda k: q[k])[-2:]
        wrong = second if first == true else first
        margined = -math.log(q[true]) - math.log(1.0001 - q[wrong] + 1e-12)
        kl = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q, strict=True))
        total += margined + weight * (1.0000001 - p[true]) * kl
    return total / len(y)


@pytest.mark.parametrize("count", [1, B, 40])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_mart_from_the_definition(count: int, weight: float) -> None:
    natural, adversarial = 3 * draw(0, count, K), 3 * draw(1, count, K)
    given = batch(count)
    terms = Mart(weight=weight)(two(natural, adversarial), None, given, {}, PROGRESS)
    wanted = mart_by_hand(natural.tolist(), adversarial.tolist(), given.y.tolist(), weight)
    assert float(sum(terms.values())) == pytest.approx(wanted, rel=1e-9)
    assert set(terms) == {"cross-entropy", "margin", "consistency"}
    assert all(term.shape == () for term in terms.values())


def test_mart_takes_the_likeliest_wrong_class_whether_the_first_is_right_or_not() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0, 0.0], [2.0, 4.0, 1.0, 0.0]], dtype=torch.float64)
    given = Batch(images(2), torch.tensor([0, 0]), torch.arange(2))
    p = logits.softmax(dim=1)
    margin = Mart()(two(logits, logits), None, given, {}, PROGRESS)["margin"]
    wanted = -((1.0001 - p[0, 1]).log() + (1.0001 - p[1, 1]).log()) / 2
    assert float(margin) == pytest.approx(float(wanted), rel=1e-9)


def test_mart_of_certain_predictions_is_finite() -> None:
    """Probabilities of 0 and 1 in float32: the constants keep the logarithms finite, and no gradient is NaN."""
    natural = torch.tensor([[200.0, 0.0, 0.0, -200.0], [-200.0, 200.0, 0.0, 0.0]]).requires_grad_()
    adversarial = torch.tensor([[-200.0, 0.0, 200.0, 0.0], [-200.0, 200.0, 0.0, 0.0]]).requires_grad_()
    given = Batch(images(2), torch.tensor([0, 0]), torch.arange(2))
    total = value_of(Mart(), two(natural, adversarial), given)
    assert torch.isfinite(total)
    for gradient in torch.autograd.grad(total, [natural, adversarial]):
        assert torch.isfinite(gradient).all()


def value_of(loss: Any, outputs: dict[str, Any], given: Batch, extras: dict[str, Tensor] | None = None) -> Tensor:
    return sum(loss(outputs, None, given, extras or {}, PROGRESS).values())


def test_mart_s_gradient_by_finite_differences() -> None:
    """Nothing is held constant: not p, not the factor 1 - p[y], not p_adv."""
    natural, adversarial, given = draw(0, B, K).requires_grad_(), draw(1, B, K).requires_grad_(), batch(B)
    found = torch.autograd.grad(value_of(Mart(), two(natural, adversarial), given), [natural, adversarial])
    step, constant = 1e-6, (natural.detach(), adversarial.detach())
    for logits, gradient in zip((natural, adversarial), found, strict=True):
        assert bool((gradient != 0).any(dim=1).all())
        for i in range(B):
            for k in range(K):
                ends = []
                for sign in (1, -1):
                    moved = logits.detach().clone()
                    moved[i, k] += sign * step
                    pair = (moved, constant[1]) if logits is natural else (constant[0], moved)
                    ends.append(float(value_of(Mart(), two(*pair), given)))
                assert float(gradient[i, k]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_mart_s_gradient_flows_through_the_factor() -> None:
    """With KL = 0 only the factor could carry one, times 0; away from it, holding the factor constant changes it."""
    natural, adversarial, given = draw(0, B, K).requires_grad_(), draw(1, B, K), batch(B)
    whole = Mart(weight=1.0)(two(natural, adversarial), None, given, {}, PROGRESS)["consistency"]
    (gradient,) = torch.autograd.grad(whole, natural)
    p = natural.softmax(dim=1)
    true = p[torch.arange(B), given.y]
    kl = (p * (p.log() - adversarial.softmax(dim=1).log())).sum(dim=1)
    (constant,) = torch.autograd.grad(((1.0000001 - true.detach()) * kl).mean(), natural, retain_graph=True)
    (through,) = torch.autograd.grad((-true * kl.detach()).mean(), natural)
    torch.testing.assert_close(gradient, constant + through, atol=1e-9, rtol=1e-6)
    assert float(through.abs().max()) > 1e-3


def test_mart_without_weight_is_its_first_term_alone() -> None:
    """UIAT 10: the natural images do not matter, bit for bit."""
    model, x_adv = tiny_model(), images(B, 5)
    outputs = forwarded(model, x_adv, Mart())
    ours = weights_gradient(model, value(Mart(weight=0), outputs))
    logits = model(x_adv).logits
    p = logits.softmax(dim=1)
    wrong = p.scatter(1, labels(B)[:, None], 0).amax(dim=1)
    theirs = F.cross_entropy(logits, labels(B)) - (1.0001 - wrong).log().mean()
    assert_close(ours, weights_gradient(model, theirs), 1e-5)


def test_mart_s_views_in_order() -> None:
    model, x_adv = tiny_model(), images(B, 5)
    before, given = snapshot(model), scene(model)
    prepared = Mart().prepare(given, Budget(torch.full((B,), 0.1)), x_adv)
    assert list(prepared.views) == ["natural", "adversarial"] and not prepared.joint and not prepared.shares
    assert prepared.views["natural"] is given.batch.x and prepared.views["adversarial"] is x_adv
    assert_same(before, snapshot(model))


def test_mart_puts_the_margin_into_the_cross_entropy_alone() -> None:
    natural, adversarial, margined = draw(0, B, K), draw(1, B, K), draw(2, B, K)
    plain = Mart()(two(natural, adversarial), None, batch(B), {}, PROGRESS)
    headed = Mart()(
        {"natural": output(natural), "adversarial": output(adversarial, margined)}, None, batch(B), {}, PROGRESS
    )
    assert float(headed["cross-entropy"]) == pytest.approx(float(F.cross_entropy(margined, labels(B))))
    assert headed["margin"] == plain["margin"] and headed["consistency"] == plain["consistency"]


# HAT


def helped(reach: float = 2.0, **settings: Any) -> Any:
    """HAT's runtime in the tiny world, its helper a tiny network with weights of its own."""
    runtime = build(Hat(reach=reach, helper=TINY, **settings), world())
    runtime.helper._network.append(tiny_model(seed=9).eval().requires_grad_(False))
    return runtime


def hat_by_hand(logits: list[list[list[float]]], y: list[int], y_h: list[int], weight: float, mu: float) -> float:
    """UIAT sheet, section 5, one number at a time."""
    total = 0.0
    for natural, adversarial, beyond, true, said in zip(*logits, y, y_h, strict=True):
        p = [log_probability(natural, k) for k in range(K)]
        q = [log_probability(adversarial, k) for k in range(K)]
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        total += -p[true] + weight * kl - mu * log_probability(beyond, said)
    return total / len(y)


@pytest.mark.parametrize("count", [1, B])
def test_hat_from_the_definition(count: int) -> None:
    logits = [2 * draw(seed, count, K) for seed in range(3)]
    given, said = batch(count), torch.arange(count) * 3 % K
    outputs = dict(zip(("natural", "adversarial", "helper"), map(output, logits), strict=True))
    runtime = helped(weight=2.5, helper_weight=0.5)
    terms = runtime(outputs, None, given, {"helper labels": said}, PROGRESS)
    wanted = hat_by_hand([values.tolist() for values in logits], given.y.tolist(), said.tolist(), 2.5, 0.5)
    assert float(sum(terms.values())) == pytest.approx(wanted, rel=1e-6)
    assert set(terms) == {"cross-entropy", "robust", "helper"} and all(term.shape == () for term in terms.values())


def test_hat_with_cross_entropy_for_the_robust_term() -> None:
    logits = [draw(seed, B, K) for seed in range(3)]
    outputs = dict(zip(("natural", "adversarial", "helper"), map(output, logits), strict=True))
    extras = {"helper labels": labels(B)}
    terms = helped(robust="ce")(outputs, None, batch(B), extras, PROGRESS)
    assert float(terms["robust"]) == pytest.approx(2.5 * float(F.cross_entropy(logits[1], labels(B))))
    kl = helped()(outputs, None, batch(B), extras, PROGRESS)
    assert kl["cross-entropy"] == terms["cross-entropy"] and kl["helper"] == terms["helper"]


def test_hat_smooths_labels_and_puts_the_margin_into_the_first_term_alone() -> None:
    logits, margined = [draw(seed, B, K) for seed in range(3)], draw(4, B, K)
    outputs = dict(zip(("natural", "adversarial", "helper"), map(output, logits), strict=True))
    headed = outputs | {"natural": output(logits[0], margined), "helper": output(logits[2], margined)}
    extras = {"helper labels": labels(B)}
    plain = helped()(outputs, None, batch(B), extras, PROGRESS)
    smooth = helped(label_smoothing=0.1)(headed, None, batch(B), extras, PROGRESS)
    wanted = F.cross_entropy(margined, labels(B), label_smoothing=0.1)
    torch.testing.assert_close(smooth["cross-entropy"], wanted)
    assert plain["robust"] == smooth["robust"] and plain["helper"] == smooth["helper"]


def test_hat_s_views_and_labels() -> None:
    """x_h = x + h (x_adv - x), beyond the box where it lies there; y_h is what the helper says of x_adv, not x_h."""
    model, runtime = tiny_model(), helped()
    x_adv = (images(B) + 0.4 * torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    before, given = snapshot(model), scene(model)
    kept = snapshot(runtime.helper._network[0])
    prepared = runtime.prepare(given, Budget(torch.full((B,), 0.1)), x_adv)
    assert list(prepared.views) == ["natural", "adversarial", "helper"] and not prepared.joint and not prepared.shares
    assert prepared.views["natural"] is given.batch.x and prepared.views["adversarial"] is x_adv
    beyond = prepared.views["helper"]
    torch.testing.assert_close(beyond, 2 * x_adv - given.batch.x)
    assert float(beyond.min()) < 0 or float(beyond.max()) > 1
    network = runtime.helper._network[0]
    with torch.no_grad():
        said, elsewhere = network(x_adv).logits.argmax(dim=1), network(beyond).logits.argmax(dim=1)
    found = prepared.extras["helper labels"]
    assert torch.equal(found, said) and not torch.equal(found, elsewhere) and found.dtype == torch.int64
    assert found.shape == (B,) and not found.requires_grad
    assert_same(before, snapshot(model))
    assert_same(kept, snapshot(network))
    assert not network.training


def test_hat_s_gradient_flows_through_both_predictions() -> None:
    logits = [draw(seed, B, K).requires_grad_() for seed in range(3)]
    outputs = dict(zip(("natural", "adversarial", "helper"), map(output, logits), strict=True))
    terms = helped()(outputs, None, batch(B), {"helper labels": labels(B)}, PROGRESS)
    to_natural, to_adversarial = torch.autograd.grad(terms["robust"], logits[:2])
    p, q = logits[0].detach().softmax(dim=1), logits[1].detach().softmax(dim=1)
    torch.testing.assert_close(to_adversarial, 2.5 * (q - p) / B, atol=1e-5, rtol=1e-4)
    assert float(to_natural.abs().max()) > 1e-3


def test_hat_at_its_limits() -> None:
    """UIAT 9: reach 1 with true labels is CE(f(x_adv), y); without the helper's weight it is TRADES."""
    model, x_adv, runtime = tiny_model(), images(B, 5), helped(reach=1.0)
    prepared = runtime.prepare(scene(model), Budget(torch.full((B,), 0.1)), x_adv)
    torch.testing.assert_close(prepared.views["helper"], x_adv)
    outputs = {name: model(view) for name, view in prepared.views.items()}
    terms = runtime(outputs, None, batch(B), {"helper labels": labels(B)}, PROGRESS)
    wanted = 0.5 * F.cross_entropy(outputs["adversarial"].logits, labels(B))
    torch.testing.assert_close(terms["helper"], wanted, atol=1e-5, rtol=1e-5)

    without = helped(helper_weight=0.0)
    outputs = {name: model(view) for name, view in without.prepare(scene(model), None, x_adv).views.items()}
    total = value_of(without, outputs, batch(B), {"helper labels": labels(B)})
    trades = value(Trades(weight=2.5), forwarded(model, x_adv, Trades()))
    assert_close(weights_gradient(model, total), weights_gradient(model, trades), 1e-6)


def test_a_step_of_hat_without_the_helper_s_weight_is_one_of_trades() -> None:
    """UIAT 9, a whole step: the weights are those of TRADES, the statistics have seen the third view as well."""
    trades = weights_after({"loss": Trades(weight=2.5), "attack": HAT["attack"]})
    ours = weights_after(HAT | {"loss": Hat(helper_weight=0.0, helper=TINY)})
    for a, b in zip(ours, trades, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


# What a step costs


@pytest.mark.parametrize(
    ("changes", "counted", "units", "norms"),
    [
        (MART, (12, 10, 2), 26, 2),
        (HAT, (15, 10, 3), 31, 3),  # 14 forwards and the helper's
        (HAT | {"loss": Hat(helper=TINY, robust="ce"), "attack": PGD()}, (14, 10, 3), 30, 3),  # CE needs no f(x) before
        (MART | {"weights": AWP()}, (14, 10, 4), 32, 2),
        (HAT | {"weights": AWP()}, (18, 10, 6), 40, 3),  # the helper looks on once, however often the pass runs
    ],
    ids=["MART", "HAT", "HAT, ce", "MART-AWP", "HAT-AWP"],
)
def test_a_step_costs_what_the_sheet_says(
    changes: dict[str, Any], counted: tuple[int, int, int], units: int, norms: int
) -> None:
    """UIAT 28, 31: hooks count, the helper's forward too, the recipe declares, and both equal the sheet."""
    parts = parts_of(recipe(**changes))
    declared = step_passes(parts.recipe, parts.progress)
    found, seen = one_step(parts)
    assert found == declared == Passes(*counted) and found.units == units and seen == norms


def test_iat_costs_what_the_sheet_says() -> None:
    """UIAT 31, Table 6 row 1: five descents without references."""
    from robustkit import load_recipe

    iat = load_recipe(Path(__file__).parents[2] / "recipes" / "uiat_table6.py:iat")
    assert step_passes(iat, PROGRESS) == Passes(17, 15, 1)
    parts = parts_of(recipe(loss=iat.loss, target=iat.target))
    assert isinstance(iat.target, Inverse)
    assert one_step(parts) == (Passes(17, 15, 1), 2)


def test_only_the_model_is_trained() -> None:
    """The helper is in no group of the optimiser and in no checkpoint, and nothing of it changes in a step."""
    parts = parts_of(recipe(**HAT))
    helper = parts.strategies["loss"].helper
    helper.ready()
    kept = snapshot(helper._network[0])
    for _ in range(3):
        train_step(parts, rows(parts))
    assert_same(kept, snapshot(helper._network[0]))
    trained = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in parts.model.parameters()}
    plain = parts_of(recipe(attack=None)).tensors().keys()
    extra = {key for key in parts.tensors() if key not in plain and not key.startswith(("totals.", "optimizer."))}
    assert extra == {"strategies.loss.helper.sha256"} and parts.tensors()["strategies.loss.helper.sha256"].numel() == 32


@pytest.mark.parametrize("loss", [Mart(weight=0.0), Hat(weight=0.0), Hat(robust="ce", reach=0.5, helper_weight=1.0)])
def test_contracts(loss: Any) -> None:
    check(loss)


def test_the_count_sees_networks_beside_the_model() -> None:
    torch.manual_seed(0)
    one, other = (RobustModel(Backbone(), Linear().build(5, CLASSES), None) for _ in range(2))
    with count_passes(one) as count:
        one(images(4)).logits.sum().backward()
        with torch.no_grad():
            other(images(4))
    assert count.per_batch(4) == Passes(2, 0, 1)


# The helper: whose, and whether it is the one


pytestmark = pytest.mark.usefixtures("no_figures")


def go(given: Recipe, out: str | Path, **options: Any) -> Outcome:
    return run(given, out=out, device="cpu", preflight=False, **options)


DATA = Synthetic(train=70, test=16, classes=4, size=8, channels=1)


NATURAL = Validation(images=12, train_images=0, attack=None)


def natural(**changes: Any) -> Recipe:
    return tiny_recipe(
        **{"data": DATA, "attack": None, "epochs": 2, "evaluation": (), "validation": NATURAL, **changes}
    )


def hat_recipe(**helper: Any) -> Recipe:
    plain = tiny_recipe(data=DATA, epochs=2, evaluation=(Suite(measures=(Clean(),)),))
    return evolve(plain, loss=Hat(helper=Helper(run="helper", **helper)), attack=PGD(steps=2, objective=KL()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished natural run, and another one."""
    folder = tmp_path_factory.mktemp("helpers")
    for name, seed in (("helper", 1), ("another", 2)):
        go(natural(seed=seed), folder / name)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with both in it."""
    for name in ("helper", "another"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sha256_of(folder: str, name: str = "best") -> str:
    return str(json.loads(Path(folder, "checkpoints", f"{name}.json").read_text())["sha256"])


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_the_helper_is_the_run_s_network(here: Path) -> None:
    facts = World(samples=70, training=58, classes=4, image_shape=(1, 8, 8))
    x = torch.rand(5, 1, 8, 8)
    for name in ("best", "last"):
        network, sha256 = Helper(run="helper", checkpoint=name).network(facts)
        assert sha256 == sha256_of("helper", name)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(x).logits, load("helper", checkpoint=name)(x))
    assert main(["export", "helper", "--to", "safetensors", "--checkpoint", "best", "--out", "exported"]) == 0
    network, _ = Helper(run="exported").network(facts)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x).logits, load("helper", checkpoint="best")(x))


def test_a_run_with_a_helper(here: Path) -> None:
    """It says and notes which helper it is, keeps no weights of it, and is judged without it."""
    display = Listening()
    outcome = go(hat_recipe(), "run", display=display)
    said = f"helper, best, sha256 {sha256_of('helper')}"
    assert f"Helper: {said}" in display.said
    assert json.loads(Path("run/environment.json").read_text())["helper"] == said
    tensors, _ = checkpoint.read(Path("run/checkpoints/last.safetensors"))
    assert [key for key in tensors if key.startswith("strategies.")] == ["strategies.loss.helper.sha256"]
    assert bytes(tensors["strategies.loss.helper.sha256"].tolist()).hex() == sha256_of("helper")
    shutil.rmtree("helper")
    again = evaluate_run("run", again=True, device="cpu")
    assert again.results["last"]["clean"]["accuracy"] == outcome.results["last"]["clean"]["accuracy"]
    assert load("run").classes == ("0", "1", "2", "3")
    assert resume("run", device="cpu").stopped == ""


def test_resume_takes_the_same_helper_or_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(hat_recipe(), "whole")
    go(hat_recipe(), "parts", max_steps=3)
    shutil.move("helper", "kept")
    with pytest.raises(UserError, match="helper: the helper's run is not there"):
        resume("parts", device="cpu")
    shutil.copytree("another", "helper")
    capsys.readouterr()
    assert main(["resume", "parts", "--device", "cpu", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the helper is another one" in line and sha256_of("another") in line and sha256_of("kept") in line
    shutil.rmtree("helper")
    shutil.move("kept", "helper")
    assert resume("parts", device="cpu").stopped == ""
    for name in ("last", "best"):
        whole, parts = (checkpoint.read(Path(f, "checkpoints", f"{name}.safetensors"))[0] for f in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_pinned_helper(here: Path) -> None:
    pinned = hat_recipe(sha256=sha256_of("helper"))
    assert go(pinned, "run", max_steps=1).stopped == "steps"
    with pytest.raises(UserError, match="the helper is another one") as caught:
        go(hat_recipe(sha256=sha256_of("another")), "other")
    assert "\n" not in str(caught.value) and not Path("other").exists()
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        Helper(sha256="abc")


def test_where_a_helper_lies_is_not_what_a_recipe_is() -> None:
    one, other = hat_recipe(), override(hat_recipe(), ["loss.helper.run=elsewhere", "loss.helper.made_by=x.py"])
    assert digest(one) == digest(other) != digest(override(one, ["loss.helper.checkpoint=last"]))
    assert from_json(Recipe, to_json(one)) == one
    assert from_json(Recipe, to_json(rehearsed(one))) == rehearsed(one) != one


def test_missing_helpers_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        go(hat_recipe(made_by="recipes/uiat_helper.py:svhn"), "run")
    assert str(caught.value) == (
        "helper: the helper's run is not there; make it with: robustkit run recipes/uiat_helper.py:svhn --out helper"
    )
    assert not Path("run").exists()


def test_what_is_no_helper(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (
            lambda: go(natural(), "young", max_steps=1),
            "stands at epoch 0 of 2; robustkit resume helper",
        ),
        (
            lambda: go(natural(data=Synthetic(train=70, test=16, classes=5, size=8)), "young"),
            "5 classes",
        ),
        (lambda: go(natural(validation=Validation(images=0)), "young"), "no checkpoint 'best'"),
        (lambda: Path("young").mkdir(), "neither a run nor an exported model"),
    ]
    for make, words in cases:
        shutil.rmtree("helper")
        make()
        shutil.move("young", "helper")
        with pytest.raises(UserError, match=words) as caught:
            go(hat_recipe(), "run")
        assert "\n" not in str(caught.value) and not Path("run").exists()
    shutil.rmtree("helper")
    shutil.copytree("another", "helper")
    best = Path("helper/checkpoints/best.safetensors")
    best.write_bytes(best.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum"):
        go(hat_recipe(), "run")


def test_loading_a_helper_executes_nothing(here: Path) -> None:
    """Not the recipe.py in its folder, even where the head is defined nowhere else: then it is refused."""
    Path("helper/recipe.py").write_text("raise SystemExit('executed')\n", encoding="utf-8")
    assert go(hat_recipe(), "run", max_steps=1).stopped == "steps"
    for name in ("last", "best"):
        path = Path("helper/checkpoints", f"{name}.safetensors")
        tensors, facts = checkpoint.read(path)
        facts["recipe"]["head"] = {"name": "defined-elsewhere"}
        checkpoint.write(path, tensors, facts)
    with pytest.raises(UserError, match="unknown head 'defined-elsewhere'"):
        go(hat_recipe(), "other")


def test_smoke_takes_an_untrained_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = evolve(hat_recipe(), head=GaussianMixture(), control=hat_recipe())
    tried = smoke(given)
    assert tried.loss == evolve(given.loss, helper=Untrained(model=given.model, head=given.head))
    assert tried.control is not None and isinstance(tried.control.loss.helper, Untrained)
    display = Listening()
    assert go(evolve(tried, control=None), "run", max_steps=2, display=display).stopped == "steps"
    assert not [line for line in display.said if line.startswith("Helper")]


def test_an_untrained_helper_is_the_same_everywhere_and_draws_nothing() -> None:
    facts = World(samples=70, training=58, classes=4, image_shape=(1, 8, 8), seed=5)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (TINY.network(facts)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_labels_teach_what_the_helper_says() -> None:
    """A helper that calls every image class 2 pulls the model's prediction on x_h there."""
    parts = parts_of(recipe(**HAT | {"loss": Hat(weight=0.0, helper_weight=5.0, helper=TINY), "schedule": Constant()}))
    network: Any = parts.strategies["loss"].helper
    network.ready()
    with torch.no_grad():
        for name, parameter in network._network[0].head.named_parameters():
            parameter.zero_() if "weight" in name else parameter.copy_(10.0 * F.one_hot(torch.tensor(2), 4))
    shares = []
    for _ in range(12):
        train_step(parts, rows(parts))
        with torch.no_grad(), parts.model.using("eval"):
            x = parts.train.fetch(parts.rows[:BATCH]).float() / 255
            shares.append(float(parts.model(x).logits.softmax(dim=1)[:, 2].mean()))
    assert shares[-1] > shares[0]
