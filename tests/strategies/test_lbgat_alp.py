"""LBGAT and ALP: values from naive loops, gradients, limits, costs; and LBGAT's teacher, which is trained along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_losses import PROGRESS, B, K, draw, log_probability, output
from test_passes import one_step, parts_of, recipe, rows, weights_after
from tiny import assert_same, batch, images, labels, scene, snapshot, tiny_model, tracked, world
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit import Model, evolve, load, resume, run
from robustkit.attacks import LDAT, PGD, RSFGSM
from robustkit.core import checkpoint
from robustkit.core.batch import Budget, Part, Passes
from robustkit.core.errors import RecipeError
from robustkit.core.loop import step_passes, train_step
from robustkit.core.parts import Parts
from robustkit.core.recipe import Precision, Suite, Validation
from robustkit.core.strategy import build
from robustkit.datasets import Synthetic
from robustkit.evaluation import Clean
from robustkit.heads import GaussianMixture
from robustkit.losses import ALP, LBGAT, GradAlign, Mixed
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.runs import evaluate_run
from robustkit.testing import check, tiny_recipe
from robustkit.weights import AWP, Exponential

TEACHER = Model(backbone="convnet_small")
GUIDED: dict[str, Any] = {"loss": LBGAT(teacher=TEACHER), "attack": PGD(objective=KL(), start="gaussian")}


pytestmark = pytest.mark.usefixtures("no_figures")


def views(**logits: Tensor) -> dict[str, Any]:
    return {name: output(values) for name, values in logits.items()}


def differences(value: Any, logits: dict[str, Tensor], name: str) -> Tensor:
    """The gradient of `value` with respect to one view's logits, by central differences."""
    step, found = 1e-5, torch.zeros_like(logits[name])
    for i in range(found.shape[0]):
        for k in range(found.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = logits[name].clone()
                moved[i, k] += sign * step
                ends.append(float(value(logits | {name: moved})))
            found[i, k] = (ends[0] - ends[1]) / (2 * step)
    return found


def mean_square(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = [(p, q) for one, other in zip(a, b, strict=True) for p, q in zip(one, other, strict=True)]
    return sum((p - q) ** 2 for p, q in pairs) / len(pairs)


def mean_ce(rows: list[list[float]], y: list[int], smoothing: float = 0.0) -> float:
    total = 0.0
    for row, true in zip(rows, y, strict=True):
        share = [smoothing / len(row) + (1 - smoothing) * (k == true) for k in range(len(row))]
        total -= sum(p * log_probability(row, k) for k, p in enumerate(share))
    return total / len(rows)


# ALP


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, B])
def test_alp_from_the_definition(count: int, smoothing: float) -> None:
    """10.2: half a cross-entropy each, and the mean square over images and classes."""
    natural, adversarial, given = draw(0, count, K), draw(1, count, K), batch(count)
    loss = ALP(weight=0.7, label_smoothing=smoothing)
    terms = loss(views(natural=natural, adversarial=adversarial), None, given, {}, PROGRESS)
    z, z_adv, y = natural.tolist(), adversarial.tolist(), given.y.tolist()
    wanted = (mean_ce(z, y, smoothing) + mean_ce(z_adv, y, smoothing)) / 2 + 0.7 * mean_square(z, z_adv)
    assert float(sum(terms.values())) == pytest.approx(wanted, rel=1e-9)
    assert set(terms) == {"natural", "adversarial", "pairing"} and all(term.shape == () for term in terms.values())


def test_alp_pairs_equal_logits_for_nothing() -> None:
    """15."""
    logits = draw(0, B, K)
    assert float(ALP()(views(natural=logits, adversarial=logits), None, batch(B), {}, PROGRESS)["pairing"]) == 0.0


@pytest.mark.parametrize("name", ["natural", "adversarial"])
def test_alp_s_gradient_by_finite_differences(name: str) -> None:
    """Through both."""
    logits = {"natural": draw(0, B, K), "adversarial": draw(1, B, K)}

    def value(given: dict[str, Tensor]) -> Tensor:
        return sum(ALP()(views(**given), None, batch(B), {}, PROGRESS).values())

    leaf = logits[name].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(logits | {name: leaf}), leaf)
    torch.testing.assert_close(gradient, differences(value, logits, name), atol=1e-8, rtol=1e-6)


