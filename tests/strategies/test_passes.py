"""Real training steps: what they cost (the sheets' minimal columns), and how often BatchNorm sees a batch."""

from typing import Any

import attrs
import pytest
import torch
from tiny import tracked
from torch.nn import functional as F

from robustkit.attacks import LDAT, PGD, RSFGSM, Calibrated, Dynamic, Friendly, Grouped
from robustkit.core.batch import Passes
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import Model
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, Validation
from robustkit.datasets import Synthetic
from robustkit.engine import count_passes
from robustkit.epsilons import ECAS, Curriculum, Cyclic
from robustkit.heads import GaussianMixture, Linear
from robustkit.losses import ALP, LBGAT, Align, CrossEntropy, GradAlign, Mixed, Trades, Untrained
from robustkit.objectives import KL, InverseObjective
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.schedules import Constant, OneCycle
from robustkit.targets import Inverse, Momentum, Natural, OneOff, Universal
from robustkit.threats import Linf
from robustkit.weights import AWP, Exponential

BATCH, TRAIN = 8, 16
GRAD_ALIGN = {"loss": GradAlign(), "attack": RSFGSM(noise=0, mode="train-frozen")}
UNTRAINED = Untrained(model=Model(backbone="convnet_small"), head=Linear())
TRADES = {"loss": Trades(), "attack": PGD(objective=KL(), start="gaussian")}


def recipe(**settings: Any) -> Recipe:
    plain = {
        "data": Synthetic(train=TRAIN, test=4, classes=4, size=8, channels=1),
        "model": Model(backbone="convnet_small"),
        "threat": Linf(),
        "attack": PGD(),
        "loss": CrossEntropy(),
        "schedule": Constant(),
        "optimizer": SGD(lr=0.01),
        "epochs": 5,
        "batch_size": BATCH,
        "validation": Validation(images=0),
    }
    return Recipe(**(plain | settings))


def parts_of(given: Recipe) -> Parts:
    return load_parts(given, make_world(given, "cpu"))


def rows(parts: Parts) -> torch.Tensor:
    """Every image once per epoch, in order."""
    position = parts.step % parts.steps_per_epoch
    return parts.rows[position * BATCH : (position + 1) * BATCH]


def one_step(parts: Parts) -> tuple[Passes, int]:
    """What the next step costs, and by how much it raises BatchNorm's count."""
    before = tracked(parts.model)
    with count_passes(parts.model) as count:
        train_step(parts, rows(parts))
    return count.per_batch(BATCH), tracked(parts.model) - before


