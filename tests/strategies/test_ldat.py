"""LDAT: its attack against a loop over images with torch's Adam, a step from formulas, its head's other centres."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_passes import parts_of, recipe, rows
from tiny import CLASSES, SHAPE, LinearModel, Plain, images, labels, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit import UserError, evolve
from robustkit.attacks import LDAT, PGD, Within
from robustkit.core.batch import Budget, Output, Passes, Progress
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.rng import whole
from robustkit.core.spec import from_json, to_json
from robustkit.core.strategy import Attack
from robustkit.engine import Predictor
from robustkit.epsilons import Cyclic, Fixed
from robustkit.heads import GaussianMixture
from robustkit.losses import Mixed
from robustkit.objectives import KL
from robustkit.optimizers import SGD
from robustkit.testing import check
from robustkit.threats import L2, Linf

PIXELS = math.prod(SHAPE)
FAR = 1e6
STEPS: tuple[Any, ...] = ("unit", "adam")


def attacked(attack: Any, model: nn.Module, x: Tensor, y: Tensor, radius: Any = FAR, threat: Any = None) -> Tensor:
    """What the attack finds with the radius, or the radii, given."""
    epsilon = torch.as_tensor(radius, dtype=x.dtype).expand(len(x))
    return attack(Plain(model), x, y, Budget(epsilon), threat or L2(), whole(x, 0))


def lengths(x_adv: Tensor, x: Tensor) -> list[float]:
    return [float((a - b).square().sum().sqrt()) for a, b in zip(x_adv, x, strict=True)]


def grey(count: int) -> Tensor:
    """Images from which a perturbation of length 2.5, spread over all pixels, does not leave the box."""
    return 0.5 + 0.02 * (images(count, 3).double() - 0.5)


# The attack, one image at a time


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, step: str, steps: int) -> tuple[list[Tensor], list[float]]:
    """Sheet 9.5 for each image alone: its perturbation, not projected; and the cosines of sum and step."""
    model, found, cosines = model.eval(), [], []
    for image, label in zip(x, y.tolist(), strict=True):
        length, d = 1.0, torch.zeros_like(image, requires_grad=True)
        adam = torch.optim.Adam([d], lr=0.2, maximize=True)
        for _ in range(steps):
            logits = model((image + d)[None]).logits[0]
            loss = torch.logsumexp(logits, dim=0) - logits[label]
            (gradient,) = torch.autograd.grad(loss, d)
            length *= 0.8 if int(logits.argmax()) != label else 1.2
            before = d.detach().clone()
            with torch.no_grad():
                unit = gradient / gradient.square().sum().sqrt()
                if step == "adam":
                    d.grad = unit
                    adam.step()
                else:
                    d += unit
                if float(before.abs().max()) > 0:
                    cosines.append(float(F.cosine_similarity(d.flatten(), (d - before).flatten(), dim=0)))
                d *= length / d.square().sum().sqrt()
        found.append(d.detach())
    return found, cosines


def brought_back(d: Tensor, image: Tensor, radius: float) -> Tensor:
    """First into the ball, then into the box."""
    size = float(d.square().sum().sqrt())
    return (image + d * min(1.0, radius / size)).clamp(0, 1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_batch_is_attacked_as_its_images_one_by_one(step: Any, steps: int) -> None:
    """With radii of their own; some images are misclassified from the start."""
    model, x, y = tiny_model().double(), images(6).double(), labels(6)
    with torch.no_grad():
        y = model.eval()(x).logits.argmax(dim=1)
    y[::2] = (y[::2] + 1) % CLASSES
    radii = torch.tensor([1.5, 0.3, 1.0, 5.0, 0.0, 0.8], dtype=x.dtype)
    found = attacked(LDAT(steps=steps, step=step), model, x, y, radii)
    alone, _ = one_by_one(model, x, y, step, steps)
    wanted = [brought_back(d, image, radius) for d, image, radius in zip(alone, x, radii.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-7, rtol=0)
    assert max(lengths(found, x)) > 0.5


@pytest.mark.parametrize("step", STEPS)
def test_images_do_not_see_each_other(step: Any) -> None:
    model, x, y = tiny_model().double(), images(8).double(), labels(8)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    radii = torch.linspace(0.2, 2.0, 8, dtype=x.dtype)
    found = attacked(LDAT(steps=4, step=step), model, x, y, radii)
    torch.testing.assert_close(
        attacked(LDAT(steps=4, step=step), model, x[order], y[order], radii[order]), found[order], atol=1e-7, rtol=0
    )


# Lengths and directions in closed form


@pytest.mark.parametrize("step", STEPS)
def test_the_first_iterate(step: Any) -> None:
    """26, 27: length 1.2 if right, 0.8 if wrong; along g, or with Adam along sign(g)."""
    model, x = LinearModel(CLASSES, PIXELS).double(), grey(8)
    with torch.no_grad():
        y = model(x).logits.argmax(dim=1)
    right = torch.arange(8) % 3 > 0
    y = torch.where(right, y, (y + 1) % CLASSES)
    found = attacked(LDAT(steps=1, step=step), model, x, y)
    p = model(x).logits.softmax(dim=1)
    gradient = ((p - F.one_hot(y, CLASSES)) @ model.weight).view_as(x).detach()
    along = gradient if step == "unit" else gradient.sign()
    wanted = [1.2 if ok else 0.8 for ok in right.tolist()]
    assert lengths(found, x) == pytest.approx(wanted, rel=1e-6)
    for i, length in enumerate(wanted):
        torch.testing.assert_close(found[i] - x[i], length * along[i] / along[i].norm(), atol=1e-4, rtol=0)


class Steady(nn.Module):
    """Says class 0, whatever the image, with a gradient of +-1 for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = torch.where(images(1, 9).double().flatten() > 0.5, 1.0, -1.0).double()

    def forward(self, x: Tensor) -> Output:
        first = 1 + 1e-3 * x.flatten(1) @ self.signs
        logits = torch.stack([first, *[0 * first] * (CLASSES - 1)], dim=1)
        return Output(logits, logits, logits, 0 * first)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("gamma", [0.2, 0.05])
