"""RS-FGSM and GradAlign against naive loops, finite differences and the sheet's identities; UIAT's Table 5."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from test_passes import parts_of, recipe, rows
from tiny import Plain, assert_same, batch, images, labels, scene, snapshot, statistics, tiny_model, tracked
from torch import Tensor
from torch.nn import functional as F

from robustkit import Precision, UserError, evolve, px, registry
from robustkit.attacks import PGD, RSFGSM
from robustkit.core.batch import Budget, Part, Passes, Progress
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.parts import Parts
from robustkit.core.recipe import load_recipes
from robustkit.core.rng import whole
from robustkit.data.loader import make_batch
from robustkit.engine import count_passes
from robustkit.epsilons import ECAS
from robustkit.heads import GaussianMixture
from robustkit.losses import Align, CrossEntropy, GradAlign, Hat, Mixed, Trades
from robustkit.losses.grad_align import misalignment
from robustkit.optimizers import SGD
from robustkit.published import load
from robustkit.reporting.published import match
from robustkit.targets import OneOff, Universal
from robustkit.testing import check, tiny_recipe
from robustkit.threats import L1, L2, Linf
from robustkit.weights import AWP

ROOT = Path(__file__).parents[2]
RADII = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.3, 0.6], dtype=torch.float64)


def attacked(attack: Any, model: RobustModel, x: Tensor, radii: Tensor = RADII, threat: Any = None) -> Tensor:
    return attack(Plain(model), x, labels(len(x)), Budget(radii), threat or Linf(), whole(x, 7))


def by_the_paper(model: RobustModel, x: Tensor, noise: float, step: float, training: bool = True) -> Tensor:
    """eta ~ U(-eps, eps), x + eta in the box; delta = clip(eta + alpha sign(g), -eps, eps), x + delta in the box."""
    eps = RADII[:, None, None, None]
    eta = (x + (2 * whole(x, 7).uniform(x) - 1) * noise * eps).clamp(0, 1) - x
    eta.requires_grad_()
    model = copy.deepcopy(model).train(training)
    F.cross_entropy(model(x + eta).logits, labels(len(x))).backward()
    assert eta.grad is not None
    delta = (eta.detach() + step * eps * eta.grad.sign()).maximum(-eps).minimum(eps)
    return (x + delta).clamp(0, 1)


# RS-FGSM


@pytest.mark.parametrize("attack", [RSFGSM(), RSFGSM(noise=0.5, step=0.5), RSFGSM(noise=0.0), RSFGSM(mode="eval")])
def test_attack_contract(attack: RSFGSM) -> None:
    check(attack)


@pytest.mark.parametrize(("noise", "step"), [(1.0, 1.25), (0.5, 1.0), (1.0, 0.5), (0.0, 1.25)])
def test_rs_fgsm_by_the_paper(noise: float, step: float) -> None:
    """With a radius of its own for each image."""
    model, x = tiny_model().double(), images(6).double()
    found = attacked(RSFGSM(noise=noise, step=step), model, x)
    torch.testing.assert_close(found, by_the_paper(model, x, noise, step), atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_without_noise_it_is_fgsm(training: bool) -> None:
    """UIAT 11; and so it is GradAlign's example, whose step of 1.25 eps comes back to eps."""
    model, x = tiny_model().double().train(training), images(6).double()
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(start).logits, labels(6)), start)
    fgsm = (x + RADII[:, None, None, None] * gradient.sign()).clamp(0, 1)
    mode = "train" if training else "eval"
    for step in (1.0, 1.25, 9.0):
        torch.testing.assert_close(
            attacked(RSFGSM(noise=0.0, step=step, mode=mode), model, x), fgsm, atol=1e-12, rtol=0
        )
    same = attacked(PGD(steps=1, start="clean", step_size=1.0, mode=mode), model, x)
    torch.testing.assert_close(same, fgsm, atol=1e-12, rtol=0)