def test_alp_puts_the_margin_into_the_cross_entropies_alone() -> None:
    natural, adversarial, margined = draw(0, B, K), draw(1, B, K), draw(2, B, K)
    plain = ALP()(views(natural=natural, adversarial=adversarial), None, batch(B), {}, PROGRESS)
    headed = {"natural": output(natural, margined), "adversarial": output(adversarial, margined)}
    terms = ALP()(headed, None, batch(B), {}, PROGRESS)
    wanted = float(F.cross_entropy(margined, labels(B))) / 2
    assert float(terms["natural"]) == float(terms["adversarial"]) == pytest.approx(wanted)
    assert terms["pairing"] == plain["pairing"]


@pytest.mark.parametrize("joint", [True, False])
def test_alp_without_weight_is_mixed_training(joint: bool) -> None:
    """15: a whole step, the head's likelihood term included."""
    head = {"head": GaussianMixture(likelihood_schedule="constant"), "attack": LDAT(steps=2)}
    theirs = weights_after({"loss": Mixed(beta=0.5, joint=joint), **head})
    ours = weights_after({"loss": ALP(weight=0.0, joint=joint), **head})
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_alp_shares_a_forward() -> None:
    """0.2: [clean; adversarial] in one batch; `joint` false parts them."""
    x_adv = images(B, 5)
    for joint in (True, False):
        prepared = ALP(joint=joint).prepare(scene(tiny_model()), Budget(torch.full((B,), 0.1)), x_adv)
        assert list(prepared.views) == ["natural", "adversarial"] and prepared.joint == joint
        parts = parts_of(recipe(loss=ALP(joint=joint)))
        assert one_step(parts) == (Passes(12, 10, 2), 1 if joint else 2)


# LBGAT: the terms


@pytest.mark.parametrize("count", [1, B])
@pytest.mark.parametrize("weight", [0.0, 6.0])
def test_lbgat_from_the_definition(count: int, weight: float) -> None:
    """10.1, one number at a time."""
    natural, adversarial, teacher = (draw(seed, count, K) for seed in range(3))
    given = batch(count)
    runtime = build(LBGAT(weight=weight, teacher=TEACHER), world())
    terms = runtime(views(natural=natural, adversarial=adversarial, teacher=teacher), None, given, {}, PROGRESS)
    z, z_adv, t, y = natural.tolist(), adversarial.tolist(), teacher.tolist(), given.y.tolist()
    wanted = mean_square(z_adv, t) + mean_ce(t, y)
    for row, row_adv in zip(z, z_adv, strict=True):
        p = [log_probability(row, k) for k in range(K)]
        q = [log_probability(row_adv, k) for k in range(K)]
        wanted += weight / count * sum(2.718281828459045**a * (a - b) for a, b in zip(p, q, strict=True))
    assert float(sum(terms.values())) == pytest.approx(wanted, rel=1e-6)
    assert set(terms) == {"guidance", "teacher", "consistency"} and all(term.shape == () for term in terms.values())


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("name", ["natural", "adversarial", "teacher"])
def test_lbgat_s_gradient_by_finite_differences(name: str, weight: float) -> None:
    """No stop-gradient: the teacher feels the square, too, and both of the model's branches the KL."""
    logits = {"natural": draw(0, B, K), "adversarial": draw(1, B, K), "teacher": draw(2, B, K)}
    runtime = build(LBGAT(weight=weight, teacher=TEACHER), world())

    def terms(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return runtime(views(**given), None, batch(B), {}, PROGRESS)

    leaf = logits[name].clone().requires_grad_()
    found = sum(terms(logits | {name: leaf}).values())
    (gradient,) = torch.autograd.grad(found, leaf, allow_unused=True)

    def value(given: dict[str, Tensor]) -> Tensor:
        """In double precision, where the code takes the KL in single."""
        p, q = (given[view].log_softmax(dim=1) for view in ("natural", "adversarial"))
        square = (given["adversarial"] - given["teacher"]).square().mean()
        return square + F.cross_entropy(given["teacher"], labels(B)) + weight * (p.exp() * (p - q)).sum(dim=1).mean()

    wanted = differences(value, logits, name)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)
    assert bool((wanted != 0).any()) == (name != "natural" or weight > 0)