# name: (changes to PGD-AT, (forwards, input backwards, parameter backwards), total, BatchNorm updates)
METHODS: dict[str, tuple[dict[str, Any], tuple[int, int, int], int, int]] = {
    "natural": ({"attack": None}, (1, 0, 1), 3, 1),
    "PGD-AT": ({}, (11, 10, 1), 23, 1),
    "cyclic": ({"epsilon": Cyclic()}, (11, 10, 1), 23, 1),
    "ECAS-PGD-AT": ({"epsilon": ECAS()}, (12, 10, 1), 24, 2),
    "ECAS-PGD-AT, frozen": ({"epsilon": ECAS(mode="train-frozen")}, (12, 10, 1), 24, 1),
    "ECAS-PGD-AT, eval": ({"epsilon": ECAS(mode="eval")}, (12, 10, 1), 24, 1),
    "ECAS-TRADES": (TRADES | {"epsilon": ECAS(big=2)}, (14, 10, 2), 28, 3),
    "ECAS-TRADES, cross-entropy": ({"loss": Trades(), "epsilon": ECAS(big=2)}, (13, 10, 2), 27, 3),
    "TRADES": (TRADES, (13, 10, 2), 27, 2),
    "IAT, beta 0": ({"loss": Align(), "target": Inverse(objective=InverseObjective(beta=0))}, (17, 15, 1), 34, 2),
    "IAT": ({"loss": Align(), "target": Inverse()}, (19, 15, 1), 36, 2),
    "UIAT, beta 0": ({"loss": Align(), "target": Universal(objective=InverseObjective(beta=0))}, (13, 11, 1), 26, 2),
    "UIAT": ({"loss": Align(), "target": Universal()}, (15, 11, 1), 28, 2),
    "UIAT, momentum": ({"loss": Align(), "target": Momentum(start=0.0)}, (15, 11, 1), 28, 2),
    "UIAT, eval": ({"loss": Align(), "target": Universal(mode="eval")}, (15, 11, 1), 28, 1),
    "FGSM": ({"attack": RSFGSM(noise=0, mode="eval")}, (2, 1, 1), 5, 1),
    "RS-FGSM": ({"attack": RSFGSM()}, (2, 1, 1), 5, 2),
    "GradAlign": (GRAD_ALIGN, (4, 3, 3), 13, 3),
    "GradAlign, AWP": (GRAD_ALIGN | {"weights": AWP()}, (7, 5, 6), 24, 3),
    "FAT, where nothing leaves the batch": ({"attack": Friendly(mode="train-frozen")}, (11, 10, 1), 23, 1),
    "FAT-TRADES, likewise": (
        {"loss": Trades(), "attack": Friendly(objective=KL(), start="gaussian", omega=0, mode="train-frozen")},
        (13, 10, 2),
        27,
        2,
    ),
    "DAT, likewise": ({"attack": Dynamic(mode="train-frozen")}, (11, 10, 1), 23, 1),
    "DAT, eleven gradients": ({"attack": Dynamic(steps=11, mode="train-frozen")}, (12, 11, 1), 25, 1),
    "DAAT": ({"attack": Calibrated(helper=UNTRAINED)}, (19, 10, 1), 31, 1),
    "DAAT, in training mode": (
        {"attack": Calibrated(inner=PGD(mode="train"), helper=UNTRAINED)},
        (19, 10, 1),
        31,
        11,
    ),
    "CAT, first stage": ({"epsilon": Curriculum(stages=0, rule="training"), "attack": Grouped()}, (1, 0, 1), 3, 1),
    "AT-AWP": ({"weights": AWP()}, (12, 10, 2), 26, 1),
    "ECAS-AWP": ({"weights": AWP(), "epsilon": ECAS()}, (13, 10, 2), 27, 2),
    "ECAS-AWP, frozen": ({"weights": AWP(), "epsilon": ECAS(mode="train-frozen")}, (13, 10, 2), 27, 1),
    "TRADES-AWP": (TRADES | {"weights": AWP(gamma=0.005)}, (15, 10, 4), 33, 2),
    "LDAT with PGD": ({"loss": Mixed(), "head": GaussianMixture()}, (12, 10, 2), 26, 1),
    "LDAT with PGD, two forwards": ({"loss": Mixed(joint=False), "head": GaussianMixture()}, (12, 10, 2), 26, 2),
    "LDAT": ({"loss": Mixed(), "head": GaussianMixture(), "attack": LDAT()}, (12, 10, 2), 26, 1),
    "ALP": ({"loss": ALP()}, (12, 10, 2), 26, 1),
    "LBGAT": (TRADES | {"loss": LBGAT(teacher=Model(backbone="convnet_small"))}, (14, 10, 3), 30, 2),
    "natural target, not detached": ({"loss": Align(detach=False), "target": Natural()}, (12, 10, 2), 26, 2),
    "the same with AWP": ({"loss": Align(detach=False), "target": Natural(), "weights": AWP()}, (14, 10, 4), 32, 2),
    "UIAT-AWP": ({"loss": Align(), "target": Universal(), "weights": AWP()}, (16, 11, 2), 31, 2),
    "ECAS-UIAT, mixture, AWP": (
        {"loss": Align(), "target": Momentum(), "epsilon": ECAS(), "weights": AWP(), "head": GaussianMixture()},
        (17, 11, 2),
        32,
        3,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_what_the_sheets_say(name: str) -> None:
    """UIAT 28, 31; ECAS 31: hooks count, the recipe declares, and both equal the sheet."""
    changes, counted, total, norms = METHODS[name]
    parts = parts_of(recipe(**changes))
    declared = step_passes(parts.recipe, parts.progress)
    found, seen = one_step(parts)
    assert found == declared == Passes(*counted)
    assert found.units == total
    assert seen == norms


@pytest.mark.parametrize(
    ("attack", "all_of_it"),
    [
        (Friendly(), False),
        (Friendly(objective=KL()), False),
        (Dynamic(), False),
        (Friendly(tau=(10,), switch=()), True),
    ],
)
def test_attacks_that_stop_early_cost_at_most_what_they_say(attack: Any, all_of_it: bool) -> None:
    """FAT and DAT drop images that are final; with as much patience as steps, FAT drops none."""
    parts = parts_of(recipe(attack=attack))
    declared = step_passes(parts.recipe, parts.progress)
    found, _ = one_step(parts)
    assert found.parameter_backward == 1 and found.forward >= 2
    assert found == declared or not all_of_it
    assert all_of_it or (found.forward < declared.forward and found.input_backward < declared.input_backward)


def test_single_steps_with_one_off_costs() -> None:
    """6, 8, then 5; GradAlign 14, 16, 13: the sheet has 11 for 13, as the attack's gradient serves twice there."""
    target = OneOff(inner=Universal(objective=InverseObjective(beta=0)), start=0.4)
    for changes, base in (({"loss": Align()}, 5), ({"loss": GradAlign(inner=Align())}, 13)):
        attack = RSFGSM() if base == 5 else GRAD_ALIGN["attack"]
        parts = parts_of(recipe(target=target, attack=attack, epochs=4, **changes))
        units = []
        for _ in range(3 * parts.steps_per_epoch):
            declared = step_passes(parts.recipe, parts.progress)
            found, _ = one_step(parts)
            assert found == declared
            units.append(found.units)
        assert units == [base + 1] * 2 + [base + 3] * 2 + [base] * 2


@pytest.mark.parametrize(("freeze", "last"), [("probabilities", (11, 10, 1)), ("perturbation", (12, 10, 1))])
def test_one_off_costs(freeze: Any, last: tuple[int, int, int]) -> None:
    """24, 28, then 23 as PGD-AT; BatchNorm sees two batches up to T', one after."""
    parts = parts_of(recipe(loss=Align(), target=OneOff(start=0.4, freeze=freeze), epochs=4))
    wanted = [((12, 10, 1), 2), ((15, 11, 1), 2), (last, 1 if freeze == "probabilities" else 2)]
    for epoch in range(4):
        counted, norms = wanted[min(epoch, 2)]
        for _ in range(parts.steps_per_epoch):
            declared = step_passes(parts.recipe, parts.progress)
            assert one_step(parts) == (Passes(*counted), norms)
            assert declared == Passes(*counted)
    assert [Passes(*counted).units for counted, _ in wanted] == [24, 28, 23 if freeze == "probabilities" else 24]


def test_one_off_without_detaching() -> None:
    """Kept rows carry no gradient whatever the flag: no second backward after T'."""
    parts = parts_of(recipe(loss=Align(detach=False), target=OneOff(start=0.4), epochs=4, weights=AWP()))
    for counted in ((14, 10, 4), (17, 11, 4), (12, 10, 2)):
        for _ in range(parts.steps_per_epoch):
            declared = step_passes(parts.recipe, parts.progress)
            found, _ = one_step(parts)
            assert found == declared == Passes(*counted)


def test_awp_starts_late() -> None:
    parts = parts_of(recipe(weights=AWP(start=2)))
    units = []
    for _ in range(4):
        declared = step_passes(parts.recipe, parts.progress)
        found, _ = one_step(parts)
        assert found == declared
        units.append(found.units)
    assert units == [23, 23, 26, 26]


def test_accumulation_costs_the_same_passes() -> None:
    parts = parts_of(recipe(accumulate=2, **TRADES))
    found, seen = one_step(parts)
    assert found == step_passes(parts.recipe, parts.progress) == Passes(13, 10, 2)
    assert seen == 4


# The gradient of a real step: against the sheets' formulas on the same weights


def weights_after(changes: dict[str, Any]) -> list[torch.Tensor]:
    parts = parts_of(recipe(**changes))
    train_step(parts, rows(parts))
    return [parameter.detach().clone() for parameter in parts.model.parameters()]


@pytest.mark.parametrize("target", [Universal(), Inverse(steps=1), OneOff(start=0.9), Momentum()], ids=str)
@pytest.mark.parametrize("weights", [AWP(), None])
def test_align_without_weight_steps_as_pgd_training(target: Any, weights: Any) -> None:
    """UIAT 1, bit for bit: the targets' passes do not reach the step by any way."""
    extra = {} if weights is None else {"weights": weights}
    plain = weights_after(extra)
    ours = weights_after({"loss": Align(weight=0), "target": target, **extra})
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_trades_without_weight_steps_as_natural_training() -> None:
    """UIAT 10, ECAS 13."""
    natural = weights_after({"attack": None})
    ours = weights_after({"loss": Trades(weight=0), "attack": PGD(objective=KL(), start="gaussian")})
    for a, b in zip(ours, natural, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("beta", "plain"), [(0.0, {"attack": None}), (1.0, {})])
def test_mixed_limits_with_separate_statistics(beta: float, plain: dict[str, Any]) -> None:
    """ECAS 25, the head's likelihood term included."""
    head = {"head": GaussianMixture(likelihood_schedule="constant")}
    theirs = weights_after(plain | head)
    ours = weights_after({"loss": Mixed(beta=beta, joint=False), **head})
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_awp_without_gamma_steps_as_without_awp() -> None:
    """ECAS 18."""
    for a, b in zip(weights_after({"weights": AWP(gamma=0)}), weights_after({}), strict=True):
        assert torch.equal(a, b)


def test_awp_probes_with_the_target_in_its_own_mode() -> None:
    """The displaced step must be along the gradient of the objective that is then minimised, which for a target in
    eval mode does not depend on the batch's statistics."""
    changes = {"loss": Align(detach=False, weight=5.0), "target": Natural(mode="eval"), "attack": None}
    gamma = 0.05
    parts = parts_of(recipe(**changes, weights=AWP(gamma=gamma), optimizer=SGD(lr=1e-12, weight_decay=0)))
    for norm in (module for module in parts.model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.fill_(0.3)  # so that the modes differ
    chosen = rows(parts)
    x = parts.train.fetch(chosen).float() / 255
    y = parts.train.labels[chosen]
    with parts.model.using("eval"):
        p = parts.model(x).logits.softmax(dim=1)
    with parts.model.using("train-frozen"):
        logits = parts.model(x).logits
    kl = (p * (p.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()
    weight = parts.model.head.linear.weight
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y) + 5.0 * kl, weight)
    wanted = weight.detach() + gamma * weight.detach().norm() * gradient / gradient.norm()
    seen = []
    handle = parts.model.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    train_step(parts, chosen)
    handle.remove()
    torch.testing.assert_close(seen[-1], wanted, atol=1e-5, rtol=1e-4)


def test_the_average_follows_by_its_rate() -> None:
    """UIAT 12 and sheet 10.3: avg <- d avg + (1 - d) w, parameters only."""
    parts = parts_of(recipe(attack=None, average=Exponential(), optimizer=SGD(lr=0.5)))
    assert parts.averaged is not None
    kept = [parameter.detach().clone() for parameter in parts.averaged.parameters()]
    for step in range(1, 5):
        train_step(parts, rows(parts))
        share = min(0.995, (1 + step) / (10 + step))
        current = list(parts.model.parameters())
        kept = [share * old + (1 - share) * new.detach() for old, new in zip(kept, current, strict=True)]
        for ours, wanted in zip(parts.averaged.parameters(), kept, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    online = parts_of(recipe(attack=None, average=Exponential(rate=0.0), optimizer=SGD(lr=0.5)))
    train_step(online, rows(online))
    for a, b in zip(online.averaged.parameters(), online.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rates_reach_the_optimiser() -> None:
    """The schedule's factor, the group's own factor and the cycled momentum, in every step."""
    head = GaussianMixture(centre_lr_scale=2.0, centre_weight_decay=0.0)
    given = recipe(attack=None, head=head, schedule=OneCycle(), optimizer=SGD(lr=0.1, nesterov=True))
    parts = parts_of(given)
    for _ in range(4):
        rates = OneCycle()(parts.progress)
        train_step(parts, rows(parts))
        backbone, centres = parts.optimizer.param_groups
        assert backbone["lr"] == pytest.approx(0.1 * rates.lr_scale)
        assert centres["lr"] == pytest.approx(0.2 * rates.lr_scale)
        assert backbone["momentum"] == centres["momentum"] == pytest.approx(rates.momentum)
        assert (backbone["weight_decay"], centres["weight_decay"]) == (5e-4, 0.0)
        assert backbone["nesterov"]


@pytest.mark.parametrize(
    "changes",
    [{}, TRADES, {"loss": Align(), "target": Universal()}, {"weights": AWP()}],
    ids=["pgd", "trades", "uiat", "awp"],
)
def test_the_model_comes_back_in_train_mode_with_everything_trainable(changes: dict[str, Any]) -> None:
    """UIAT 29."""
    parts = parts_of(recipe(**changes))
    train_step(parts, rows(parts))
    assert all(module.training for module in parts.model.modules())
    assert all(parameter.requires_grad for parameter in parts.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in parts.model.parameters())


def test_counting_knows_the_three_kinds() -> None:
    parts = parts_of(recipe(attack=None))
    model, x = parts.model, torch.rand(BATCH, 1, 8, 8)
    with count_passes(model) as count:
        with torch.no_grad():
            model(x)
        given = x.clone().requires_grad_()
        torch.autograd.grad(model(given).logits.sum(), given)
        output = model(x)
        (output.logits.sum() + output.features.sum()).backward()
        model(torch.cat([x, x]))
    assert count.per_batch(BATCH) == Passes(5, 1, 1)
    with count_passes(model) as again:
        pass
    model(x)
    assert again.per_batch(BATCH) == Passes()


def test_the_total_is_the_sum_of_the_parts() -> None:
    given = recipe(**METHODS["ECAS-UIAT, mixture, AWP"][0])
    from robustkit.core.batch import Progress

    by_part = given.passes(Progress.at(0, 5, 2))
    assert {name: passes.units for name, passes in by_part.items()} == {
        "epsilon": 1,
        "attack": 20,
        "target": 5,
        "loss": 3,
        "weights": 3,
    }
    assert attrs.asdict(sum(by_part.values(), Passes())) == {
        "forward": 17,
        "input_backward": 11,
        "parameter_backward": 2,
    }
