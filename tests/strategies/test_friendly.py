"""FAT against the sheet's text worked out an image at a time, and against what it must come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import Recorder
from tiny import Always, Counting, Plain, at_epoch, images, tiny_model
from torch import Tensor

from robustkit import Model, UserError, evolve
from robustkit.attacks import PGD, Friendly
from robustkit.core.batch import Budget, Mode, Output, Part, Passes
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.model import RobustModel
from robustkit.core.recipe import load_recipes
from robustkit.core.rng import Generator, derive, whole
from robustkit.engine import Predictor, count_passes
from robustkit.engine.graphs import Graphs
from robustkit.epsilons import ECAS
from robustkit.losses import Mart, Trades
from robustkit.objectives import KL, CrossEntropyObjective, InverseObjective
from robustkit.optimizers import SGD
from robustkit.testing import check, tiny_recipe
from robustkit.threats import L2, Linf

ROOT = Path(__file__).parents[2]
COUNT, STEPS = 12, 10
RADII = torch.linspace(0.05, 0.3, COUNT, dtype=torch.float64)
STRIDES = RADII / 30
ONE_TAU = {"switch": (), "omega": 0.0}


def given() -> tuple[RobustModel, Tensor, Tensor]:
    """A net that is sure of nothing, images, and labels: what it says of most, something else of the last three."""
    model, x = tiny_model().double(), images(COUNT).double()
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0  # the box is felt
    bias = next(p for p in model.head.parameters() if p.ndim == 1)
    with torch.no_grad(), model.using("eval"):
        bias -= model(x).logits.mean(dim=0)
        y = model(x).logits.argmax(dim=1)
    y[-3:] = (y[-3:] + 1) % 4
    return model, x, y


def by_the_sheet(
    model: RobustModel,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    tau: int,
    kl: bool = False,
    noise: Tensor | None = None,
    steps: int = STEPS,
) -> tuple[Tensor, list[int], list[int]]:
    """Section 7.1 for each image by itself: what is returned, its steps, and its forwards."""
    model = model.eval()
    found, taken, seen = [], [], []
    for i in range(len(x)):
        image, current, left, moves, looks = x[i : i + 1], start[i : i + 1], tau, 0, 0
        radius, stride = float(RADII[i]), float(STRIDES[i])
        natural = model(image).logits.detach().softmax(dim=1)
        for k in range(steps):
            current = current.detach().requires_grad_()
            logits, looks = model(current).logits, looks + 1
            if int(logits.argmax()) != int(y[i]):
                if left == 0:
                    break
                left -= 1
            log_q = logits.log_softmax(dim=1)
            loss = (natural * (natural.log() - log_q)).sum() if kl else -log_q[0, y[i]]
            (gradient,) = torch.autograd.grad(loss, current)
            moved = current.detach() + stride * gradient.sign()
            if noise is not None:
                moved = moved + noise[k, i : i + 1]
            current = (image + (moved - image).clamp(-radius, radius)).clamp(0, 1)
            moves += 1
        found.append(current.detach())
        taken.append(moves)
        seen.append(looks)
    model.train()
    return torch.cat(found), taken, seen


def started(attack: Friendly, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The start and the noise of each step, from the same draws."""
    generator = whole(x, 3)
    start = x
    if attack.start == "uniform":
        start = (x + (2 * generator.uniform(x) - 1) * RADII[:, None, None, None]).clamp(0, 1)
    if attack.start == "gaussian":
        start = (x + attack.noise * generator.normal(x)).clamp(0, 1)
    noise = torch.stack([attack.omega * generator.normal(x) for _ in range(STEPS)]) if attack.omega else None
    return start, noise


def attacked(
    attack: Any, predict: Any, x: Tensor, y: Tensor, budget: Budget | None = None, threat: Any = None
) -> Tensor:
    budget = budget or Budget(RADII.to(x.dtype), STRIDES.to(x.dtype))
    return attack(predict, x, y, budget, threat or Linf(), whole(x, 3))


@pytest.mark.parametrize(
    "attack",
    [
        Friendly(),
        Friendly(step_size=0.01, tau=(3,), switch=()),
        Friendly(start="gaussian", objective=KL(), omega=0.0),
        Friendly(start="clean", steps=3, tau=(3,), switch=()),
        Friendly(steps=0),
    ],
    ids=str,
)
def test_contract(attack: Friendly) -> None:
    check(attack)


# By the sheet