def test_lbgat_s_square_is_least_where_the_model_says_what_the_teacher_says() -> None:
    """15: with weight 0 and a teacher that gives z*, z* is the minimiser."""
    runtime, star = build(LBGAT(weight=0.0, teacher=TEACHER), world()), draw(2, B, K)

    def value(adversarial: Tensor) -> Tensor:
        given = views(natural=draw(0, B, K), adversarial=adversarial, teacher=star)
        return sum(runtime(given, None, batch(B), {}, PROGRESS).values())

    leaf = star.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    assert bool((gradient == 0).all())
    assert all(float(value(star + 0.1 * draw(seed, B, K))) > float(value(star)) for seed in range(5, 9))


def test_lbgat_s_views() -> None:
    """The order of its authors' code: x_adv, then x, then x by the teacher."""
    model, x_adv = tiny_model(), images(B, 5)
    runtime = build(LBGAT(teacher=TEACHER), world())
    before, kept, given = snapshot(model), snapshot(runtime.teacher), scene(model)
    prepared = runtime.prepare(given, Budget(torch.full((B,), 0.1)), x_adv)
    assert list(prepared.views) == ["adversarial", "natural", "teacher"] and not prepared.joint
    assert prepared.views["adversarial"] is x_adv and prepared.views["natural"] is given.batch.x
    assert prepared.views["teacher"] is given.batch.x and prepared.networks == {"teacher": runtime.teacher}
    assert prepared.shares == {"adversarial": 0.5, "natural": 0.5, "teacher": 0.0}
    assert_same(before, snapshot(model))
    assert_same(kept, snapshot(runtime.teacher))


# LBGAT: the teacher


def teacher_of(parts: Parts) -> Any:
    return parts.strategies["loss"].teacher


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_the_teacher_starts_with_weights_of_its_own() -> None:
    """Even where it has the model's architecture, and the same from run to run."""
    one, again, other = (parts_of(recipe(**GUIDED, seed=seed)) for seed in (1, 1, 2))
    weights = [next(teacher_of(parts).parameters()) for parts in (one, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape == next(one.model.parameters()).shape
    assert not torch.equal(weights[0], next(one.model.parameters()))


def test_the_model_s_step_sees_no_label() -> None:
    """15: labels reach it through the teacher, from the next step on."""
    found = []
    for turned in (0, 1):
        parts = parts_of(recipe(**GUIDED))
        parts.train.labels.add_(turned).remainder_(4)
        train_step(parts, rows(parts))
        found.append((copied(parts.model), copied(teacher_of(parts))))
    (model, teacher), (same, different) = found
    assert all(torch.equal(model[name], same[name]) for name in model)
    assert any(not torch.equal(teacher[name], different[name]) for name in teacher)


@pytest.mark.parametrize("weight", [0.0, 6.0])
def test_a_step_from_the_formulas(weight: float) -> None:
    """Both networks, batch statistics of each view apart, the teacher drawn towards the model as well."""
    attack, lr = PGD(steps=0, objective=KL(), start="gaussian", noise=0.05), 0.05
    given = recipe(loss=LBGAT(weight=weight, teacher=TEACHER), attack=attack, optimizer=SGD(lr=lr, weight_decay=0.0))
    parts, plain = parts_of(given), parts_of(given)
    chosen = rows(parts)
    x, y = parts.train.fetch(chosen).float() / 255, parts.train.labels[chosen]
    noise = parts.world.generator("attack", parts.progress, Part(0, len(y), len(y))).normal(x)
    x_adv = (x + 0.05 * noise).clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
    model, teacher = plain.model.train(), teacher_of(plain).train()
    z_adv, z, t = model(x_adv).logits, model(x).logits, teacher(x).logits
    p, q = z.log_softmax(dim=1), z_adv.log_softmax(dim=1)
    objective = (z_adv - t).square().mean() + F.cross_entropy(t, y) + weight * (p.exp() * (p - q)).sum(1).mean()
    objective.backward()
    train_step(parts, chosen)
    for ours, theirs in ((parts.model, model), (teacher_of(parts), teacher)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach() - lr * b.grad, atol=1e-6, rtol=1e-4)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, AWP(gamma=0.01)], ids=["", "AWP"])
