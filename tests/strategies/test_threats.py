"""Threat models: balls, boxes, and the steepest step, against per-image loops and dual norms."""

import math

import pytest
import torch
from tiny import images
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit.attacks import PGD
from robustkit.core.batch import Budget, Part
from robustkit.core.errors import SpecError
from robustkit.core.recipe import load_recipe
from robustkit.core.rng import Generator, whole
from robustkit.datasets import Digits
from robustkit.engine import Predictor
from robustkit.evaluation.logits import LogitsOf
from robustkit.testing import check, tiny_recipe
from robustkit.threats import L1, L2, Linf

THREATS = [Linf(epsilon=0.1), L2(epsilon=0.5), L1(epsilon=2.0)]
STEEPEST = [Linf(), L2(), L1(share=1e-9)]
ORDER = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
RADII = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.7, 2.0])


def norm_of(perturbation: Tensor, order: float) -> float:
    """The norm of one perturbation, from its definition, in float64."""
    values = [abs(float(value)) for value in perturbation.flatten().double()]
    return max(values) if order == math.inf else sum(value**order for value in values) ** (1 / order)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_size_is_the_norm_of_each_image(threat: Linf | L2 | L1) -> None:
    perturbation = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    wanted = [norm_of(item, ORDER[threat.norm]) for item in perturbation]
    assert threat.size(perturbation).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_random_stays_in_each_ball_and_in_the_box(threat: Linf | L2 | L1) -> None:
    x = images(6)
    found = threat.random(x, RADII, whole(x, 0))
    assert (threat.size(found - x) <= RADII + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(found[0], x[0])  # a radius of 0 moves nothing
    assert (threat.size(found - x)[1:] > 0).all()
    assert torch.equal(found, threat.random(x, RADII, whole(x, 0)))
    assert not torch.equal(found, threat.random(x, RADII, whole(x, 1)))


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_random_of_a_part_is_a_part_of_the_whole(threat: Linf | L2 | L1) -> None:
    x = images(6)
    all_rows = threat.random(x, RADII, Generator(7, Part(0, 6, 6), x.device))
    some = threat.random(x[2:5], RADII[2:5], Generator(7, Part(2, 5, 6), x.device))
    assert torch.equal(some, all_rows[2:5])


def test_linf_start_is_uniform() -> None:
    """ECAS sheet 9: mean 0, standard deviation eps / sqrt 3, almost reaching eps, where the box is far."""
    x = torch.full((40, 3, 32, 32), 0.5)
    epsilon = torch.linspace(0.01, 0.4, 40)
    moved = Linf().random(x, epsilon, whole(x, 3)) - x
    pixels = 3 * 32 * 32
    for perturbation, radius in zip(moved.double(), epsilon.tolist(), strict=True):
        spread = radius / math.sqrt(3)
        assert abs(perturbation.mean()) < 4.5 * spread / math.sqrt(pixels)
        assert float(perturbation.std()) == pytest.approx(spread, rel=0.05)
        assert 0.99 * radius < float(perturbation.abs().max()) <= radius + 1e-6


def test_l2_start_has_a_uniform_length_and_no_preferred_direction() -> None:
    x = torch.full((4000, 1, 3, 3), 0.5)
    threat = L2()
    moved = threat.random(x, torch.full((4000,), 0.4), whole(x, 3)) - x
    lengths = threat.size(moved) / 0.4
    assert float(lengths.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(lengths.std()) == pytest.approx(1 / math.sqrt(12), abs=0.02)
    directions = moved.flatten(1) / threat.size(moved)[:, None]
    assert directions.mean(dim=0).abs().max() < 5 / math.sqrt(4000 * 9)
    assert float(directions.square().mean(dim=0).max()) == pytest.approx(1 / 9, rel=0.15)


def test_linf_projection_is_the_clip_of_each_pixel() -> None:
    x, x_adv = images(6), torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    found = Linf().project(x_adv, x, RADII)
    for i, j in [(i, j) for i in range(6) for j in range(0, 72, 5)]:
        pixel, radius = float(x[i].flatten()[j]), float(RADII[i])
        moved = min(max(float(x_adv[i].flatten()[j]), pixel - radius), pixel + radius)
        assert float(found[i].flatten()[j]) == pytest.approx(min(max(moved, 0), 1), abs=1e-6)


def test_l2_projection_shrinks_towards_the_image() -> None:
    x, x_adv = images(6), torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    found = L2().project(x_adv, x, RADII)
    for i in range(6):
        length = norm_of(x_adv[i] - x[i], 2)
        wanted = x[i] + (x_adv[i] - x[i]) * min(1.0, float(RADII[i]) / length)
        torch.testing.assert_close(found[i], wanted.clamp(0, 1))


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_projection_keeps_what_is_allowed_and_is_stable(threat: Linf | L2 | L1) -> None:
    x = images(6)
    inside = threat.random(x, RADII, whole(x, 0))
    torch.testing.assert_close(threat.project(inside, x, RADII), inside, atol=1e-6, rtol=0)
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    once = threat.project(far, x, RADII)
    assert (threat.size(once - x) <= RADII + 1e-6).all()
    assert once.min() >= 0 and once.max() <= 1
    torch.testing.assert_close(threat.project(once, x, RADII), once, atol=1e-6, rtol=0)
    assert torch.equal(threat.project(x, x, RADII), x)
    assert torch.equal(once[:1], x[:1])


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_projection_of_an_image_does_not_depend_on_the_others(threat: Linf | L2 | L1) -> None:
    x, far = images(6), images(6, seed=9) * 3 - 1
    together = threat.project(far, x, RADII)
    for i in range(6):
        torch.testing.assert_close(threat.project(far[i : i + 1], x[i : i + 1], RADII[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("threat", STEEPEST, ids=lambda threat: threat.norm)
def test_ascend_is_steepest(threat: Linf | L2 | L1) -> None:
    """Of unit length, and its product with the gradient is the gradient's dual norm: no unit step gains more."""
    gradient = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1.0, 1e4, 7.0, 1e-6]
    ).view(5, 1, 1, 1)
    step = threat.ascend(gradient)
    assert threat.size(step).tolist() == pytest.approx([1.0] * 5, rel=1e-5)
    gained = (step.double() * gradient.double()).flatten(1).sum(dim=1).tolist()
    assert gained == pytest.approx([norm_of(item, DUAL[threat.norm]) for item in gradient], rel=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_ascend_of_nothing_is_nothing(threat: Linf | L2 | L1) -> None:
    gradient = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    step = threat.ascend(gradient)
    assert torch.equal(step[1], torch.zeros(2, 4, 4))
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("scale", [1e-14, 1e-25, 1e-36])
def test_ascend_is_of_unit_length_however_small_the_gradient(threat: Linf | L2 | L1, scale: float) -> None:
    """A confident net has tiny gradients; a step that shrinks with them would pass for robustness."""
    gradient = scale * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert threat.size(threat.ascend(gradient)).tolist() == pytest.approx([1.0] * 3, rel=1e-4)


def test_radii_are_pixels_of_0_to_1() -> None:
    with pytest.raises(SpecError, match="8/255"):
        Linf(epsilon=8)
    for wrong in (0.0, -0.1, math.nan):
        with pytest.raises(SpecError):
            Linf(epsilon=wrong)
        with pytest.raises(SpecError):
            L2(epsilon=wrong)
        with pytest.raises(SpecError):
            L1(epsilon=wrong)
        with pytest.raises(SpecError):
            L1(share=wrong)
    with pytest.raises(SpecError):
        L1(share=1.1)
    assert (Linf().norm, L2().norm, L1().norm) == ("Linf", "L2", "L1")


# L1: the ball and the box at once.


def nearest(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """One image's projection onto the ball and the box, by bisection of the multiplier, in float64."""
    x_adv, x = x_adv.double(), x.double()
    step = x_adv - x

    def candidate(multiplier: float) -> Tensor:
        return (x + step.sign() * (step.abs() - multiplier).clamp_min(0)).clamp(0, 1)

    low, high = 0.0, float(step.abs().max())
    if float((candidate(0.0) - x).abs().sum()) <= epsilon:
        return candidate(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        if float((candidate(middle) - x).abs().sum()) > epsilon:
            low = middle
        else:
            high = middle
    return candidate(high)


def cornered(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Images of all kinds: dark, bright, both, grey, and at random."""
    x = images(count, seed=4, shape=shape)
    x[0], x[1], x[2], x[3] = 0.0, 1.0, x[2].round(), 0.5
    return x


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0])
def test_l1_projection_is_the_nearest_image_of_ball_and_box(shape: tuple[int, int, int], scale: float) -> None:
    x = cornered(8, shape)
    x_adv = x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for radii in ([0.0, 1e-4, 0.01, 0.3, 1.0, 3.0, 12.0, 500.0], [12.0] * 8, [0.7, 1e9] * 4):
        found = L1().project(x_adv, x, torch.tensor(radii))
        for i, radius in enumerate(radii):
            wanted = nearest(x_adv[i], x[i], radius)
            torch.testing.assert_close(found[i].double(), wanted, atol=5e-6, rtol=0)
            rounding = x[i].numel() * 2**-25 * max(1.0, float(x_adv[i].abs().max()))  # float32's, of each pixel
            assert norm_of(found[i].double() - x[i].double(), 1) <= radius * (1 + 1e-6) + rounding
        assert found.min() >= 0 and found.max() <= 1


def test_l1_projection_solves_the_quadratic_programme() -> None:
    """Against a general solver that knows the sets and not the formula."""
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(6)
    for _ in range(10):
        x = torch.rand(1, 1, 1, 5, generator=generator).double()
        x_adv = x + torch.randn(x.shape, generator=generator)
        radius = float(torch.rand(1, generator=generator)) + 0.1
        start, goal = x.flatten().numpy(), x_adv.flatten().numpy()
        # z = start + up - down with up, down >= 0: the ball is one linear constraint
        bounds = [(0, 1 - s) for s in start] + [(0, s) for s in start]
        for share in (0.0, 0.01, 0.1, 0.3):  # the solver gives up now and then, from where depends on the processor
            solved = optimize.minimize(
                lambda v, start=start, goal=goal: ((start + v[:5] - v[5:] - goal) ** 2).sum(),
                [min(upper, share * radius / 10) for _, upper in bounds],
                bounds=bounds,
                constraints={"type": "ineq", "fun": lambda v, radius=radius: radius - v.sum()},
                options={"ftol": 1e-14, "maxiter": 500},
            )
            if solved.success:
                break
        assert solved.success
        wanted = start + solved.x[:5] - solved.x[5:]
        found = L1().project(x_adv, x, torch.tensor([radius], dtype=torch.float64)).flatten().tolist()
        assert found == pytest.approx(wanted.tolist(), abs=1e-5)


def test_l1_projection_in_the_limits() -> None:
    x = cornered(6, (3, 8, 8))
    x_adv = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    huge, nothing = torch.full((6,), 1e9), torch.zeros(6)
    assert torch.equal(L1().project(x_adv, x, huge), x_adv.clamp(0, 1))
    assert torch.equal(L1().project(x_adv, x, nothing), x)
    tiny = L1().project(x_adv, x, torch.full((6,), 1e-6))
    assert (L1().size(tiny - x) <= 1e-6 + 1e-7).all()
    outwards = torch.where(x[:3] > 0.5, 2.0, -1.0)  # out of the box's corners there is no way
    assert torch.equal(L1().project(outwards, x[:3], torch.full((3,), 5.0)), x[:3])


def test_l1_projection_uses_the_ball_that_clamping_last_would_waste() -> None:
    """One pixel wants to go far beyond the box: the ball's rest is for the others (Croce and Hein 2021, Sec. 2)."""
    x = torch.full((1, 1, 1, 3), 0.5)
    x_adv = x + torch.tensor([5.0, 0.3, 0.2]).view(1, 1, 1, 3)
    found = L1().project(x_adv, x, torch.tensor([0.9])) - x
    assert found.flatten().tolist() == pytest.approx([0.5, 0.25, 0.15], abs=1e-6)


def test_l1_start_has_a_uniform_length_and_spreads_evenly() -> None:
    x = torch.full((4000, 1, 3, 3), 0.5)
    threat = L1()
    moved = threat.random(x, torch.full((4000,), 0.4), whole(x, 3)) - x
    lengths = threat.size(moved) / 0.4
    assert float(lengths.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(lengths.std()) == pytest.approx(1 / math.sqrt(12), abs=0.02)
    directions = moved.flatten(1) / threat.size(moved)[:, None]
    assert directions.mean(dim=0).abs().max() < 5 * math.sqrt(2 / 90 / 4000)
    # shares of a uniform point of the simplex of 9 are Beta(1, 8): mean 1/9, mean square 2/90
    assert directions.abs().mean(dim=0).tolist() == pytest.approx([1 / 9] * 9, rel=0.08)
    assert directions.square().mean(dim=0).tolist() == pytest.approx([2 / 90] * 9, rel=0.15)


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.25, 1.0])
def test_l1_ascends_along_the_largest_gradients(share: float) -> None:
    gradient = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    step = L1(share=share).ascend(gradient)
    count = max(1, math.ceil(share * 50))
    for moved, slope in zip(step.flatten(1), gradient.flatten(1), strict=True):
        top = slope.abs().argsort(descending=True)[:count]
        assert torch.equal(moved.nonzero().flatten(), top.sort().values)
        assert moved[top].tolist() == pytest.approx((slope[top].sign() / count).tolist())


def test_l1_ascends_along_slopes_only() -> None:
    """Pixels without gradient do not move, equal ones move together, whatever the share."""
    gradient = torch.zeros(2, 1, 4, 4)
    gradient[0, 0, 0, :2] = torch.tensor([3.0, -2.0])
    gradient[1] = 0.5
    step = L1(share=0.5).ascend(gradient)
    assert step[0].flatten().tolist() == [0.5, -0.5] + [0.0] * 14
    assert step[1].flatten().tolist() == [1 / 16] * 16


def test_l1_keeps_its_contract() -> None:
    for threat in (L1(), L1(epsilon=0.5, share=0.01), L1(epsilon=100.0, share=1.0)):
        check(threat)


def test_l1_is_named_on_the_command_line() -> None:
    from robustkit.core.override import override

    recipe = override(load_recipe("recipes/quickstart.py"), ["threat=l1", "threat.epsilon=3", "threat.share=0.1"])
    assert recipe.threat == L1(epsilon=3.0, share=0.1)


@pytest.fixture(scope="module")
def reader() -> tuple[nn.Module, Tensor, Tensor]:
    """A net that reads digits well, and test images."""
    data = Digits().load()
    x = data.train.fetch(torch.arange(len(data.train))) / 255
    with torch.random.fork_rng(devices=[]):
        recipe = tiny_recipe(data=Digits())
        model = recipe.model.build(recipe.head, 10, (1, 8, 8), seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for epoch in range(3):
            for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]).logits, data.train.labels[rows]).backward()
                optimizer.step()
    rows = torch.arange(100)
    return model.eval(), data.test.fetch(rows) / 255, data.test.labels[rows]


@torch.no_grad()
def test_pgd_in_l1_finds_what_the_official_attack_finds(reader: tuple[nn.Module, Tensor, Tensor]) -> None:
    """The package's APGD adapts how many pixels it moves; ours does not, and comes near."""
    pyautoattack = pytest.importorskip("pyautoattack")
    model, x, y = reader
    threat = L1(epsilon=2.0)
    budget = Budget(epsilon=torch.full((len(y),), threat.epsilon))
    x_adv = PGD(steps=20)(Predictor(model, torch.device("cpu")), x, y, budget, threat, whole(x, 0))
    assert (threat.size(x_adv - x) <= threat.epsilon * (1 + 1e-5)).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    clean = float((model(x).logits.argmax(1) == y).float().mean())
    ours = float((model(x_adv).logits.argmax(1) == y).float().mean())
    with torch.random.fork_rng(devices=[]):
        package = pyautoattack.AutoAttack(LogitsOf(model), norm="L1", eps=2.0, seed=0, device=torch.device("cpu"))
        package.verbose, package.attacks_to_run = False, ["apgd-ce"]
        theirs = float((package.run_standard_evaluation(x, y, batch_size=len(y))[1] == y).float().mean())
    assert clean > 0.9 and ours < clean - 0.3
    assert ours < theirs + 0.25