def test_lengths_of_images_that_stay_right_or_wrong(step: Any, gamma: float) -> None:
    """26: (1 + gamma)^k up to R for those that are always right, (1 - gamma)^k for those that never are."""
    x, y = grey(6), torch.tensor([0, 1, 0, 2, 3, 0])
    for k in range(1, 6):
        attack = LDAT(steps=k, step=step, gamma=gamma)
        growth = [(1 + gamma if label == 0 else 1 - gamma) ** k for label in y.tolist()]
        assert lengths(attacked(attack, Steady(), x, y), x) == pytest.approx(growth, rel=1e-6)
        bounded = [min(length, 1.5) for length in growth]
        assert lengths(attacked(attack, Steady(), x, y, 1.5), x) == pytest.approx(bounded, rel=1e-6)
    assert 1.2**2 < 1.5 < 1.2**3 and pytest.approx(6.19, abs=0.01) == 1.2**10  # the sheet's numbers


def test_one_success_and_one_failure_multiply_by_096() -> None:
    """A threshold on the first pixel alone: the image turns wrong at once, and right again when it comes back."""

    class Threshold(nn.Module):
        def forward(self, x: Tensor) -> Output:
            moved = (x.flatten(1)[:, 0] - 0.5) * 5.0
            logits = torch.stack([1 - moved, moved - 1], dim=1)
            return Output(logits, logits, logits, 0 * moved)

    x, y = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    found = [float((attacked(LDAT(steps=k, step="unit"), Threshold(), x, y) - x).norm()) for k in (1, 2)]
    assert found == pytest.approx([0.5, 0.5])  # out of the box: 1.2, then 0.96
    raw = [lengths(x + one_by_one(Threshold(), x, y, "unit", k)[0][0], x)[0] for k in (1, 2)]
    assert raw == pytest.approx([1.2, 0.96])