@pytest.mark.parametrize("tau", [0, 1, 2, 5, STEPS])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
@pytest.mark.parametrize("omega", [0.0, 0.02])
@pytest.mark.parametrize("kl", [False, True])
def test_a_batch_is_attacked_as_its_images_one_by_one(tau: int, start: Any, omega: float, kl: bool) -> None:
    """ECAS 20: the same images in the same order, each with its own label, counter and number of steps."""
    if kl and start == "clean":
        pytest.skip("from x itself KL has no gradient but rounding")
    model, x, y = given()
    objective = KL() if kl else CrossEntropyObjective()
    attack = Friendly(tau=(tau,), switch=(), start=start, noise=0.01, omega=omega, objective=objective)
    begun, noise = started(attack, x)
    wanted, taken, seen = by_the_sheet(model, x, y, begun, tau=tau, kl=kl, noise=noise)
    predict = Counting(model)
    found = attacked(attack, predict, x, y)
    tolerance = 1e-5 if kl else 1e-12  # KL is worked out in float32
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    assert not found.requires_grad and max(taken) <= STEPS
    # As many images go through the net each time as have not been finished: none is computed in vain.
    alive = [sum(looks > k for looks in seen) for k in range(STEPS)]
    assert predict.sizes == [COUNT] * kl + [size for size in alive if size]


class Scripted:
    """Says what it is told to, call by call; its slope is that of the sum of all pixels."""

    def __init__(self, right: list[bool]) -> None:
        self.right = iter(right)

    def __call__(self, images: Tensor) -> Output:
        logits = images.sum(dim=(1, 2, 3))[:, None] * torch.tensor([0.0, 1.0])
        logits = logits - logits.detach() + torch.tensor([1.0, 0.0] if next(self.right) else [0.0, 1.0])
        return Output(logits, logits, logits, logits[:, 0])

    @contextmanager
    def using(self, mode: Mode) -> Iterator[Scripted]:
        yield self


@pytest.mark.parametrize(("tau", "steps"), [(0, 1), (1, 3), (2, 4), (3, 6), (4, 6)])
def test_what_counts_is_how_often_not_in_a_row(tau: int, steps: int) -> None:
    """Misclassified before steps 2, 4 and 5 of six: the counter is not reset in between."""
    attack = Friendly(steps=6, tau=(tau,), start="clean", step_size=0.01, **ONE_TAU)
    x = torch.full((1, 3, 2, 2), 0.5)
    predict = Scripted([True, False, True, False, False, True])
    found = attack(predict, x, torch.tensor([0]), Budget(torch.tensor([0.2])), Linf(), whole(x, 0))
    torch.testing.assert_close(found, x + 0.01 * steps)


def test_images_stop_at_different_times() -> None:
    """What the test above compares is no trivial case."""
    model, x, y = given()
    begun, _ = started(Friendly(), x)
    for tau, least in ((0, 4), (1, 4), (2, 3)):
        _, taken, _ = by_the_sheet(model, x, y, begun, tau=tau)
        assert len(set(taken)) >= least and max(taken) == STEPS
        assert min(taken) == tau  # misclassified from the start on


def test_with_tau_0_images_are_misclassified_or_took_all_steps() -> None:
    """ECAS 20."""
    model, x, y = given()
    attack = Friendly(tau=(0,), **ONE_TAU)
    begun, _ = started(attack, x)
    _, taken, _ = by_the_sheet(model, x, y, begun, tau=0)
    found = attacked(attack, Plain(model), x, y)
    with torch.no_grad(), model.using("eval"):
        wrong = model(found).logits.argmax(dim=1) != y
        at_once = model(begun).logits.argmax(dim=1) != y
    assert all(bool(wrong[i]) or taken[i] == STEPS for i in range(COUNT))
    assert torch.equal(found[at_once], begun[at_once]) and at_once.any()


@pytest.mark.parametrize("start", ["uniform", "clean", "gaussian"])
@pytest.mark.parametrize("objective", [CrossEntropyObjective(), KL()])
@pytest.mark.parametrize("mode", ["eval", "train-frozen"])
@pytest.mark.parametrize("threat", [Linf(), L2()], ids=lambda threat: threat.norm)
def test_with_as_much_patience_as_steps_it_is_pgd(start: Any, objective: Any, mode: Any, threat: Any) -> None:
    """ECAS 20: bit for bit."""
    model, x, y = given()
    model, x = model.float(), x.float().clamp(0.1, 0.9)  # inside the box: there PGD's Gaussian start is ours
    predict = Predictor(model, torch.device("cpu"))
    budget = Budget(threat.epsilon * torch.linspace(0.5, 2.0, COUNT))
    plain = PGD(start=start, objective=objective, mode=mode)
    friendly = Friendly(tau=(STEPS,), start=start, objective=objective, mode=mode, **ONE_TAU)
    wanted = attacked(plain, predict, x, y, budget, threat)
    assert torch.equal(attacked(friendly, predict, x, y, budget, threat), wanted)
    sized = {"step_size": 0.01}
    wanted = attacked(evolve(plain, **sized), predict, x, y, budget, threat)
    assert torch.equal(attacked(evolve(friendly, **sized), predict, x, y, budget, threat), wanted)


