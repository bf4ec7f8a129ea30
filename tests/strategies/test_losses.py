"""Outer losses: values and gradients from definitions, limits, and what is held constant."""

import math
from typing import Any

import attrs
import pytest
import torch
from tiny import CLASSES, Plain, assert_same, at_epoch, batch, images, labels, scene, snapshot, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.core.batch import Budget, Output, Passes, Prepared
from robustkit.losses import Align, CrossEntropy, Mixed, Trades

B, K = 6, CLASSES
PROGRESS = at_epoch(0, 10)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(logits: Tensor, margined: Tensor | None = None) -> Output:
    margined = logits if margined is None else margined
    return Output(logits, margined, logits, logits.new_zeros(len(logits)))


def value(loss: Any, outputs: dict[str, Output], target: Tensor | None = None) -> Tensor:
    return sum(loss(outputs, target, batch(B), {}, PROGRESS).values())


def log_probability(row: list[float], k: int) -> float:
    top = max(row)
    return row[k] - top - math.log(sum(math.exp(entry - top) for entry in row))


def weights_gradient(model: nn.Module, objective: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(objective, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def forwarded(model: nn.Module, x_adv: Tensor, loss: Any, y: Tensor | None = None) -> dict[str, Output]:
    """The views a loss asks for, forwarded plainly: what the loop does, in its simplest form."""
    prepared = loss.prepare(scene(model), Budget(torch.full((B,), 8 / 255)), x_adv)
    return {name: model(view, y) for name, view in prepared.views.items()}


# Views


def test_views() -> None:
    model, x_adv = tiny_model(), images(B, 5)
    before = snapshot(model)
    given, budget = scene(model), Budget(torch.full((B,), 8 / 255))
    for loss, names in (
        (CrossEntropy(), ["adversarial"]),
        (Align(), ["adversarial"]),
        (Trades(), ["natural", "adversarial"]),
        (Mixed(), ["natural", "adversarial"]),
    ):
        prepared: Prepared = loss.prepare(given, budget, x_adv)
        assert list(prepared.views) == names
        assert prepared.views["adversarial"] is x_adv
        assert prepared.views.get("natural", given.batch.x) is given.batch.x
        assert prepared.joint == isinstance(loss, Mixed)
    assert_same(before, snapshot(model))
    shares = Mixed(beta=0.3, joint=False).prepare(given, budget, x_adv)
    assert shares.shares == pytest.approx({"natural": 0.7, "adversarial": 0.3}) and not shares.joint


def test_costs() -> None:
    wanted = {CrossEntropy(): (1, 0, 1), Align(): (1, 0, 1), Trades(): (2, 0, 2), Mixed(): (2, 0, 2)}
    for loss, (forward, inputs, parameters) in wanted.items():
        assert loss.passes(PROGRESS) == Passes(forward, inputs, parameters)
    assert [loss.needs_target for loss in wanted] == [False, True, False, False]
    assert Align().detach_target and not Align(detach=False).detach_target


# Cross-entropy


def test_cross_entropy() -> None:
    logits, y = draw(0, B, K), labels(B).tolist()
    wanted = -sum(log_probability(logits[i].tolist(), y[i]) for i in range(B)) / B
    assert float(value(CrossEntropy(), {"adversarial": output(logits)})) == pytest.approx(wanted, rel=1e-9)
    margined = draw(1, B, K)
    wanted = -sum(log_probability(margined[i].tolist(), y[i]) for i in range(B)) / B
    assert float(value(CrossEntropy(), {"adversarial": output(logits, margined)})) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("classes", "smoothing"), [(10, 1 / 3), (100, 0.30303)])
def test_label_smoothing_factor(classes: int, smoothing: float) -> None:
    """ECAS 12: the factor 0.7 (true class 0.7, the others share 0.3) is torch's 1/3, or 0.30303 for 100 classes."""
    logits = draw(0, B, classes)
    given = batch(B)
    target = torch.full((B, classes), 0.3 / (classes - 1), dtype=torch.float64)
    target[torch.arange(B), given.y] = 0.7
    wanted = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    loss = CrossEntropy(label_smoothing=smoothing)
    found = loss({"adversarial": output(logits)}, None, given, {}, PROGRESS)["cross-entropy"]
    assert float(found) == pytest.approx(float(wanted), abs=1e-5 if classes == 100 else 1e-6)
    plain = CrossEntropy()({"adversarial": output(logits)}, None, given, {}, PROGRESS)["cross-entropy"]
    assert float(plain) == pytest.approx(float(F.cross_entropy(logits, given.y)), rel=1e-12)


# TRADES


def test_trades_from_the_definition() -> None:
    """ECAS 13: KL is sum p_clean (log p_clean - log p_adv), not the reverse."""
    natural, adversarial, y = draw(0, B, K), draw(1, B, K), labels(B).tolist()
    total = 0.0
    for i in range(B):
        p = [log_probability(natural[i].tolist(), k) for k in range(K)]
        q = [log_probability(adversarial[i].tolist(), k) for k in range(K)]
        total += -p[y[i]] + 2.5 * sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    outputs = {"natural": output(natural), "adversarial": output(adversarial)}
    assert float(value(Trades(weight=2.5), outputs)) == pytest.approx(total / B, rel=1e-5)


def test_trades_terms_at_equal_images() -> None:
    logits = draw(0, B, K)
    terms = Trades()({"natural": output(logits), "adversarial": output(logits)}, None, batch(B), {}, PROGRESS)
    assert abs(float(terms["consistency"])) < 1e-6
    assert set(terms) == {"cross-entropy", "consistency"}


def test_trades_gradient_flows_through_both_branches() -> None:
    natural, adversarial = draw(0, B, K).requires_grad_(), draw(1, B, K).requires_grad_()
    terms = Trades()({"natural": output(natural), "adversarial": output(adversarial)}, None, batch(B), {}, PROGRESS)
    to_natural, to_adversarial = torch.autograd.grad(terms["consistency"], [natural, adversarial])
    p, q = natural.detach().softmax(dim=1), adversarial.detach().softmax(dim=1)
    torch.testing.assert_close(to_adversarial, 6.0 * (q - p) / B, atol=1e-5, rtol=1e-4)
    gap = p.log() - q.log()
    torch.testing.assert_close(
        to_natural, 6.0 * p * (gap - (p * gap).sum(dim=1, keepdim=True)) / B, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("own", [None, 0, 40, B, 10_000])
@pytest.mark.parametrize("smoothed", ["all", "synthetic"])
def test_trades_smooths_what_it_says(smoothed: Any, own: int | None) -> None:
    """Row `own` and later ones are synthetic: their cross-entropy alone is with (1 - s) onehot + s / K."""
    model, loss = tiny_model(), Trades(label_smoothing=0.1, smoothed=smoothed)
    given = scene(model)
    index = torch.tensor([0, 50, 39, 40, 7, 41])
    given = attrs.evolve(given, batch=given.batch._replace(index=index), world=attrs.evolve(given.world, own=own))
    extras = loss.prepare(given, Budget(torch.full((B,), 8 / 255)), images(B, 5)).extras
    logits, y = draw(0, B, K), given.batch.y.tolist()
    rows = []
    for i in range(B):
        s = 0.1 if smoothed == "all" or (own is not None and int(index[i]) >= own) else 0.0
        log_p = [log_probability(logits[i].tolist(), k) for k in range(K)]
        rows.append(-(1 - s) * log_p[y[i]] - s / K * sum(log_p))
    found = loss({"natural": output(logits), "adversarial": output(logits)}, None, given.batch, extras, PROGRESS)
    assert float(found["cross-entropy"]) == pytest.approx(sum(rows) / B, rel=1e-9)


def test_trades_without_weight_is_natural_training() -> None:
    """UIAT 10, ECAS 13: equal gradients, and the adversarial images do not matter."""
    model = tiny_model()
    plain = weights_gradient(model, F.cross_entropy(model(images(B)).logits, labels(B)))
    for seed in (5, 6):
        ours = weights_gradient(model, value(Trades(weight=0), forwarded(model, images(B, seed), Trades())))
        assert_close(ours, plain)


# Align


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.5])
def test_align_is_soft_cross_entropy(weight: float) -> None:
    """UIAT 14: its gradient is (1 + lambda) times that of soft CE with target (onehot + lambda p) / (1 + lambda)."""
    model, x_adv, y = tiny_model(), images(B, 5), labels(B)
    p = draw(3, B, K).softmax(dim=1).float()
    ours = weights_gradient(model, value(Align(weight=weight), forwarded(model, x_adv, Align()), p))
    soft = (F.one_hot(y, K) + weight * p) / (1 + weight)
    theirs = weights_gradient(model, (1 + weight) * F.cross_entropy(model(x_adv).logits, soft))
    assert_close(ours, theirs, 1e-5)
    if weight == 3.5:
        assert 1 / (1 + weight) == pytest.approx(0.222, abs=1e-3)


