"""PGD against a per-image loop, closed forms on linear models, and everything that it must leave alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import (
    CLASSES,
    SHAPE,
    LinearModel,
    Plain,
    assert_same,
    at_epoch,
    images,
    labels,
    scene,
    snapshot,
    statistics,
    tiny_model,
    tracked,
)
from torch import Tensor
from torch.nn import functional as F

from robustkit.attacks import PGD, climb
from robustkit.core.batch import Budget, Output, Passes
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe
from robustkit.core.rng import whole
from robustkit.core.strategy import Reference
from robustkit.datasets import Synthetic
from robustkit.epsilons import ECAS, Fixed
from robustkit.objectives import KL, CrossEntropyObjective, InverseObjective, Margin
from robustkit.threats import L2, Linf

RADII = torch.tensor([0.0, 0.01, 0.03, 0.1, 0.3, 0.6])
STRIDES = torch.tensor([0.01, 0.02, 0.004, 0.05, 0.08, 0.3])
THREATS = [Linf(), L2()]


def model64() -> torch.nn.Module:
    return tiny_model().double()


def run(attack: PGD, model: torch.nn.Module, x: Tensor, budget: Budget, threat: Any, seed: int = 0, **more: Any):
    return attack(Plain(model), x, labels(len(x)), budget, threat, whole(x, seed), **more)


def norm(perturbation: Tensor, threat: Any) -> Tensor:
    order = {"Linf": math.inf, "L2": 2}[threat.norm]
    return torch.linalg.vector_norm(perturbation.flatten(1), ord=order, dim=1)


# One image at a time, with nothing but `torch.autograd.grad` on a batch of one: the reference.

LOSSES = {
    "cross-entropy": lambda out, y, natural: -out.log_softmax(1)[0, y],
    "kl": lambda out, y, natural: (natural.softmax(1) * (natural.log_softmax(1) - out.log_softmax(1))).sum(),
    "margin": lambda out, y, natural: torch.minimum(
        torch.stack([out[0, k] - out[0, y] for k in range(CLASSES) if k != y]).max(), 0 * out.sum()
    ),
}
OBJECTIVES = {"cross-entropy": CrossEntropyObjective(), "kl": KL(), "margin": Margin()}


def one_by_one(
    model: torch.nn.Module, loss: Any, start: Tensor, x: Tensor, threat: Any, strides: Tensor, steps: list[int]
) -> Tensor:
    model = model.eval()
    y = labels(len(x)).tolist()
    found = []
    for i in range(len(x)):
        original, current = x[i : i + 1], start[i : i + 1].clone()
        radius, stride = float(RADII[i]), float(strides[i])
        with torch.no_grad():
            natural = model(original).logits
        for _ in range(steps[i]):
            current = current.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(current).logits, y[i], natural), current)
            current = current.detach()
            if threat.norm == "Linf":
                delta = (current + stride * gradient.sign() - original).clamp(-radius, radius)
            else:
                length = float(gradient.square().sum().sqrt())
                delta = current - original + (stride / length if length else 0) * gradient
                delta = delta * min(1.0, radius / max(float(delta.square().sum().sqrt()), 1e-30))
            current = (original + delta).clamp(0, 1)
        found.append(current.detach())
    return torch.cat(found)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("start", ["clean", "gaussian", "uniform"])
def test_a_batch_is_attacked_as_its_images_one_by_one(threat: Any, name: str, start: Any) -> None:
    """With radii, step sizes and numbers of steps of their own."""
    if name == "kl" and start == "clean":
        pytest.skip("from x itself KL has no gradient but rounding")
    model, x = model64(), images(6).double()
    steps = torch.tensor([3, 0, 1, 4, 5, 2])
    budget = Budget(RADII.double(), STRIDES.double(), steps, max_steps=5)
    attack = PGD(objective=OBJECTIVES[name], start=start, noise=0.02)
    begun = {
        "clean": x,
        "gaussian": x + 0.02 * whole(x, 0).normal(x),
        "uniform": threat.random(x, RADII.double(), whole(x, 0)),
    }[start]
    found = run(attack, model, x, budget, threat)
    wanted = one_by_one(model, LOSSES[name], begun, x, threat, STRIDES, steps.tolist())
    # An image that takes no step is still brought into its ball and the box.
    wanted[1] = threat.project(begun[1:2], x[1:2], RADII[1:2].double())[0]
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    assert norm(found - x, threat)[2:].max() > 1e-3


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("objective", [CrossEntropyObjective(), KL(), Margin(), Margin(clamp=False)])
@pytest.mark.parametrize("start", ["clean", "gaussian", "uniform"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_result_is_allowed(threat: Any, objective: Any, start: Any, steps: int) -> None:
    """UIAT 21, ECAS 7: within each image's own radius and the box; a radius of 0 moves nothing; nothing to train."""
    model, x = tiny_model(), images(6)
    x[:, :, :2], x[:, :, 2:4] = 0.0, 1.0  # many pixels at the border of the box
    for stride in (None, STRIDES):
        found = run(PGD(objective=objective, start=start, steps=steps), model, x, Budget(RADII, stride), threat)
        assert (norm(found - x, threat) <= RADII + 1e-6).all()
        assert found.min() >= 0 and found.max() <= 1
        assert torch.equal(found[0], x[0])
        assert found.shape == x.shape and found.dtype == x.dtype and not found.requires_grad


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_draws_are_a_function_of_the_generator(start: Any) -> None:
    model, x = tiny_model(), images(6)
    attack = PGD(start=start, steps=2)
    once = run(attack, model, x, Budget(RADII), Linf(), seed=4)
    assert torch.equal(once, run(attack, model, x, Budget(RADII), Linf(), seed=4))
    assert not torch.equal(once, run(attack, model, x, Budget(RADII), Linf(), seed=5))