@pytest.mark.parametrize("tau", [0, 2])
def test_masked_images_are_those_that_leave(tau: int) -> None:
    """Where images may not leave the batch, the result is the same, and every step sees all of them."""
    model, x, y = given()
    attack = Friendly(tau=(tau,), switch=(), omega=0.01, objective=KL())
    predict = Counting(model)
    leaving = attacked(attack, predict, x, y)
    assert sum(predict.sizes) < (1 + STEPS) * COUNT
    masked = attacked(evolve(attack, mode="train-frozen"), Always(model), x, y)
    torch.testing.assert_close(masked, leaving, atol=1e-12, rtol=0)
    with count_passes(model) as count:
        attacked(evolve(attack, mode="train-frozen"), Plain(model), x, y)
    assert count.per_batch(COUNT) == attack.passes(at_epoch(0, 1)) == Passes(1 + STEPS, STEPS)


def test_nothing_is_done_once_all_are_misclassified() -> None:
    model, x, y = given()
    y = (model.eval()(x).logits.argmax(dim=1) + 1) % 4
    predict = Counting(model.train())
    found = attacked(Friendly(tau=(0,), start="clean", **ONE_TAU), predict, x, y)
    assert torch.equal(found, x) and found is not x and predict.sizes == [COUNT]


@pytest.mark.parametrize("threat", [Linf(), L2()], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_ball_and_box(threat: Any, start: Any) -> None:
    """ECAS 7: within each image's own radius; a radius of 0 moves nothing, noise or not."""
    model, x, y = given()
    radii = threat.epsilon * torch.linspace(0.0, 2.0, COUNT, dtype=torch.float64)
    for tau in (0, STEPS):
        attack = Friendly(tau=(tau,), switch=(), start=start, omega=0.1, noise=0.1)
        found = attacked(attack, Plain(model), x, y, Budget(radii), threat)
        assert (threat.size(found - x) <= radii + 1e-9).all()
        assert torch.equal(found[0], x[0]) and 0 <= found.min() <= found.max() <= 1


def test_numbers_of_steps_in_the_budget() -> None:
    """An image stops at its own number, whether it is misclassified by then or not."""
    model, x, y = given()
    steps = torch.arange(COUNT) % 5
    attack = Friendly(steps=99, tau=(1,), start="clean", **ONE_TAU)
    found = attacked(attack, Plain(model), x, y, Budget(RADII, STRIDES, steps, max_steps=4))
    masked = attacked(
        evolve(attack, mode="train-frozen"), Always(model), x, y, Budget(RADII, STRIDES, steps, max_steps=4)
    )
    for number in range(5):
        wanted, _, _ = by_the_sheet(model, x, y, x, tau=1, steps=number)
        rows = steps == number
        torch.testing.assert_close(found[rows], wanted[rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(masked, found, atol=1e-12, rtol=0)


def test_over_processes() -> None:
    """A piece of the batch is attacked as in the whole, noise and all."""
    model, x, y = given()
    attack = Friendly(tau=(1,), switch=(), omega=0.02)
    together = attacked(attack, Plain(model), x, y)
    pieces = []
    for a, b in ((0, 5), (5, COUNT)):
        generator = Generator(derive(3), Part(a, b, COUNT), x.device)
        budget = Budget(RADII[a:b], STRIDES[a:b])
        pieces.append(attack(Plain(model), x[a:b], y[a:b], budget, Linf(), generator))
    torch.testing.assert_close(torch.cat(pieces), together, atol=1e-12, rtol=0)


def test_recorded_it_is_the_same() -> None:
    """All that changes between batches and epochs is among what a recording is given anew."""
    model = Model(backbone="convnet_small").build(tiny_recipe().head, 4, (3, 8, 8), 0).eval()
    record = Recorder()
    recording = Predictor(model, torch.device("cpu"), graphs=Graphs(record))
    plain = Predictor(model, torch.device("cpu"))
    attack = Friendly(steps=3, objective=KL(), omega=0.01)
    for epoch in (0, 1, 60, 70, 100, 119):
        x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
        now, budget = attack.at(at_epoch(epoch, 120)), Budget(torch.full((6,), 0.01 * (1 + epoch % 7)))
        wanted = now(plain, x, y, budget, Linf(), whole(x, epoch))
        assert torch.equal(now(recording, x, y, budget, Linf(), whole(x, epoch)), wanted)
    assert (record.recorded, record.replayed) == (1, 1 + 4)


# When tau rises


@pytest.mark.parametrize(
    ("tau", "switch", "epochs", "last"),
    [
        ((0, 1, 2), (50 / 120, 90 / 120), 120, (50, 90, 120)),
        ((0, 1, 2, 3), (30 / 85, 50 / 85, 70 / 85), 85, (30, 50, 70, 85)),
        ((0, 1, 2, 3, 4), (20 / 90, 40 / 90, 60 / 90, 80 / 90), 90, (20, 40, 60, 80, 90)),
        ((0, 1, 2), (50.0, 90.0), 120, (50, 90, 120)),
        ((4,), (), 7, (7,)),
        ((2, 0), (1.0,), 3, (3,)),
        ((0, 1, 2), (50 / 120, 90 / 120), 4, (2, 3, 4)),
    ],
)
def test_tau_over_training(tau: Any, switch: Any, epochs: int, last: Any) -> None:
    """Section 7.2, counted from 1: tau[k] up to and including epoch last[k]."""
    attack = Friendly(tau=tau, switch=switch)
    for epoch in range(1, epochs + 1):
        wanted = next(value for value, end in zip(tau, last, strict=False) if epoch <= end)
        now = attack.at(at_epoch(epoch - 1, epochs))
        assert now == evolve(attack, tau=(wanted,), switch=())
        assert now.at(at_epoch(0, epochs)) == now


def test_outside_of_training_the_first_holds() -> None:
    model, x, y = given()
    attack = Friendly(tau=(3, 0), switch=(0.5,))
    held = attacked(attack, Plain(model), x, y)
    assert torch.equal(held, attacked(evolve(attack, tau=(3,), switch=()), Plain(model), x, y))
    assert not torch.equal(held, attacked(evolve(attack, tau=(0,), switch=()), Plain(model), x, y))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": (0, 1)}, "2 values of tau and 2 switches do not fit"),
        ({"tau": ()}, "0 values of tau and 2"),
        ({"tau": (), "switch": ()}, "0 values of tau and 0"),
        ({"tau": (-1,), "switch": ()}, "at least 0"),
        ({"switch": (0.0, 0.5)}, "above 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Friendly(**settings)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"attack": Friendly(step_size=0.01), "epsilon": ECAS()}, "both .* step size"),
        ({"attack": Friendly(objective=InverseObjective())}, "compares with adversarial images"),
        ({"attack": Friendly(switch=(2.0, 9.0))}, "attack.switch: .*epoch 9"),
    ],
)
def test_refusals(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        tiny_recipe(**parts)
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


# Recipes


def test_recipes_by_the_sheet() -> None:
    """Section 7.2."""
    family = load_recipes(ROOT / "recipes" / "fat.py")
    assert set(family) == {"fat-wrn32", "fat-trades-wrn34", "fat-mart-wrn34"}
    for recipe in family.values():
        assert recipe.threat == Linf(epsilon=0.031) and recipe.batch_size == 128
        assert recipe.optimizer == SGD(lr=0.1, momentum=0.9, nesterov=False, weight_decay=2e-4)
        assert (recipe.attack.steps, recipe.attack.step_size, recipe.attack.mode) == (10, 0.007, "eval")
    fat, trades, mart = family.values()
    assert (fat.epochs, trades.epochs, mart.epochs) == (120, 85, 90) and fat.seed == 7
    assert (fat.attack.start, fat.attack.omega) == ("uniform", 0.001)
    for recipe in (trades, mart):
        assert (recipe.attack.start, recipe.attack.noise, recipe.attack.omega) == ("gaussian", 0.001, 0.0)
    assert (trades.loss, trades.attack.objective) == (Trades(weight=6.0), KL())
    assert (mart.loss, mart.attack.objective) == (Mart(weight=6.0), CrossEntropyObjective())

    def values(recipe: Any, epochs: list[int]) -> list[tuple[float, int]]:
        """Rate and tau in epochs counted from 1."""
        each = [at_epoch(epoch - 1, recipe.epochs, 391) for epoch in epochs]
        return [(round(recipe.schedule(p).lr_scale * 0.1, 9), recipe.attack.at(p).tau[0]) for p in each]

    assert values(fat, [1, 50, 51, 59, 60, 89, 90, 91, 109, 110, 120]) == [
        (0.1, 0),
        (0.1, 0),
        (0.1, 1),
        (0.1, 1),
        (0.01, 1),
        (0.01, 1),
        (0.001, 1),
        (0.001, 2),
        (0.001, 2),
        (0.0005, 2),
        (0.0005, 2),
    ]
    assert values(trades, [30, 31, 50, 51, 70, 71, 74, 75, 85]) == [
        (0.1, 0),
        (0.1, 1),
        (0.1, 1),
        (0.1, 2),
        (0.1, 2),
        (0.1, 3),
        (0.1, 3),
        (0.01, 3),
        (0.01, 3),
    ]
    assert values(mart, [20, 21, 41, 59, 60, 61, 80, 81, 89, 90]) == [
        (0.1, 0),
        (0.1, 1),
        (0.1, 2),
        (0.1, 2),
        (0.01, 2),
        (0.01, 3),
        (0.01, 3),
        (0.01, 4),
        (0.01, 4),
        (0.001, 4),
    ]