def test_align_from_the_definition() -> None:
    logits, y = draw(0, B, K), labels(B).tolist()
    p = draw(3, B, K).softmax(dim=1)
    total = 0.0
    for i in range(B):
        q = [log_probability(logits[i].tolist(), k) for k in range(K)]
        total += -q[y[i]] + 3.5 * sum(a * (math.log(a) - b) for a, b in zip(p[i].tolist(), q, strict=True))
    assert float(value(Align(), {"adversarial": output(logits)}, p)) == pytest.approx(total / B, rel=1e-5)


def test_align_without_weight_is_pgd_training_bit_for_bit() -> None:
    """UIAT 1."""
    model, x_adv = tiny_model(), images(B, 5)
    plain = weights_gradient(model, value(CrossEntropy(), forwarded(model, x_adv, CrossEntropy())))
    p = draw(3, B, K).softmax(dim=1).float()
    ours = weights_gradient(model, value(Align(weight=0), forwarded(model, x_adv, Align()), p))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_align_smooths_its_cross_entropy_alone_and_puts_the_margin_there_alone() -> None:
    logits, margined, p = draw(0, B, K), draw(1, B, K), draw(2, B, K).softmax(dim=1)
    plain = Align()({"adversarial": output(logits)}, p, batch(B), {}, PROGRESS)
    smooth = Align(label_smoothing=0.1)({"adversarial": output(logits, margined)}, p, batch(B), {}, PROGRESS)
    assert torch.equal(plain["alignment"], smooth["alignment"])
    wanted = F.cross_entropy(margined, labels(B), label_smoothing=0.1)
    torch.testing.assert_close(smooth["cross-entropy"], wanted)


