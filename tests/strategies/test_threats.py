"""Threat models: balls, boxes, and the steepest step, against per-image loops and dual norms."""

import math

import pytest
import torch
from tiny import images
from torch import Tensor

from robustkit.core.batch import Part
from robustkit.core.errors import SpecError
from robustkit.core.rng import Generator, whole
from robustkit.threats import L2, Linf

THREATS = [Linf(epsilon=0.1), L2(epsilon=0.5)]
ORDER = {"Linf": math.inf, "L2": 2.0}
DUAL = {"Linf": 1.0, "L2": 2.0}
RADII = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.7, 2.0])


def norm_of(perturbation: Tensor, order: float) -> float:
    """The norm of one perturbation, from its definition, in float64."""
    values = [abs(float(value)) for value in perturbation.flatten().double()]
    return max(values) if order == math.inf else sum(value**order for value in values) ** (1 / order)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_size_is_the_norm_of_each_image(threat: Linf | L2) -> None:
    perturbation = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    wanted = [norm_of(item, ORDER[threat.norm]) for item in perturbation]
    assert threat.size(perturbation).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_random_stays_in_each_ball_and_in_the_box(threat: Linf | L2) -> None:
    x = images(6)
    found = threat.random(x, RADII, whole(x, 0))
    assert (threat.size(found - x) <= RADII + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1
    assert torch.equal(found[0], x[0])  # a radius of 0 moves nothing
    assert (threat.size(found - x)[1:] > 0).all()
    assert torch.equal(found, threat.random(x, RADII, whole(x, 0)))
    assert not torch.equal(found, threat.random(x, RADII, whole(x, 1)))


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_random_of_a_part_is_a_part_of_the_whole(threat: Linf | L2) -> None:
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
def test_projection_keeps_what_is_allowed_and_is_stable(threat: Linf | L2) -> None:
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
def test_projection_of_an_image_does_not_depend_on_the_others(threat: Linf | L2) -> None:
    x, far = images(6), images(6, seed=9) * 3 - 1
    together = threat.project(far, x, RADII)
    for i in range(6):
        torch.testing.assert_close(threat.project(far[i : i + 1], x[i : i + 1], RADII[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_ascend_is_steepest(threat: Linf | L2) -> None:
    """Of unit length, and its product with the gradient is the gradient's dual norm: no unit step gains more."""
    gradient = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1.0, 1e4, 7.0, 1e-6]
    ).view(5, 1, 1, 1)
    step = threat.ascend(gradient)
    assert threat.size(step).tolist() == pytest.approx([1.0] * 5, rel=1e-5)
    gained = (step.double() * gradient.double()).flatten(1).sum(dim=1).tolist()
    assert gained == pytest.approx([norm_of(item, DUAL[threat.norm]) for item in gradient], rel=1e-5)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_ascend_of_nothing_is_nothing(threat: Linf | L2) -> None:
    gradient = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[1] = 0
    step = threat.ascend(gradient)
    assert torch.equal(step[1], torch.zeros(2, 4, 4))
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
@pytest.mark.parametrize("scale", [1e-14, 1e-25, 1e-36])
def test_ascend_is_of_unit_length_however_small_the_gradient(threat: Linf | L2, scale: float) -> None:
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
    assert (Linf().norm, L2().norm) == ("Linf", "L2")