def test_the_teacher_in_a_step(weights: Any) -> None:
    """In training mode, its statistics move once; AWP does not displace it, and its probe leaves them alone."""
    parts = parts_of(recipe(**GUIDED, **({} if weights is None else {"weights": weights})))
    teacher, seen = teacher_of(parts), []
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms

    def noting(module: nn.Module, _: Any) -> None:
        modes = {(norm.training, norm.track_running_stats) for norm in norms}
        seen.append((modes, copied(module), copied(parts.model)))

    handle = teacher.register_forward_pre_hook(noting)
    teacher.eval()  # whatever somebody did with it
    before, model = copied(teacher), copied(parts.model)
    train_step(parts, rows(parts))
    handle.remove()
    modes = [{(True, True)}] if weights is None else [{(True, False)}, {(True, True)}]
    assert [mode for mode, _, _ in seen] == modes
    for _, state, _ in seen:
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert tracked(teacher) == 1 and tracked(parts.model) == 2
    displaced = [name for name, p in parts.model.named_parameters() if not torch.equal(seen[-1][2][name], model[name])]
    assert bool(displaced) == (weights is not None)
    after = copied(teacher)
    assert all(not torch.equal(after[name], before[name]) for name, _ in teacher.named_parameters())


def test_the_teacher_s_precision_is_that_of_the_outer_pass() -> None:
    for outer in ("fp32", "bf16"):
        parts = parts_of(recipe(**GUIDED, precision=Precision(attack="fp32", outer=outer)))
        seen: list[bool] = []

        def noting(*_: Any, seen: list[bool] = seen) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))

        teacher_of(parts).head.register_forward_hook(noting)
        train_step(parts, rows(parts))
        assert seen == [outer == "bf16"]