def test_gaussian_start_is_not_clipped() -> None:
    """TRADES: x + 0.001 N(0, 1), not brought into the ball before the first step (ECAS sheet 6.1)."""
    x = torch.zeros(4, 2, 32, 32)
    y = torch.zeros(4, dtype=torch.int64)
    seen = []

    class Watch(Plain):
        def __call__(self, given: Tensor) -> Output:
            seen.append(given.detach().clone())
            flat = given.flatten(1)[:, :CLASSES]
            return Output(flat, flat, flat, flat.new_zeros(len(flat)))

    PGD(start="gaussian", steps=1)(Watch(tiny_model()), x, y, Budget(torch.full((4,), 1e-4)), Linf(), whole(x, 0))
    assert float(seen[0].std()) == pytest.approx(0.001, rel=0.05) and seen[0].min() < -0.002


def test_step_sizes() -> None:
    """The attack's own, else the budget's, else a quarter of each image's radius."""
    model, x = LinearModel(CLASSES, 72), torch.full((6, *SHAPE), 0.5)
    own, small = PGD(start="clean", steps=1, step_size=0.003), PGD(start="clean", steps=1)
    radii = torch.tensor([0.01, 0.02, 0.04, 0.08, 0.1, 0.2])
    assert norm(run(own, model, x, Budget(radii), Linf()) - x, Linf()).tolist() == pytest.approx([0.003] * 6, rel=1e-4)
    assert norm(run(small, model, x, Budget(radii), Linf()) - x, Linf()).tolist() == pytest.approx(
        [r / 4 for r in radii.tolist()], rel=1e-4
    )
    given = radii / 7
    assert norm(run(small, model, x, Budget(radii, given), Linf()) - x, Linf()).tolist() == pytest.approx(
        given.tolist(), rel=1e-4
    )


def linear_case(count: int = 8, seed: int = 3) -> tuple[LinearModel, Tensor, Tensor]:
    model = LinearModel(2, 72, seed).double()
    x = 0.4 + 0.2 * images(count, seed).double()
    return model, x, labels(count, 2)


def test_linear_model_linf_closed_form() -> None:
    """ECAS 8: two classes and enough travel give x + eps sign(w_other - w_y), and no step loses anything."""
    model, x, y = linear_case()
    radii = torch.linspace(0.0, 0.35, 8).double()
    away = torch.stack([model.weight[1 - k] - model.weight[k] for k in y.tolist()]).detach().view_as(x)
    wanted = x + radii.view(-1, 1, 1, 1) * away.sign()
    assert wanted.min() >= 0 and wanted.max() <= 1
    for steps, step_size in ((10, radii / 4), (2, radii), (20, radii / 10)):
        for objective in (CrossEntropyObjective(), Margin(clamp=False)):
            found = PGD(steps=steps, objective=objective)(
                Plain(model), x, y, Budget(radii, step_size), Linf(), whole(x, 0)
            )
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    losses = []

    def value(given: Tensor) -> Tensor:
        each = F.cross_entropy(model(given).logits, y, reduction="none")
        losses.append(each.detach())
        return each

    start = Linf().random(x, radii, whole(x, 0))
    climb(value, start, x, threat=Linf(), epsilon=radii, step_size=radii / 4, steps=12)
    assert all((after >= before - 1e-12).all() for before, after in pairwise(losses))


