"""Accuracy against what an attack is given: radius, steps, restarts; and class by class.

A curve says whether a number can be trusted. Accuracy must fall to 0 as the radius grows; where it still falls with
more steps or restarts, the attack was too weak. Every point is the measure `Attacked`, made afresh with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget
from robustkit.core.errors import UserError
from robustkit.core.registry import hint
from robustkit.core.rng import derive, whole
from robustkit.core.spec import evolve
from robustkit.core.strategy import Measure, Outcomes, Slice, Subject, ThreatModel
from robustkit.evaluation.attacked import PGD_20, Attacked
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.evaluate import fixed_part, judge_slices, opened, rows_of
from robustkit.evaluation.logits import is_right
from robustkit.evaluation.results import Result, wilson
from robustkit.evaluation.sources import check_labels, source_of
from robustkit.threats.linf import Linf

ALONG = ("epsilon", "steps", "restarts")

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
"""Radii of a curve, in units of the threat model's."""
STEPS = (0, 1, 2, 5, 10, 20, 50, 100)
RESTARTS = (1, 2, 3, 5, 10)


@attrs.frozen
class Curve:
    """Accuracies at `values` of what it goes `along`, with their 95 % intervals, on the same `n` images.

    `key` is the attack's name, `norm` and `epsilon` the threat model's: the point that results are reported at.
    """

    along: str
    values: tuple[float, ...]
    accuracies: tuple[float, ...]
    ci95: tuple[tuple[float, float], ...]
    n: int
    key: str
    norm: str
    epsilon: float

    def to_json(self) -> dict[str, Any]:
        return attrs.asdict(self)


@attrs.frozen
class ClassAccuracy:
    """How many of a class's `n` images are right."""

    name: str
    right: int
    n: int

    @property
    def accuracy(self) -> float:
        """0 where the class has no images: its interval is then (0, 1)."""
        return self.right / self.n if self.n else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.right, self.n)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "accuracy": self.accuracy, "n": self.n, "ci95": list(self.ci95)}


def curve(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    along: str = "epsilon",
    values: Sequence[float] | None = None,
    attack: Attacked = PGD_20,
    threat: ThreatModel | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    seed: int = 0,
    watch: Callable[[float, float], None] | None = None,
) -> Curve:
    """Accuracy of any module against the attack's radius, steps or restarts.

    Args:
        model, images, labels, limit, batch_size, device, seed: as of `evaluate`.
        along: "epsilon", "steps" or "restarts".
        values: where to measure; 0 stands for the images as they are. None: some from nothing to far beyond usual.
        attack: the measure that is varied; what is not varied stays as it is there. Its step size follows the radius
            unless it is set.
        threat: the ball; along "epsilon" its radius is replaced. None: `Linf(epsilon=8/255)`.
        watch: told of each radius or number of steps, and of its accuracy, when it is done.

    Raises:
        UserError: there is no such curve, or a value makes no sense.
        DataError: as `evaluate`.
    """
    if along not in ALONG:
        raise UserError(f"there is no curve along '{along}'", place="along", remedy=hint(along, ALONG))
    if not isinstance(attack, Attacked):
        raise UserError(f"{type(attack).__name__} has no {along} to vary", place="attack", remedy="e.g. PGD_20")
    threat = threat or Linf()
    points = _points(along, values, threat)
    found: dict[float, float] = {}
    n = 0
    with _judge(model, images, labels, device=device, limit=limit, batch_size=batch_size, seed=seed) as judge:
        if along == "restarts":  # one after the other on what is left: all points come from the longest
            result = judge(_EachRestart(attack, int(points[-1])), threat)
            found, n = {point: result.breakdown[str(int(point))] for point in points}, result.n
        else:
            for point in points:
                measure, there = _varied(attack, threat, along, point)
                result = judge(measure, there)
                found[point], n = result.accuracy, result.n
                if watch is not None:
                    watch(point, found[point])
    intervals = tuple(wilson(round(accuracy * n), n) for accuracy in found.values())
    return Curve(along, points, tuple(found.values()), intervals, n, attack.key, threat.norm, threat.epsilon)