def test_the_teacher_is_trained_by_the_recipe_s_optimiser() -> None:
    """In one group with the backbone; its normalisations with the model's, where they are spared decay."""
    parts = parts_of(recipe(**GUIDED, optimizer=SGD(lr=0.1, decay_norm=False)))
    decay = {id(p): group["weight_decay"] for group in parts.optimizer.param_groups for p in group["params"]}
    teacher = teacher_of(parts)
    assert len(decay) == len(list(parts.model.parameters())) + len(list(teacher.parameters()))
    for network in (parts.model, teacher):
        norms = {id(p) for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        assert norms and {decay[i] for i in norms} == {0.0}
        assert {decay[id(p)] for p in network.parameters() if id(p) not in norms} == {5e-4}


# What a step costs


@pytest.mark.parametrize(
    ("changes", "counted", "units", "norms"),
    [
        ({"loss": ALP()}, (12, 10, 2), 26, 1),
        (GUIDED, (14, 10, 3), 30, 2),  # 13 forwards and 2 backwards, and one each of the teacher
        (GUIDED | {"loss": LBGAT(weight=0.0, teacher=TEACHER)}, (14, 10, 3), 30, 2),
        (GUIDED | {"weights": AWP()}, (17, 10, 5), 37, 2),  # the probe needs no gradient of the teacher
        ({"loss": ALP(), "weights": AWP()}, (14, 10, 4), 32, 1),
    ],
    ids=["ALP", "LBGAT6", "LBGAT0", "LBGAT-AWP", "ALP-AWP"],
)
def test_a_step_costs_what_the_sheet_says(
    changes: dict[str, Any], counted: tuple[int, int, int], units: int, norms: int
) -> None:
    """31: hooks count, the teacher's passes too, the recipe declares, and both equal the sheet."""
    parts = parts_of(recipe(**changes))
    declared = step_passes(parts.recipe, parts.progress)
    found, seen = one_step(parts)
    assert found == declared == Passes(*counted) and found.units == units and seen == norms


# Together with others


@pytest.mark.parametrize("loss", [ALP(weight=0.0), ALP(joint=False, label_smoothing=0.1), LBGAT(weight=0.0)], ids=str)
def test_contracts(loss: Any) -> None:
    check(loss)


def test_grad_align_takes_them() -> None:
    fgsm = RSFGSM(noise=0, mode="train-frozen")
    for inner in (ALP(joint=False), LBGAT(teacher=TEACHER)):
        parts = parts_of(recipe(loss=GradAlign(inner=inner), attack=fgsm))
        declared = step_passes(parts.recipe, parts.progress)
        assert one_step(parts)[0] == declared
    with pytest.raises(RecipeError, match=r"loss\.inner\.joint=false"):
        recipe(loss=GradAlign(inner=ALP()), attack=fgsm)


def test_the_head_s_penalty_is_the_model_s() -> None:
    """Half each from x and x_adv; the teacher has a head of its own, without one."""
    head = GaussianMixture(likelihood=0.5, likelihood_schedule="constant")
    parts = parts_of(recipe(**GUIDED, head=head))
    records = []
    parts.strategies["loss"].observe = records.append
    train_step(parts, rows(parts))
    (record,) = records
    penalties = {name: float(output.penalty.mean()) for name, output in record.outputs.items()}
    assert penalties["teacher"] == 0.0
    wanted = 0.5 * (penalties["natural"] + penalties["adversarial"]) / 2
    assert float(record.terms["penalty"]) == pytest.approx(wanted, rel=1e-5)


# Runs


def guided_recipe(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "data": Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip"),
        "loss": LBGAT(),
        "attack": PGD(steps=2, objective=KL(), start="gaussian"),
        "epochs": 2,
        "validation": Validation(images=12, train_images=0),
        "evaluation": (Suite(measures=(Clean(),)),),
    }
    return tiny_recipe(**given | changes)


TOGETHER = {"weights": AWP(), "average": Exponential(rate=0.8)}


@pytest.mark.parametrize("changes", [{}, TOGETHER], ids=["", "AWP, average"])
def test_a_run_resumed_anywhere_is_the_run_never_stopped(changes: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, the teacher and its momentum included."""
    given = guided_recipe(**changes)
    run(given, out=tmp_path / "whole", device="cpu")
    run(given, out=tmp_path / "parts", device="cpu", max_steps=1)
    for step in (3, 4, 6):
        resume(tmp_path / "parts", device="cpu", max_steps=step)
    assert resume(tmp_path / "parts", device="cpu").stopped == ""
    for name in ("last", "best"):
        files = (tmp_path / folder / "checkpoints" / f"{name}.safetensors" for folder in ("whole", "parts"))
        whole, parts = (checkpoint.read(file)[0] for file in files)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
        taught = {key for key in whole if key.startswith("strategies.loss.teacher.")}
        weights = {name for name, _ in build(given.loss, world()).named_parameters()}
        assert taught and {f"optimizer.strategies.loss.{name}.momentum_buffer" for name in weights} <= whole.keys()


def test_nobody_else_knows_the_teacher(tmp_path: Path) -> None:
    """The model alone is judged and loaded; the log has the teacher's accuracy in training."""
    outcome = run(guided_recipe(), out=tmp_path / "run", device="cpu")
    model = load(tmp_path / "run")
    assert not [name for name in model.state_dict() if "teacher" in name]
    again = evaluate_run(tmp_path / "run", again=True, device="cpu")
    assert again.results["last"]["clean"]["accuracy"] == outcome.results["last"]["clean"]["accuracy"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line)["train"].keys() for line in lines]
    assert all({"right teacher", "term guidance", "term consistency"} <= keys for keys in logged)


def test_smoke_takes_a_teacher_of_the_model_s_architecture() -> None:
    given = recipe(loss=LBGAT(), attack=PGD(objective=KL()))
    assert given.loss.rehearsed(given) == LBGAT(teacher=given.model)
    assert evolve(LBGAT(), weight=0.0).teacher == Model(backbone="resnet18_cifar")