def test_unit_steps_on_a_linear_model_go_straight_on() -> None:
    """26: with two classes, all iterates lie along w_other - w_y."""
    model, x, y = LinearModel(2, PIXELS).double(), grey(6), labels(6, 2)
    away = (model.weight[1 - y] - model.weight[y]).detach()
    for k in (1, 2, 5):
        moved = (attacked(LDAT(steps=k, step="unit"), model, x, y, 0.5) - x).flatten(1)
        assert F.cosine_similarity(moved, away).tolist() == pytest.approx([1.0] * 6, abs=1e-9)


@pytest.mark.parametrize("threat", [L2(), Linf()], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("step", STEPS)
def test_the_result_is_in_the_ball_and_the_box(step: Any, threat: Any) -> None:
    model, x, y = tiny_model(), images(6), labels(6)
    radii = torch.tensor([0.0, 0.01, 0.05, 0.3, 1.0, 1.5])
    found = attacked(LDAT(step=step), model, x, y, radii, threat)
    assert not found.requires_grad and float(found.min()) >= 0 and float(found.max()) <= 1
    assert bool((threat.size(found - x) <= radii + 1e-5).all())
    assert float(threat.size(found - x)[1:].min()) > 0.004


def test_ball_before_box() -> None:
    """Clamping first would leave more of the perturbation."""
    model, x, y = LinearModel(2, PIXELS).double(), images(6).double(), labels(6, 2)
    free = torch.stack(one_by_one(model, x, y, "unit", 5)[0])
    assert bool((free.flatten(1).norm(dim=1) > 0.7).any()) and bool(((x + free).clamp(0, 1) != x + free).any())
    shrunk = free * (0.7 / free.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)
    found = attacked(LDAT(steps=5, step="unit"), model, x, y, 0.7)
    torch.testing.assert_close(found, (x + shrunk).clamp(0, 1), atol=1e-9, rtol=0)


# No gradient


class HalfBlind(nn.Module):
    """Sees nothing of images whose first pixel is dark: a gradient of exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LinearModel(CLASSES, PIXELS).double()

    def forward(self, x: Tensor) -> Output:
        sees = (x.flatten(1)[:, :1] > 0.25).to(x.dtype)
        logits = self.inner(x).logits * sees + 1e-3 * torch.arange(CLASSES)
        return Output(logits, logits, logits, logits[:, 0] * 0)


@pytest.mark.parametrize("step", STEPS)
def test_an_image_without_a_gradient_still_moves(step: Any) -> None:
    """26: no NaN, a length as it should be, and the other images are what they are without it."""
    x, y = grey(6), labels(6)
    x[1, 0, 0, 0] = x[4, 0, 0, 0] = 0.0
    found = attacked(LDAT(steps=1, step=step), HalfBlind(), x, y)
    assert bool(found.isfinite().all())
    blind = [i for i in (1, 4) if int(y[i]) != CLASSES - 1]  # misclassified: the bias says the last class
    assert all(0.5 < lengths(found, x)[i] <= 0.8 + 1e-9 for i in blind)
    seeing = [0, 2, 3, 5]
    alone = attacked(LDAT(steps=1, step=step), HalfBlind(), x[seeing], y[seeing])
    torch.testing.assert_close(found[seeing], alone, atol=1e-12, rtol=0)
    again = LDAT(steps=1, step=step)(Plain(HalfBlind()), x, y, Budget(torch.full((6,), FAR)), L2(), whole(x, 99))
    assert torch.equal(found, again)  # nothing is drawn
    for k in (2, 10):
        assert bool(attacked(LDAT(steps=k, step=step), HalfBlind(), x, y).isfinite().all())


def test_saturated_posteriors_give_no_nan() -> None:
    """29: logits a hundred times as large leave the cross-entropy no gradient in float32."""
    model, x = LinearModel(CLASSES, PIXELS), images(8)
    with torch.no_grad():
        model.weight *= 1e4
        y = model(x).logits.argmax(dim=1)
    for step in STEPS:
        found = attacked(LDAT(step=step), model, x, y, 1.5)
        assert bool(found.isfinite().all()) and min(lengths(found, x)) > 0.01


# Adam


def test_adam_forgets_where_it_was() -> None:
    """27: on images of 3072 pixels a step is many times as long as the perturbation: cos(sum, step) > 0.99."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh(), nn.Flatten())
    model = RobustModel(nn.Sequential(layers, nn.Linear(512, 16)), GaussianMixture().build(16, 10), None).double()
    x, y = images(4, shape=(3, 32, 32)).double(), labels(4, 10)
    _, cosines = one_by_one(model, x, y, "adam", 10)
    assert len(cosines) == 36 and min(cosines) > 0.99


def test_the_same_batch_twice_gives_the_same() -> None:
    """27: Adam's state ends with the call."""
    model, x, y = tiny_model(), images(6), labels(6)
    attack = LDAT(steps=5)
    first = attacked(attack, model, x, y, 1.5)
    attacked(attack, model, images(6, 5), y, 1.5)
    assert torch.equal(attacked(attack, model, x, y, 1.5), first)


# What it sees, what it costs


def test_the_attack_sees_no_margin() -> None:
    models = [tiny_model(mixture=True) for _ in range(2)]
    models[0].head.margin, models[1].head.margin = 0.0, 5.0
    x, y = images(6), labels(6)
    predicts = [Predictor(model, torch.device("cpu")) for model in models]
    budget = Budget(torch.full((6,), 1.5))
    one, other = (LDAT(steps=3)(predict, x, y, budget, L2(), whole(x, 0)) for predict in predicts)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "attack",
    [
        LDAT(steps=1),
        LDAT(steps=3, step="unit", gamma=0.0),
        Within(inner=LDAT(steps=2), threat=L2(epsilon=1.5)),
        Within(inner=PGD(steps=2, step_size=0.01, objective=KL(), start="gaussian"), threat=Linf(epsilon=4 / 255)),
    ],
    ids=str,
)
def test_contracts(attack: Any) -> None:
    check(attack)