def per_class(result: Result, labels: Tensor, names: Sequence[str]) -> tuple[ClassAccuracy, ...]:
    """A result's accuracy on each class, in the order of `names`.

    Args:
        result: of any measure.
        labels: (N,), of the whole test set, of which the result may have judged a fixed part.
        names: of all classes.

    Raises:
        DataError: a label has no name.
    """
    check_labels(labels, len(labels), len(names))
    seen = labels.cpu()[fixed_part(len(labels), result.n)]
    right = torch.tensor(result.outcomes, dtype=torch.bool)
    counts, rights = (part.bincount(minlength=len(names)).tolist() for part in (seen, seen[right]))
    return tuple(ClassAccuracy(*entry) for entry in zip(names, rights, counts, strict=True))


def by_class(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    names: Sequence[str],
    attack: Attacked = PGD_20,
    threat: ThreatModel | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, tuple[ClassAccuracy, ...]]:
    """Accuracy on each class, clean and attacked: by the measures' keys. Arguments as of `curve`."""
    source = source_of(images, labels)
    if labels is None:  # a slice of images at a time: only their labels are kept
        every_label = torch.cat([source.rows(rows)[1] for rows in torch.split(torch.arange(len(source)), batch_size)])
    else:
        every_label = torch.as_tensor(labels)
    with _judge(model, images, labels, device=device, limit=limit, batch_size=batch_size, seed=seed) as judge:
        results = [judge(Clean(images=attack.images), threat or Linf()), judge(attack, threat or Linf())]
    return {result.key: per_class(result, every_label, names) for result in results}


@attrs.frozen
class _EachRestart:
    """`Attacked` with `restarts` restarts; its breakdown has the accuracy after each, and before all."""

    attack: Attacked
    restarts: int

    @property
    def key(self) -> str:
        return self.attack.key

    @property
    def images(self) -> int | None:
        return self.attack.images

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        settings, threat = self.attack, subject.threat
        attack = PGD(
            steps=settings.steps, step_size=settings.step_size, objective=settings.objective, start=settings.start
        )
        seed = derive(seed, settings.key, part.number)
        right = is_right(subject.logits(part.x), part.y)
        breakdown = {"0": int(right.sum()) / len(right)}
        for restart in range(self.restarts):
            left = right.nonzero().squeeze(1)
            if len(left):
                images, labels = part.x[left], part.y[left]
                budget = Budget(epsilon=images.new_full((len(left),), threat.epsilon))
                x_adv = attack(subject.predict, images, labels, budget, threat, whole(images, seed, restart))
                right[left] = is_right(subject.logits(x_adv), labels)
            breakdown[str(restart + 1)] = int(right.sum()) / len(right)
        yield Outcomes(right, breakdown)


def _varied(attack: Attacked, threat: ThreatModel, along: str, point: float) -> tuple[Measure, ThreatModel]:
    """What is measured at a point that is not a number of restarts."""
    if point == 0:
        return Clean(images=attack.images), threat
    if along == "steps":
        return evolve(attack, steps=int(point)), threat
    return attack, evolve(threat, epsilon=point)


def _points(along: str, values: Sequence[float] | None, threat: ThreatModel) -> tuple[float, ...]:
    """Where to measure, ascending.

    Raises:
        UserError: there is nothing, or it is negative or no whole number where it must be.
    """
    if values is None:
        radii = [share * threat.epsilon for share in SHARES]
        most = 1.0 if threat.norm == "Linf" else math.inf  # all of a pixel's range
        values = {"epsilon": [r for r in radii if r <= most], "steps": STEPS, "restarts": RESTARTS}[along]
    if not values:
        raise UserError("there are no values", place=along, remedy="e.g. values=(0, 1, 2)")
    for value in values:
        if not math.isfinite(value) or value < 0 or (along != "epsilon" and value != int(value)):
            kind = "radii of at least 0" if along == "epsilon" else "whole numbers of at least 0"
            raise UserError(f"values must be {kind}, not {value:g}", place=along)
    return tuple(sorted({float(value) if along == "epsilon" else int(value) for value in values}))


@contextmanager
def _judge(
    model: nn.Module,
    images: Any,
    labels: Any,
    *,
    device: torch.device | str | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> Iterator[Callable[[Measure, ThreatModel], Result]]:
    """Takes measures through a test set in any ball, as `evaluate` does."""
    source = source_of(images, labels)
    with opened(model, source, Linf(), device) as (subject, world):

        def judge(measure: Measure, threat: ThreatModel) -> Result:
            there = attrs.evolve(subject, threat=threat)
            rows = rows_of(measure, limit, len(source))
            result = judge_slices(measure, there, source, rows, world, seed=seed, batch_size=batch_size)
            assert result is not None  # nobody stops it
            return result

        yield judge