def test_n_fgsm_clipped_is_rs_fgsm() -> None:
    """UIAT 11."""
    if "n-fgsm" not in registry("attack").names():
        pytest.skip("the plugin is not installed")
    model, x = tiny_model().double(), images(6).double()
    n_fgsm = registry("attack").get("n-fgsm")(noise=1.0, step=1.25)
    clipped = Linf().project(attacked(n_fgsm, model, x), x, RADII)
    torch.testing.assert_close(clipped, attacked(RSFGSM(), model, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("threat", [Linf(), L2(), L1()], ids=lambda threat: threat.norm)
def test_ball_and_box(threat: Any) -> None:
    model, x = tiny_model(), images(6)
    x[0, :, :3], x[1, :, 3:] = 0.0, 1.0
    radii = threat.epsilon * torch.tensor([0.0, 0.1, 0.5, 1.0, 1.5, 2.0])
    found = attacked(RSFGSM(), model, x, radii, threat)
    assert (threat.size(found - x) <= radii + 1e-5 * threat.epsilon).all()
    assert threat.size(found - x)[3:].min() > 0.05 * threat.epsilon and 0 <= found.min() <= found.max() <= 1


def test_only_statistics_move_and_only_in_training_mode() -> None:
    model, x = tiny_model(), images(6)
    for mode, moved in (("train", 1), ("train-frozen", 0), ("eval", 0)):
        before, count, buffers = snapshot(model), tracked(model), statistics(model)
        attacked(RSFGSM(mode=mode), model, x, RADII.float())
        assert tracked(model) - count == moved
        model.load_state_dict(buffers, strict=False)
        assert_same(before, snapshot(model))


def test_step_sizes_and_numbers_of_steps_in_the_budget_are_not_used() -> None:
    """ECAS's budget has both a radius for each image and a step size that is a quarter of the cycle's."""
    model, x, y = tiny_model(), images(6), labels(6)
    radii = RADII.float()
    full = Budget(radii, radii / 4, torch.zeros(6, dtype=torch.int64), max_steps=0)
    found = RSFGSM(mode="eval")(Plain(model), x, y, full, Linf(), whole(x, 7))
    assert torch.equal(found, attacked(RSFGSM(mode="eval"), model, x, radii))
    parts = parts_of(recipe(attack=RSFGSM(), epsilon=ECAS()))
    train_step(parts, rows(parts))


# GradAlign: the value


def slope(model: RobustModel, x: Tensor, y: Tensor, create: bool = False) -> Tensor:
    x = x.detach().requires_grad_()
    value = F.cross_entropy(model(x).logits, y, reduction="sum")
    return torch.autograd.grad(value, x, create_graph=create)[0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def penalty(model: RobustModel, x: Tensor, u: Tensor, y: Tensor, constant: Tensor | None = None) -> Tensor:
    """1 - mean cos(g(x), g(x + u)), image by image; `constant` stands for g(x)."""
    here = slope(model, x, y, create=True) if constant is None else constant
    there = slope(model, x + u, y, create=True)
    return 1 - torch.stack([cosine(a, b) for a, b in zip(here, there, strict=True)]).mean()


def prepared(loss: GradAlign, model: RobustModel, epsilon: Tensor | float = 0.1, threat: Any = None) -> Any:
    """The loss's terms on a batch of six in float64, what it prepared, and the batch."""
    given = batch()
    given = given._replace(x=given.x.double())
    stage = scene(model, given, threat=threat)
    radii = torch.full((6,), epsilon, dtype=torch.float64) if isinstance(epsilon, float) else epsilon
    runtime = loss.build(stage.world)
    found = runtime.prepare(stage, Budget(radii), given.x)
    outputs = {name: model(view, given.y) for name, view in found.views.items()}
    return runtime(outputs, None, given, found.extras, stage.progress), found, given


@pytest.mark.parametrize("mode", ["train-frozen", "eval"])
def test_value_and_gradient_of_the_regulariser(mode: Any) -> None:
    """UIAT 24: as image by image, and gradients reach the weights through g(x + u) alone."""
    model = tiny_model().double()
    with model.using(mode):
        terms, found, given = prepared(GradAlign(weight=2.0), model)
        u = found.views["neighbour"].detach() - given.x
        constant = slope(model, given.x, given.y)
        ours, wanted = terms["grad-align"], 2 * penalty(model, given.x, u, given.y, constant)
        free = 2 * penalty(model, given.x, u, given.y)
        weights = list(model.parameters())
        gradients = [
            torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
            for value in (ours, wanted, free)
        ]
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    assert wanted > 1e-4
    for one, other in zip(gradients[0], gradients[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    differing = [
        not torch.allclose(a, b, rtol=1e-3, atol=1e-8) for a, b in zip(gradients[0], gradients[2], strict=True)
    ]
    assert any(differing)


def test_finite_differences_of_the_regulariser() -> None:
    model = tiny_model().double()
    for module in model.modules():  # smooth: tanh in place of the one ReLU
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.Tanh())
    with model.using("train-frozen"):
        terms, found, given = prepared(GradAlign(weight=1.0), model, 0.2)
        u, constant = found.views["neighbour"].detach() - given.x, slope(model, given.x, given.y)
        weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        gradients = torch.autograd.grad(terms["grad-align"], weights)
        step = 1e-5
        for weight, gradient in zip(weights, gradients, strict=True):
            for place in (0, weight.numel() // 2, weight.numel() - 1):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        weight.view(-1)[place] += sign * step
                    values.append(penalty(model, given.x, u, given.y, constant).item())
                    with torch.no_grad():
                        weight.view(-1)[place] -= sign * step
                assert (values[0] - values[1]) / (2 * step) == pytest.approx(
                    gradient.flatten()[place].item(), rel=1e-5, abs=1e-8
                )


def test_without_a_radius_there_is_no_penalty() -> None:
    """UIAT 24: u = 0 gives a cosine of 1."""
    model = tiny_model().double()
    with model.using("train-frozen"):
        terms, _, _ = prepared(GradAlign(weight=1.0), model, 0.0)
    assert terms["grad-align"].item() == pytest.approx(0, abs=1e-12)


def test_images_without_a_gradient_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a[1], b[4] = 0, 0
    b.requires_grad_()
    kept = [0, 2, 3, 5]
    wanted = 1 - torch.stack([cosine(a[i], b[i]) for i in kept]).mean()
    found = misalignment(a, b)
    torch.testing.assert_close(found, wanted)
    (ours,), (theirs,) = torch.autograd.grad(found, b), torch.autograd.grad(wanted, b)
    torch.testing.assert_close(ours, theirs)
    nothing = misalignment(torch.zeros_like(a), b)
    (gradient,) = torch.autograd.grad(nothing, b)
    assert nothing == 0 and (gradient == 0).all()


@pytest.mark.parametrize(("units", "weight"), [(6, 0.112), (8, 0.2), (10, 0.356), (12, 0.632), (16, 2.0)])
def test_the_rule_for_the_weight(units: int, weight: float) -> None:
    model = tiny_model().double()
    with model.using("train-frozen"):
        ruled, _, _ = prepared(GradAlign(), model, threat=Linf(epsilon=units * px))
        single, _, _ = prepared(GradAlign(weight=1.0), model)
    assert (ruled["grad-align"] / single["grad-align"]).item() == pytest.approx(weight, abs=1e-3)


def test_neighbours_lie_within_each_image_s_radius_and_leave_the_box() -> None:
    model = tiny_model().double()
    with model.using("train-frozen"):
        _, found, given = prepared(GradAlign(), model, RADII)
    u = (found.views["neighbour"] - given.x).abs().flatten(1)
    assert (u.amax(dim=1) <= RADII + 1e-12).all() and (u.amax(dim=1) >= 0.9 * RADII).all()
    neighbours = found.views["neighbour"]
    assert neighbours.min() < 0 and neighbours.max() > 1
    assert torch.equal(found.views["image"], given.x) and found.views["image"].requires_grad


def test_neighbours_are_the_global_batch_s() -> None:
    """In pieces, as over processes, an image has the neighbour that it has in one piece; another one in each step."""
    model, given, loss = tiny_model(), batch(), GradAlign()
    whole_scene = scene(model, given)
    runtime = loss.build(whole_scene.world)

    def neighbours(stage: Any) -> Tensor:
        radii = torch.full((len(stage.batch.y),), 0.1)
        return runtime.prepare(stage, Budget(radii), stage.batch.x).views["neighbour"].detach()

    pieces = [
        attrs.evolve(whole_scene, batch=type(given)(*(value[a:b] for value in given)), part=Part(a, b, 6))
        for a, b in ((0, 2), (2, 6))
    ]
    once = neighbours(whole_scene)
    assert torch.equal(torch.cat([neighbours(piece) for piece in pieces]), once)
    assert not torch.equal(neighbours(scene(model, given, step=1)), once)


# GradAlign: in training

GRAD_ALIGN = {"attack": RSFGSM(noise=0.0, mode="train-frozen"), "loss": GradAlign()}


@pytest.mark.parametrize(
    "loss", [GradAlign(), GradAlign(inner=Align()), GradAlign(inner=Trades(), weight=0.5), GradAlign(weight=0.0)]
)
def test_loss_contract(loss: GradAlign) -> None:
    check(loss)


def plain_step(**changes: Any) -> Parts:
    plain = SGD(lr=0.1, momentum=0.0, weight_decay=0.0)
    return parts_of(recipe(**GRAD_ALIGN | {"optimizer": plain} | changes))


def test_a_step_by_the_paper() -> None:
    """w - lr grad [CE(f(x_adv)) + 0.2 (1 - mean cos)] with batch statistics; BatchNorm sees x, x + u, x_adv."""
    parts = plain_step()
    model = copy.deepcopy(parts.model)
    given = make_batch(parts.train, rows(parts), device=parts.world.device, augmentation=None, generator=None)
    drawn = parts.world.generator("grad-align", parts.progress, Part(0, len(given.y), len(given.y)))
    u = (2 * drawn.uniform(given.x) - 1) * 8 * px
    train_step(parts, rows(parts))

    model.train()
    constant = slope(model, given.x, given.y)
    adversarial = (given.x + 8 * px * constant.sign()).clamp(0, 1)
    regulariser = 0.2 * penalty(model, given.x, u, given.y, constant)
    value = F.cross_entropy(model(adversarial).logits, given.y) + regulariser
    weights = list(model.parameters())
    gradients = torch.autograd.grad(value, weights)
    for ours, weight, gradient in zip(parts.model.parameters(), weights, gradients, strict=True):
        torch.testing.assert_close(ours.detach(), (weight - 0.1 * gradient).detach(), atol=2e-6, rtol=1e-4)
    for ours, theirs in zip(parts.model.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_without_weight_it_steps_as_fgsm_training() -> None:
    with_it, without = plain_step(loss=GradAlign(weight=0.0)), plain_step(loss=CrossEntropy())
    for parts in (with_it, without):
        train_step(parts, rows(parts))
    for a, b in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_regulariser_is_float32_whatever_the_precision() -> None:
    means = {}
    for outer in ("fp32", "bf16"):
        parts = plain_step(precision=Precision(attack="fp32", outer=outer))
        train_step(parts, rows(parts))
        means[outer] = parts.totals.means()
    assert means["bf16"]["term grad-align"] == pytest.approx(means["fp32"]["term grad-align"], rel=1e-6)
    assert means["bf16"]["term cross-entropy"] != pytest.approx(means["fp32"]["term cross-entropy"], rel=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": GradAlign(inner=Align()), "target": OneOff(inner=Universal(), start=0.4)},
        {"weights": AWP()},
        {"accumulate": 2},
        {"epsilon": ECAS()},
        {"head": GaussianMixture()},
        {"loss": GradAlign(inner=Trades())},
        {"loss": GradAlign(inner=Mixed(joint=False))},
        {"attack": PGD(steps=2)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_it_composes(changes: dict[str, Any]) -> None:
    parts = plain_step(**changes)
    for _ in range(2):
        train_step(parts, rows(parts))
    assert all(bool(parameter.isfinite().all()) for parameter in parts.model.parameters())
    assert parts.totals.means()["term grad-align"] > 0


def test_around_a_loss_with_a_helper() -> None:
    """What the inner loss needs before training, and what it costs, is passed on."""
    given = tiny_recipe(loss=GradAlign(inner=Hat()), attack=RSFGSM(noise=0.0))
    parts = parts_of(given)
    with count_passes(parts.model) as count:
        train_step(parts, parts.rows[:16])
    assert count.per_batch(16) == step_passes(given, Progress.at(0, 4, 4)) == Passes(7, 3, 5)
    assert parts.strategies["loss"].ready() == {"helper": ""}


def test_the_head_s_penalty_is_the_inner_loss_s() -> None:
    """The views of the regulariser have no share in it."""
    _, found, _ = prepared(GradAlign(inner=Mixed(beta=0.25, joint=False)), tiny_model().double())
    assert found.shares == {"image": 0.0, "neighbour": 0.0, "natural": 0.75, "adversarial": 0.25}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threat": L2()}, "loss: GradAlign is for L-inf, the threat model is L2"),
        ({"threat": Linf(epsilon=0.1)}, "loss.weight: the rule for the weight ends at 16/255"),
        ({"loss": GradAlign(inner=Mixed())}, "set loss.inner.joint=false"),
        ({"loss": GradAlign(inner=Align())}, "needs a target"),
        ({"attack": None}, "there is no attack"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(**GRAD_ALIGN | changes)
    assert said in str(error.value) and "\n" not in str(error.value)
    if "threat" in changes and changes["threat"].norm == "Linf":
        recipe(**GRAD_ALIGN | changes | {"loss": GradAlign(weight=2.0)})


# UIAT's Table 5

FAMILY = load_recipes(ROOT / "recipes" / "uiat_table5.py")
NAMES = {"rs-fgsm": "RS-FGSM", "grad-align": "GradAlign"}


@pytest.mark.parametrize("name", FAMILY)
def test_each_of_table_5_finds_its_row_and_quotes_it(name: str) -> None:
    method, _, epsilon = name.rpartition("-")
    base = NAMES[method.removesuffix("-uiat")] + (" + UIAT" if method.endswith("-uiat") else "")
    row = match(FAMILY[name], load("uiat-table5"))
    assert row.label == f"{base}, {epsilon}/255"
    text = (ROOT / "recipes" / "uiat_table5.py").read_text(encoding="utf-8")
    line = re.search(rf"^    {name} +([\d.]+) +([\d.]+)  +\d+(?: /.*)?$", text, re.MULTILINE)
    assert line is not None and tuple(map(float, line.groups())) == tuple(row.values.values())


def test_table_5_by_the_sheet() -> None:
    """Sheets 9, 9.1 and 9.2."""
    assert len(FAMILY) == 12
    for name, given in FAMILY.items():
        method, _, epsilon = name.rpartition("-")
        aligned = method.startswith("grad-align")
        assert given.threat == Linf(epsilon=int(epsilon) * px) and given.epochs == 30 and given.batch_size == 128
        assert given.attack.step == 1.25 and given.attack.noise == (0.0 if aligned else 1.0)
        assert given.model.backbone == ("preact_resnet18_gradalign" if aligned else "preact_resnet18_raw")
        assert given.model.normalization == ("none" if aligned else "cifar10")
        assert given.optimizer == SGD(lr=0.3 if aligned else 0.2, momentum=0.9, nesterov=False, weight_decay=5e-4)
        rates = [given.schedule(Progress.at(step, 30, 10)) for step in (0, 60, 120, 150, 225)]
        shape = [0, 0.5, 1, 5 / 6, 5 / 12] if aligned else [0, 0.4, 0.8, 1, 0.5]
        assert [rate.lr_scale for rate in rates] == pytest.approx(shape)
        momenta = [None] * 5 if aligned else [0.9, 0.86, 0.82, 0.8, 0.85]
        assert [rate.momentum for rate in rates] == pytest.approx(momenta)
        loss = given.loss.inner if aligned else given.loss
        assert isinstance(given.loss, GradAlign) == aligned
        if method.endswith("-uiat"):
            assert loss == Align(weight=3.5) and isinstance(given.target, OneOff) and given.target.start == 0.8
            assert given.target.inner.radius == 4 * px and given.target.inner.objective.beta == 0
            assert (
                evolve(given, target=None, loss=GradAlign() if aligned else CrossEntropy())
                == FAMILY[f"{method.removesuffix('-uiat')}-{epsilon}"]
            )
        else:
            assert loss == CrossEntropy() and given.target is None
        assert {measure.key for _, measure in given.measures()} == {"clean", "pgd-20", "cw", "autoattack", "pgd-50-10"}
