"""Tests and intervals against independent references: scipy, enumeration, published examples."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from scipy import optimize, stats

from robustkit.evaluation.statistics import independent, mcnemar, paired, spread, tango, welch

NORMAL = 1.959963984540054


# Paired


@pytest.mark.parametrize("b", range(9))
@pytest.mark.parametrize("c", [0, 1, 4, 9, 300])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_mcnemar_by_enumeration() -> None:
    flips = [sum(coins) for coins in itertools.product((0, 1), repeat=9)]
    for b in range(10):
        as_far = sum(abs(count - 4.5) >= abs(b - 4.5) for count in flips)
        assert mcnemar(b, 9 - b) == as_far / len(flips)


def test_mcnemar_of_ten_thousand_images() -> None:
    assert mcnemar(2600, 2400) == pytest.approx(stats.binomtest(2600, 5000, 0.5).pvalue, rel=1e-9)
    assert mcnemar(0, 10_000) < 1e-300


def test_mcnemar_rejects_at_most_one_in_twenty() -> None:
    for n in range(1, 60):
        level = sum(math.comb(n, b) for b in range(n + 1) if mcnemar(b, n - b) < 0.05) / 2**n
        assert level < 0.05


def test_published_example_of_paired_proportions() -> None:
    """Airway hyper-responsiveness before and after a transplantation: 21 children, 1 and 7 discordant
    (Fagerland, Lydersen and Laake, Statistics in Medicine 2014)."""
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (12, 2, 50), (0, 1, 44), (3, 3, 10), (30, 41, 1000)])
def test_tango_s_ends_are_those_that_the_score_test_just_rejects(b: int, c: int, n: int) -> None:
    """The nuisance parameter by numerical maximum likelihood instead of Tango's closed form."""

    def score(delta: float) -> float:
        def loss(q: float) -> float:
            shares = q + delta, q, 1 - 2 * q - delta
            return -sum(k * math.log(max(p, 1e-300)) for k, p in zip((b, c, n - b - c), shares, strict=True) if k)

        q = optimize.minimize_scalar(
            loss, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        return ((b - c) / n - delta) / math.sqrt((2 * q + delta - delta**2) / n)

    low, high = tango(b, c, n)
    assert low < (b - c) / n < high
    assert score(low) == pytest.approx(NORMAL, abs=1e-3) and score(high) == pytest.approx(-NORMAL, abs=1e-3)


def test_tango_at_the_edges() -> None:
    low, high = tango(0, 0, 100)
    assert high == pytest.approx(NORMAL**2 / (100 + NORMAL**2)) and low == pytest.approx(-high)
    low, high = tango(5, 0, 5)
    assert 0 < low < 1 and high == 1
    assert tango(0, 5, 5) == pytest.approx((-high, -low))
    for b, c, n in [(3, 8, 40), (0, 4, 9), (7, 0, 7)]:
        assert tango(c, b, n) == pytest.approx([-end for end in reversed(tango(b, c, n))])


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.3, 0.1), (0.05, 0.02), (0.25, 0.25), (0.6, 0.3)])
def test_tango_covers_the_truth(p: float, q: float) -> None:
    """Exactly, over all outcomes of 25 images."""
    n, covered = 25, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = tango(b, c, n)
            ways = math.comb(n, b) * math.comb(n - b, c)
            covered += (low <= p - q <= high) * ways * p**b * q**c * (1 - p - q) ** (n - b - c)
    assert 0.93 < covered < 0.995


def test_paired_counts_what_one_alone_gets_right() -> None:
    generator = random.Random(0)
    first, second = ("".join(generator.choice("011") for _ in range(200)) for _ in range(2))
    found = paired(first, second)
    assert found.only_first == sum(a > b for a, b in zip(first, second, strict=True))
    assert found.only_second == sum(a < b for a, b in zip(first, second, strict=True))
    assert found.difference == pytest.approx((first.count("1") - second.count("1")) / 200)
    assert found.ci95 == tango(found.only_first, found.only_second, 200)
    with pytest.raises(ValueError):
        paired("01", "011")


# Independent


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((10, 10, 0, 10), (0.6075, 1.0)),
    ],
)
def test_newcombe_s_own_examples(counts: tuple[int, int, int, int], expected: tuple[float, float]) -> None:
    """Newcombe, Statistics in Medicine 1998, 17:873, Table II, method 10."""
    assert independent(*counts) == pytest.approx(expected, abs=5e-5)


# Seeds


def test_seeds_against_scipy() -> None:
    first, second = [0.512, 0.498, 0.507], [0.471, 0.489, 0.480, 0.465]
    found = spread(first)
    assert (found.n, found.mean) == (3, pytest.approx(sum(first) / 3)) and found.sd == pytest.approx(stats.tstd(first))
    assert found.ci95 == pytest.approx(tuple(stats.ttest_1samp(first, 0).confidence_interval()))
    test, expected = welch(first, second), stats.ttest_ind(first, second, equal_var=False)
    assert test is not None and test.p == pytest.approx(expected.pvalue)
    assert test.ci95 == pytest.approx(tuple(expected.confidence_interval()))
    assert test.difference == pytest.approx(sum(first) / 3 - sum(second) / 4)


def test_what_cannot_be_estimated_is_not() -> None:
    assert spread([0.5]).sd is None and spread([0.5]).ci95 is None
    assert spread([0.5, 0.5]).sd == 0 and spread([0.5, 0.5]).ci95 is None
    assert welch([0.5], [0.4, 0.3]) is None and welch([0.5, 0.5], [0.4, 0.4]) is None