def test_align_takes_hard_targets() -> None:
    """Stored rows may hold zeros."""
    logits = draw(0, B, K).requires_grad_()
    hard = F.one_hot(labels(B), K).float()
    terms = Align(weight=1)({"adversarial": output(logits)}, hard, batch(B), {}, PROGRESS)
    torch.testing.assert_close(terms["alignment"].double(), terms["cross-entropy"], atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(terms["alignment"], logits)
    assert torch.isfinite(gradient).all()


# Mixed (LDAT)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_mixed(beta: float) -> None:
    natural, adversarial, y = draw(0, B, K), draw(1, B, K), labels(B)
    found = value(Mixed(beta=beta), {"natural": output(natural), "adversarial": output(adversarial)})
    wanted = (1 - beta) * F.cross_entropy(natural, y) + beta * F.cross_entropy(adversarial, y)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize(("beta", "kept", "other"), [(0.0, "natural", "adversarial"), (1.0, "adversarial", "natural")])
def test_mixed_limits(beta: float, kept: str, other: str) -> None:
    """ECAS 25: at 0 the adversarial half contributes no gradient, at 1 the natural one."""
    model = tiny_model()
    views = {"natural": images(B), "adversarial": images(B, 5)}
    plain = weights_gradient(model, F.cross_entropy(model(views[kept]).logits, labels(B)))
    outputs = {name: model(view) for name, view in views.items()}
    assert_close(weights_gradient(model, value(Mixed(beta=beta), outputs)), plain)
    outputs = {name: model(view) for name, view in views.items()}
    (gradient,) = torch.autograd.grad(value(Mixed(beta=beta), outputs), outputs[other].logits)
    assert torch.equal(gradient, torch.zeros_like(gradient))


# All


@pytest.mark.parametrize("loss", [CrossEntropy(), Trades(), Align(), Mixed()])
def test_terms_are_means(loss: Any) -> None:
    """Doubling the batch changes nothing: so pieces of a batch add up to the whole."""
    natural, adversarial, p = draw(0, B, K), draw(1, B, K), draw(2, B, K).softmax(dim=1)
    target = p if loss.needs_target else None
    given = batch(B)
    outputs = {"natural": output(natural), "adversarial": output(adversarial)}
    once = loss(outputs, target, given, {}, PROGRESS)
    twice = loss(
        {name: output(o.logits.repeat(2, 1)) for name, o in outputs.items()},
        None if target is None else target.repeat(2, 1),
        given._replace(y=given.y.repeat(2)),
        {},
        PROGRESS,
    )
    assert once.keys() == twice.keys()
    for name, term in once.items():
        assert term.shape == () and float(term) == pytest.approx(float(twice[name]), rel=1e-6)


def test_align_builds_on_one_forward() -> None:
    """UIAT 30: with a constant target the graph of the loss holds exactly one forward of the network."""
    model, x_adv = tiny_model(), images(B, 5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        p = Plain(model)(images(B)).logits.softmax(dim=1)
    assert not p.requires_grad
    objective = value(Align(), forwarded(model, x_adv, Align()), p)
    assert calls == [False, True]
    convolutions = set()
    stack = [objective.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in convolutions:
            continue
        if "Convolution" in node.name():
            convolutions.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    assert len(convolutions) == 2  # the tiny net has two