def test_linear_model_l2_closed_form() -> None:
    model, x, y = linear_case()
    radii = torch.linspace(0.05, 0.35, 8).double()
    away = torch.stack([model.weight[1 - k] - model.weight[k] for k in y.tolist()]).detach()
    wanted = x + (radii[:, None] * away / away.norm(dim=1, keepdim=True)).view_as(x)
    for attack in (PGD(start="clean", steps=4), PGD(steps=200)):
        found = attack(Plain(model), x, y, Budget(radii), L2(), whole(x, 0))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert ((found - x).flatten(1).norm(dim=1) - radii).abs().max() < 1e-6


def test_pgd_finds_the_worst_of_a_small_box_exactly() -> None:
    """With the box active: each pixel goes as far as ball and box let it."""
    model, _, y = linear_case()
    x = images(8, 5).double()
    away = torch.stack([model.weight[1 - k] - model.weight[k] for k in y.tolist()]).detach().view_as(x)
    wanted = torch.where(away > 0, (x + 0.3).clamp_max(1), (x - 0.3).clamp_min(0))
    found = PGD()(Plain(model), x, y, Budget(torch.full((8,), 0.3, dtype=torch.float64)), Linf(), whole(x, 0))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_negated_cross_entropy_is_inverse_descent() -> None:
    """UIAT 8: with n = K, eps' = eps and beta = 0 the inverse loop is PGD with the loss negated."""
    model, x = model64(), images(6).double()
    budget = Budget(RADII.double(), STRIDES.double())
    found = run(PGD(steps=5, objective=InverseObjective(beta=0), start="clean"), model, x, budget, Linf())
    wanted = one_by_one(model, lambda out, y, natural: out.log_softmax(1)[0, y], x, x, Linf(), STRIDES, [5] * 6)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    easier = F.cross_entropy(model(found).logits, labels(6), reduction="none")
    plain = F.cross_entropy(model(x).logits, labels(6), reduction="none")
    assert (easier[1:] < plain[1:]).all()


