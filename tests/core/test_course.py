"""Two detectors that look at the course of training: gradients that leap, and robust overfitting."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from robustkit.core.leap import LEAP, lengths
from robustkit.core.overfitting import WINDOW, overfitting

# Gradients


def leaps(epochs: list[list[float]]) -> list[int]:
    """In which epochs, counted from 1, one is warned of."""
    course: dict[str, Any] = {}
    last, found = 0, []
    for epoch, norms in enumerate(epochs, start=1):
        last += len(norms)
        if "leap" in lengths(norms, last, course):
            found.append(epoch)
    return found


CALM = [1.0, 1.2, 0.8, 1.1]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([CALM] * 5, []),
        ([CALM, [1.0, 9.0, 1.0, 1.0], CALM], [2]),  # one step
        ([[1.0, 9.0, 1.0, 1.0], CALM], [1]),  # in the first epoch
        ([CALM, [9.0] * 4, [9.0] * 4], [2]),  # all of them, from then on the usual
        ([CALM, [0.1, 0.1, 0.1, 1.2], [0.001, 0.001, 0.001, 1.2]], []),  # most batches are fitted, some are not
        ([[0.0] * 4, [0.0] * 4], []),  # nothing to learn
        ([[0.0] * 4, CALM], []),
        ([[0.0, 0.0, 2.0, 0.0], CALM], []),  # steps that were skipped count for nothing
        ([[1.0], [2.0], [4.0], [8.0], [16.0]], []),  # growth by and by is no leap
        ([[1.0], [LEAP]], []),
        ([[1.0], [LEAP * 1.001]], [2]),
    ],
)
def test_leaps(epochs: list[list[float]], expected: list[int]) -> None:
    assert leaps(epochs) == expected


def test_what_is_reported() -> None:
    course: dict[str, Any] = {}
    assert lengths([3.0, 1.0, 2.0], 3, course) == {"largest": 3.0, "median": 2.0, "step": 1}
    assert lengths([1.0, 20.0, 0.0, 3.0], 7, course) == {"largest": 20.0, "median": 3.0, "step": 5, "leap": 10.0}
    assert lengths([1.0, 60.0], 9, course)["step"] == 9 and course["leap"] == 7
    assert lengths([], 9, course) == lengths([0.0], 9, course) == {"largest": 0.0, "median": 0.0, "step": 9}


# Overfitting


def line(*corners: tuple[int, float]) -> list[float]:
    """Values for epochs 1, 2, ... on straight lines between (epoch, value)."""
    values = []
    for (first, start), (last, end) in pairwise(corners):
        values += [start + (end - start) * (epoch - first) / (last - first) for epoch in range(first, last)]
    return [*values, corners[-1][1]]


def alarms(robust: list[float], training: list[float], images: int = 1024, few: int = 512) -> list[int]:
    course: dict[str, Any] = {}
    found = []
    for epoch, (held_out, trained) in enumerate(zip(robust, training, strict=True), start=1):
        report = {"epoch": epoch, "validation": {"robust": held_out}, "training": {"robust": trained}}
        if overfitting(report, images, few, course):
            found.append(epoch)
    assert course.get("overfitting") == (found[0] if found else None)
    return found


RICE = {  # best and last of 200 epochs (Rice et al. 2020, Table 2 and Figure 1); on training images it goes on rising
    "CIFAR-10": line((1, 0.25), (100, 0.46), (106, 0.5349), (200, 0.4559)),
    "CIFAR-100": line((1, 0.08), (100, 0.2815), (200, 0.2187)),
    "SVHN": line((1, 0.2), (16, 0.6104), (200, 0.5430)),
}
FITTING = line((1, 0.25), (100, 0.5), (200, 0.88))


def measured(shares: list[float], images: int, draws: random.Random) -> list[float]:
    """As on so many images, others in each epoch: the errors of real courses, on the same images, are smaller."""
    return [sum(draws.random() < share for _ in range(images)) / images for share in shares]


@pytest.mark.parametrize("name", RICE)
def test_what_the_field_calls_robust_overfitting(name: str) -> None:
    """It is noticed on the way down, and not before the best epoch."""
    exact = alarms(RICE[name], FITTING)
    best = RICE[name].index(max(RICE[name])) + 1
    assert best + WINDOW < exact[0] < 200 and exact == list(range(exact[0], 201))
    for seed in range(5):
        draws = random.Random(seed)
        found = alarms(measured(RICE[name], 1024, draws), measured(FITTING, 512, draws))
        assert found and found[0] > best


def test_what_is_none() -> None:
    """Noise, training that is not over, robustness that is lost on all images alike, cycles of radii."""
    wrong = 0
    for seed in range(20):
        draws = random.Random(seed)
        level = measured([0.5] * 110, 1024, draws)
        wrong += bool(alarms(level, measured(line((1, 0.4), (110, 0.9)), 512, draws)))
    assert wrong <= 1, "of twenty courses that stay where they are"
    assert alarms(line((1, 0.1), (110, 0.5)), line((1, 0.1), (110, 0.6))) == []
    fallen = [0.5] * 20 + [0.0] * 10
    assert alarms(fallen, fallen) == []
    assert alarms(line((1, 0.5), (50, 0.3)), [0.9] * 50) == []  # training accuracy must rise, too
    cycles = [0.3 + 0.2 * (epoch % 10) / 9 for epoch in range(110)]
    assert alarms(cycles, [share + 0.05 for share in cycles]) == []


def test_few_images_and_few_epochs_tell_nothing() -> None:
    down, up = line((1, 0.55), (30, 0.45)), line((1, 0.5), (30, 0.9))
    assert alarms(down, up) and alarms(down, up, images=64, few=64) == []
    assert alarms([0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.9, 0.9]) == []
