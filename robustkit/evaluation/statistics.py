"""How sure is a difference? Exact tests and intervals of proportions and of seeds. Pure functions, no tensors.

Accuracies are shares in [0, 1]; intervals hold the true value in 95 % of cases, p-values are two-sided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from statistics import NormalDist

import attrs

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
LEVEL = 0.05
"""A difference is resolved where its p-value lies below."""


@attrs.frozen
class Paired:
    """Two models on the same `n` images: `only_first` and `only_second` are those that just one of them got right."""

    n: int
    only_first: int
    only_second: int
    difference: float
    ci95: Interval
    p: float


@attrs.frozen
class Spread:
    """Several seeds: mean, sample standard deviation, t interval of the mean; None where they cannot be estimated."""

    n: int
    mean: float
    sd: float | None
    ci95: Interval | None


@attrs.frozen
class Welch:
    """Difference of two means over seeds."""

    difference: float
    ci95: Interval
    p: float


def paired(first: str, second: str) -> Paired:
    """Compares outcomes image by image; "1" where the model is right, as in outcomes.json.

    Raises:
        ValueError: they are not of equal length.
    """
    pairs = list(zip(first, second, strict=True))
    b, c = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return Paired(len(pairs), b, c, (b - c) / len(pairs), tango(b, c, len(pairs)), mcnemar(b, c))


def mcnemar(b: int, c: int) -> float:
    """The exact test of paired proportions (McNemar 1947): under no difference b is binomial(b + c, 1/2)."""
    n = b + c
    term = total = 1
    for k in range(min(b, c)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / (1 << n))  # whole numbers of any size: exact until this division


def tango(b: int, c: int, n: int) -> Interval:
    """The score interval of a difference of paired proportions, (b - c) / n (Tango, Statistics in Medicine 1998).

    It holds the differences that the score test does not reject, and keeps its coverage in small samples and where b
    and c are small.
    """

    def score(delta: float) -> float:
        linear = -b - c + (2 * n - b + c) * delta
        q = (math.sqrt(max(0.0, linear**2 + 8 * n * c * delta * (1 - delta))) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        gap = b - c - n * delta
        return math.copysign(math.inf, gap) if variance <= 0 else gap / math.sqrt(variance)

    estimate = (b - c) / n
    low = -1.0 if b == 0 and c == n else _where(lambda delta: score(delta) > Z, -1.0, estimate)
    high = 1.0 if b == n and c == 0 else _where(lambda delta: score(delta) >= -Z, estimate, 1.0)
    return low, high


def independent(right_1: int, n_1: int, right_2: int, n_2: int) -> Interval:
    """The interval of a difference of independent proportions, from Wilson's of each (Newcombe 1998, method 10)."""
    from robustkit.evaluation import wilson  # here: that package loads torch, and this module is plain arithmetic

    p_1, p_2 = right_1 / n_1, right_2 / n_2
    (low_1, high_1), (low_2, high_2) = wilson(right_1, n_1), wilson(right_2, n_2)
    difference = p_1 - p_2
    return difference - math.hypot(p_1 - low_1, high_2 - p_2), difference + math.hypot(high_1 - p_1, p_2 - low_2)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one measure over seeds."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Spread(1, mean, None, None)
    sd = statistics.stdev(values)
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    return Spread(n, mean, sd, (mean - half, mean + half) if sd > 0 else None)


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Compares two means over seeds without assuming equal spreads (Welch 1947).

    None where nothing can be said: a side has one seed, or nothing varies on either.
    """
    if min(len(first), len(second)) < 2:
        return None
    difference = statistics.fmean(first) - statistics.fmean(second)
    v_1, v_2 = (statistics.variance(values) / len(values) for values in (first, second))
    if v_1 + v_2 == 0:
        return None
    error = math.sqrt(v_1 + v_2)
    freedom = (v_1 + v_2) ** 2 / (v_1**2 / (len(first) - 1) + v_2**2 / (len(second) - 1))
    half = _t_quantile(freedom) * error
    return Welch(difference, (difference - half, difference + half), _t_p(difference / error, freedom))


def _where(left: Callable[[float], bool], low: float, high: float) -> float:
    """The point between `low` and `high` at which `left` ceases to hold."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) else (low, middle)
    return (low + high) / 2


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _t_p(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(t)))