def test_what_cannot_be_is_refused() -> None:
    for settings in ({"gamma": 1.0}, {"gamma": -0.1}, {"steps": 0}, {"lr": 0.0}, {"step": "sgd"}):
        with pytest.raises(UserError):
            LDAT(**settings)


# Within: a ball of its own


@pytest.mark.parametrize("inner", [PGD(steps=2), PGD(steps=2, step_size=0.1, start="clean"), LDAT(steps=2)], ids=str)
def test_within_is_the_attack_in_the_other_ball(inner: Any) -> None:
    """A share of the recipe's radius is the same share of its own, step sizes of the budget likewise."""
    model, x, y = tiny_model(), images(6), labels(6)
    shares = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25])
    attack, given = Within(threat=L2(epsilon=1.5), inner=inner), Linf(epsilon=8 / 255)
    for sized in (False, True):
        ours = Budget(shares * 8 / 255, shares * 2 / 255 if sized else None)
        theirs = Budget(shares * 1.5, shares * 1.5 / 4 if sized else None)
        found = attack(Plain(model), x, y, ours, given, whole(x, 0))
        wanted = inner(Plain(model), x, y, theirs, L2(epsilon=1.5), whole(x, 0))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert float((found - x).abs().max()) > 2 * 8 / 255  # beyond the ball that judges
        assert bool((L2().size(found - x) <= 1.5 * shares + 1e-4).all())


def test_within_hands_on_what_the_attack_says_of_itself() -> None:
    progress = Progress.at(0, 4, 2)
    attack = Within(inner=PGD(steps=3, objective=KL(), mode="train"))
    assert attack.passes(progress) == Passes(4, 3, 0) and attack.mode == "train" and attack.reach == 1.0
    assert attack.at(progress) is attack and not attack.stops_early
    assert from_json(Attack, to_json(attack)) == attack