def test_steps_per_image() -> None:
    """Equal numbers are plain PGD of so many steps; others stop on their own (ECAS 16, attack part)."""
    model, x = model64(), images(6).double()
    attack = PGD(steps=99)
    for count in (1, 3):
        masked = run(attack, model, x, Budget(RADII.double(), None, torch.full((6,), count), max_steps=6), Linf())
        assert torch.equal(masked, run(PGD(steps=count), model, x, Budget(RADII.double()), Linf()))
    mixed = run(attack, model, x, Budget(RADII.double(), None, torch.tensor([1, 3, 1, 3, 1, 3]), max_steps=3), Linf())
    for count, rows in ((1, slice(0, 6, 2)), (3, slice(1, 6, 2))):
        plain = run(PGD(steps=count), model, x, Budget(RADII.double()), Linf())
        torch.testing.assert_close(mixed[rows], plain[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_final_and_start_radius(threat: Any) -> None:
    """ECAS 11, ECAS sheet 3.2: every image starts in one ball; at the end min(own radius, final radius) holds."""
    model, x = tiny_model(), torch.full((6, *SHAPE), 0.5)
    attack = PGD(start_epsilon=8 / 255, final_epsilon=8 / 255, steps=10)
    for k in (6, 8, 9, 15):
        for own in (k, 6, 13):
            radii = torch.full((6,), own / 255)
            found = run(attack, model, x, Budget(radii, torch.full((6,), 0.2 * k / 255)), threat)
            assert norm(found - x, threat).max() <= min(own, 8) / 255 + 1e-6
    found = run(attack, model, x, Budget(torch.full((6,), 15 / 255)), threat)
    assert norm(found - x, threat).max() > 7.9 / 255  # and the ball is used
    start = run(PGD(start_epsilon=8 / 255, steps=0), model, x, Budget(torch.full((6,), 20 / 255)), threat)
    assert 0 < norm(start - x, threat).max() <= 8 / 255 + 1e-6
    for final in (None, 0.2):
        attack = PGD(start_epsilon=0.3, final_epsilon=final, steps=0)
        wide = run(attack, model, x, Budget(torch.full((6,), 0.01)), threat)
        assert norm(wide - x, threat).max() <= 0.01 + 1e-6


def test_reference_is_read_once_and_constant() -> None:
    model, x = tiny_model(), images(6)
    calls = []

    class Count(Plain):
        def __call__(self, given: Tensor) -> Output:
            calls.append(torch.is_grad_enabled())
            return super().__call__(given)

    for objective, reference, wanted in (
        (CrossEntropyObjective(), None, [True] * 4),
        (KL(), None, [False] + [True] * 4),
        (KL(), Reference(natural=Plain(model)(x)), [True] * 4),
    ):
        calls.clear()
        PGD(steps=4, objective=objective)(
            Count(model), x, labels(6), Budget(RADII), Linf(), whole(x, 0), reference=reference
        )
        assert calls == wanted
    progress = at_epoch(0, 10)
    assert PGD(steps=4).passes(progress) == Passes(4, 4)
    assert PGD(steps=4, objective=KL()).passes(progress) == Passes(5, 4)


# What an attack must leave alone (UIAT 27, 29; ECAS 10).


def with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """The model with gradients already there, which must survive."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train-frozen"])
@pytest.mark.parametrize("objective", [CrossEntropyObjective(), KL(), Margin()])
def test_an_attack_leaves_no_trace(training: bool, gradients: bool, mode: Any, objective: Any) -> None:
    model = tiny_model().train(training)
    if gradients:
        with_gradients(model)
    given = scene(model)
    before = snapshot(model)
    PGD(mode=mode, objective=objective, steps=3)(
        given.predict, given.batch.x, given.batch.y, Budget(RADII), Linf(), given.generator("attack")
    )
    assert_same(before, snapshot(model))
    assert all((parameter.grad is None) != gradients for parameter in model.parameters())


def test_mode_train_moves_statistics_and_nothing_else() -> None:
    model = tiny_model()
    given, seen = scene(model), tracked(tiny_model())
    before = snapshot(model)
    PGD(mode="train", steps=3)(
        given.predict, given.batch.x, given.batch.y, Budget(RADII), Linf(), given.generator("attack")
    )
    assert tracked(model) == seen + 3
    after = snapshot(model)
    moved = {f"state {name}" for name in statistics(model)}
    assert_same({k: v for k, v in before.items() if k not in moved}, {k: v for k, v in after.items() if k not in moved})


@pytest.mark.parametrize("mode", ["eval", "train", "train-frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_returns_from_an_exception_as_it_was(mode: Any, training: bool) -> None:
    model = with_gradients(tiny_model()).train(training)
    given = scene(model)

    class Broken(Plain):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__(model)
            self.calls = 0

        def __call__(self, given: Tensor) -> Output:
            self.calls += 1
            if self.calls == 3:
                raise FloatingPointError("in the middle")
            return super().__call__(given)

        @contextmanager
        def using(self, mode: Any) -> Iterator["Broken"]:
            with self.model.using(mode):
                yield self

    before = snapshot(model)
    with pytest.raises(FloatingPointError):
        PGD(mode=mode)(Broken(model), given.batch.x, given.batch.y, Budget(RADII), Linf(), given.generator("attack"))
    if mode == "train":  # statistics may have moved; flags and gradients not
        before = {k: v for k, v in before.items() if not k.startswith("state")}
    after = {k: v for k, v in snapshot(model).items() if k in before}
    assert_same(before, after)


def test_eval_mode_attacks_the_net_that_is_judged() -> None:
    """In eval mode an image's attack does not depend on its batch; with batch statistics it does."""
    model, x = tiny_model(), images(6)
    alone = PGD(start="clean")(Plain(model), x[:1], labels(1), Budget(RADII[3:4]), Linf(), whole(x[:1], 0))
    for mode, same in (("eval", True), ("train-frozen", False)):
        found = PGD(start="clean", mode=mode)(
            Plain(model), x, labels(6), Budget(RADII[3].repeat(6)), Linf(), whole(x, 0)
        )
        assert torch.allclose(found[:1], alone, atol=1e-6) == same


def test_inputs_are_not_changed() -> None:
    model, x, y = tiny_model(), images(6), labels(6)
    kept, radii, steps = x.clone(), RADII.clone(), torch.tensor([1, 2, 0, 3, 1, 2])
    for start in ("clean", "gaussian", "uniform"):
        PGD(start=start)(Plain(model), x, y, Budget(radii, None, steps, max_steps=3), Linf(), whole(x, 0))
    assert torch.equal(x, kept) and torch.equal(radii, RADII) and not x.requires_grad
    assert torch.equal(steps, torch.tensor([1, 2, 0, 3, 1, 2])) and torch.equal(y, labels(6))


def recipe(**changes: Any) -> Recipe:
    from robustkit.core.model import Model
    from robustkit.losses import CrossEntropy
    from robustkit.schedules import Constant

    settings = {"threat": Linf(), "attack": PGD(), "loss": CrossEntropy(), "schedule": Constant(), "epochs": 1}
    return Recipe(data=Synthetic(), model=Model(backbone="convnet_small"), **(settings | changes))


@pytest.mark.parametrize("epsilon", [ECAS(), Fixed(step_fraction=0.2)])
def test_two_step_sizes_are_refused(epsilon: Any) -> None:
    assert recipe(epsilon=epsilon).attack == PGD()
    assert recipe(attack=PGD(step_size=0.01)).epsilon == Fixed()
    with pytest.raises(RecipeError, match="step size"):
        recipe(epsilon=epsilon, attack=PGD(step_size=0.01))