def test_within_follows_the_epsilon_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Radii of a cycle, and its steps: what reaches the attack is 1.5 / (8/255) times as large."""
    cyclic, attack = Cyclic(values=(4 / 255, 8 / 255)), Within(threat=L2(epsilon=1.5), inner=PGD(steps=1))
    parts = parts_of(recipe(threat=Linf(epsilon=8 / 255), epsilon=cyclic, attack=attack))
    seen: list[tuple[float, float, Any]] = []
    plain = PGD.__call__

    def noting(self: PGD, predict: Any, x: Tensor, y: Tensor, budget: Budget, threat: Any, generator: Any) -> Tensor:
        assert budget.step_size is not None
        seen.append((float(budget.epsilon.max()), float(budget.step_size.min()), threat))
        return plain(self, predict, x, y, budget, threat, generator)

    monkeypatch.setattr(PGD, "__call__", noting)
    for _ in range(2 * parts.steps_per_epoch):
        train_step(parts, rows(parts))
    radii = [0.75] * parts.steps_per_epoch + [1.5] * parts.steps_per_epoch
    assert [radius for radius, _, _ in seen] == pytest.approx(radii, rel=1e-5)
    assert [step for _, step, _ in seen] == pytest.approx([0.2 * radius for radius in radii], rel=1e-5)
    assert {threat for _, _, threat in seen} == {L2(epsilon=1.5)}
    with pytest.raises(UserError, match=r"attack\.inner\.step_size"):
        recipe(epsilon=Fixed(step_fraction=0.2), attack=Within(inner=PGD(step_size=0.1)))


# A whole step


def test_a_step_from_the_formulas() -> None:
    """9.3, 9.6: one forward of [x; x_adv], margin on, beta and lambda_t where they belong; seen in the centres."""
    beta, margin, weight, lr = 0.3, 0.1, 0.5, 0.05
    head = GaussianMixture(margin=margin, likelihood=2 * weight, likelihood_schedule="down")
    attack = Within(threat=L2(epsilon=0.7), inner=LDAT(steps=2, step="unit"))
    given = recipe(head=head, attack=attack, loss=Mixed(beta=beta), epochs=2, optimizer=SGD(lr=lr, weight_decay=0.01))
    parts = parts_of(given)
    parts.step = parts.steps_per_epoch  # the second of two epochs: lambda is likelihood / 2
    chosen = rows(parts)
    x, y = parts.train.fetch(chosen).float() / 255, parts.train.labels[chosen]
    alone, _ = one_by_one(parts.model, x, y, "unit", 2)
    x_adv = torch.stack([brought_back(d, image, 0.7) for d, image in zip(alone, x, strict=True)])
    features = parts.model.train()(torch.cat([x, x_adv])).features
    before = parts.model.head.centres.detach().clone()
    centres = before.clone().requires_grad_()
    parts = parts_of(given)  # as it was: that forward has moved its statistics
    parts.step = parts.steps_per_epoch
    objective = torch.zeros(())
    for share, half in ((1 - beta, features[: len(y)]), (beta, features[len(y) :])):
        for f, label in zip(half.detach(), y.tolist(), strict=True):
            squared = torch.stack([((f - centre) ** 2).sum() for centre in centres])
            logits = torch.stack([-(1 + margin * (k == label)) * q / 2 for k, q in enumerate(squared)])
            loss = torch.logsumexp(logits, dim=0) - logits[label] + weight * squared[label]
            objective = objective + share * loss / len(y)
    (gradient,) = torch.autograd.grad(objective, centres)
    train_step(parts, chosen)
    wanted = before - lr * (gradient + 0.01 * before)
    torch.testing.assert_close(parts.model.head.centres.detach(), wanted, atol=2e-5, rtol=1e-4)
    assert float((wanted - before).abs().max()) > 1e-2


@pytest.mark.parametrize(("steps", "units"), [(10, 26), (5, 16), (20, 46)])
def test_a_step_costs_2k_plus_6(steps: int, units: int) -> None:
    attack = Within(threat=L2(epsilon=1.5), inner=LDAT(steps=steps))
    given = recipe(attack=attack, loss=Mixed(), head=GaussianMixture())
    assert step_passes(given, Progress.at(0, 5, 2)) == Passes(steps + 2, steps, 2)
    assert step_passes(given, Progress.at(0, 5, 2)).units == units


# The head: fixed centres, and what its scale does


@pytest.mark.parametrize(("classes", "width", "norm"), [(10, 128, 10.0), (100, 512, 3.0), (4, 4, 1.0), (2, 7, 10.0)])
def test_simplex_centres(classes: int, width: int, norm: float) -> None:
    """8.4: |m_k| = C and <m_i, m_j> = -C^2 / (K - 1)."""
    head = GaussianMixture(centres="simplex", centre_norm=norm).build(width, classes)
    products = (head.centres.double() @ head.centres.double().T).tolist()
    for i in range(classes):
        for j in range(classes):
            wanted = norm**2 if i == j else -(norm**2) / (classes - 1)
            assert products[i][j] == pytest.approx(wanted, abs=1e-4 * norm**2)
    assert list(head.parameters()) == [] and set(head.state_dict()) == {"centres"}


def test_simplex_centres_need_as_many_features() -> None:
    with pytest.raises(UserError, match="10 centres of a simplex need as many features, the network has 9") as error:
        GaussianMixture(centres="simplex").build(9, 10)
    assert "head.centres=xavier" in str(error.value)


def test_fixed_centres_stay_and_the_network_learns() -> None:
    head = GaussianMixture(centres="simplex", centre_norm=2.0)
    parts = parts_of(recipe(head=head, loss=Mixed(), attack=LDAT(steps=2), optimizer=SGD(lr=0.1)))
    centres = parts.model.head.centres.clone()
    weights = [p.detach().clone() for p in parts.model.parameters()]
    train_step(parts, rows(parts))
    assert torch.equal(parts.model.head.centres, centres)
    assert any(not torch.equal(a, b) for a, b in zip(weights, parts.model.parameters(), strict=True))
    assert "model.head.centres" in parts.tensors()


def test_msra_centres() -> None:
    """L-GM: normal, of variance 2 / D."""
    torch.manual_seed(0)
    centres = GaussianMixture(centres="msra").build(512, 100).centres
    assert isinstance(centres, nn.Parameter)
    centres = centres.detach()
    assert float(centres.std()) == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert float(centres.abs().max()) > 3 * (2 / 512) ** 0.5  # not uniform


def test_the_scale_of_head_and_features() -> None:
    """29: ten times as large, the argmax is the same, and most gradients of the cross-entropy are exactly zero."""
    torch.manual_seed(0)
    head = GaussianMixture().build(16, 10)
    large = GaussianMixture().build(16, 10)
    with torch.no_grad():
        large.centres.copy_(10 * head.centres)
    y = torch.arange(200) % 10
    features = head.centres.detach()[y] * 3 + 0.3 * torch.randn(200, 16)
    shares = []
    for module, scale in ((head, 1.0), (large, 10.0)):
        f = (scale * features).requires_grad_()
        logits = module(f).logits
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), f)
        assert torch.equal(logits.argmax(dim=1), head(features).logits.argmax(dim=1))
        shares.append(float((gradient == 0).all(dim=1).float().mean()))
    assert shares[0] < 0.01 < 0.5 < shares[1]


@pytest.mark.parametrize("head", [GaussianMixture(centres="msra"), GaussianMixture(centres="simplex")], ids=str)
def test_other_centres_keep_the_contract(head: Any) -> None:
    check(head)
    assert from_json(type(head), {k: v for k, v in to_json(head).items() if k != "name"}) == head
    assert evolve(head, centres="xavier") == GaussianMixture()
