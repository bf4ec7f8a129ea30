"""Accuracy of a model that may reject, under an attack that does not know of it and one that does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustkit.attacks.climb import climb, step_sizes
from robustkit.core.batch import Budget, Passes
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import derive, whole
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Objective, Outcomes, Reference, Slice, Subject
from robustkit.detection import defence_success, score, scores_of, shares, threshold_for
from robustkit.evaluation.attacked import RESISTING
from robustkit.evaluation.logits import is_right
from robustkit.objectives.confident_wrong import ConfidentWrong
from robustkit.objectives.cross_entropy import CrossEntropyObjective


class Attempt(NamedTuple):
    """Images (B, C, H, W), and what the model makes of them, (B,) bool: classified right, accepted."""

    images: Tensor
    true: Tensor
    accepted: Tensor

    @property
    def past(self) -> Tensor:
        """(B,) bool: wrong and accepted."""
        return ~self.true & self.accepted


@registry("measure").register("detection")
@spec
class Detection:
    """Accuracy with a reject option, in eval mode, at the threat model's epsilon (LDAT, CMC 2024; Tramer, ICML 2022).

    The model rejects an image whose largest posterior lies below `threshold`. An image counts if it is, as it is,
    classified right and accepted, and no attack made an image that is classified wrong and accepted. Attacks: "attack",
    PGD on `objective` from random points, which knows nothing of the threshold, made on all images; then "adaptive", on
    those that got not past it: PGD on the largest posterior of a wrong class, from where the first attack ended and
    from random points. Neither is reported without the other.

    `threshold` None is the highest that rejects at most `false_rejections` of a run's held-out training images.
    `step_size` in pixels of [0, 1], None: epsilon / 4; `restarts` is how many random points each attack begins at.
    """

    key: str = "detection"
    threshold: float | None = setting(default=None, at_least=0, at_most=1)
    false_rejections: float = setting(default=0.05, at_least=0, below=1)
    steps: int = setting(default=40, at_least=1)
    step_size: float | None = setting(default=None, above=0)
    restarts: int = setting(default=1, at_least=1)
    objective: Objective = CrossEntropyObjective()
    images: int | None = setting(default=None, at_least=1)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that holds out no images to find the threshold on."""
        if self.threshold is None and recipe.validation.images == 0:
            raise RecipeError(
                "has no threshold, and no images are held out to find one on",
                place=f"measure '{self.key}'",
                remedy="set its threshold, e.g. to 0.6, or validation.images=1024",
            )

    def calibrated(self, logits: nn.Module, held_out: Iterable[Tensor]) -> Detection:
        """With a threshold: its own, or what `false_rejections` means on batches (B, C, H, W) of held-out images."""
        if self.threshold is not None:
            return self
        return evolve(self, threshold=threshold_for(scores_of(logits, held_out), self.false_rejections))

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        """The breakdown is accuracy after each stage; the shares say what became of the images in it."""
        if self.threshold is None:
            remedy = "set one, e.g. Detection(threshold=threshold_for(scores)), see robustkit.detection"
            raise SpecError(
                "has no threshold, and there are no held-out images", place=f"measure '{self.key}'", remedy=remedy
            )
        seed = derive(seed, self.key, part.number)
        breakdown = {} if before is None else dict(before.breakdown)
        fates = {} if before is None else dict(before.shares)
        note = f"{self.key}: rejected below a posterior of {self.threshold:.6g}"
        right = torch.ones_like(part.y, dtype=torch.bool) if before is None else before.right
        for stage, attempt in self._stages(subject, part, seed):  # all anew: each goes on from the last
            if stage in breakdown:
                continue
            right = right & (attempt.true & attempt.accepted if stage == "natural" else ~attempt.past)
            became = shares(attempt.true, attempt.accepted)
            breakdown[stage] = int(right.sum()) / len(right)
            fates[stage] = {"defence success": defence_success(became)} | became
            yield Outcomes(right, dict(breakdown), (note,), dict(fates))

    def examples(self, subject: Subject, part: Slice, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The images (B, C, H, W) of each stage: of those that an attack did not break, its first attempt."""
        for stage, attempt in self._stages(subject, part, derive(seed, self.key, part.number)):
            yield stage, attempt.images

    def _stages(self, subject: Subject, part: Slice, seed: int) -> Iterator[tuple[str, Attempt]]:
        yield "natural", self._tried(subject, part.x, part.y)
        plain = self._attacked(subject, part, self.objective, None, self._starts(subject, part, seed, "attack"))
        yield "attack", plain
        starts = chain([plain.images], self._starts(subject, part, seed, "adaptive"))
        yield "adaptive", self._attacked(subject, part, ConfidentWrong(), plain, starts)

    def _starts(self, subject: Subject, part: Slice, seed: int, stage: str) -> Iterator[Tensor]:
        epsilon = part.x.new_full((len(part.x),), subject.threat.epsilon)
        for restart in range(self.restarts):
            yield subject.threat.random(part.x, epsilon, whole(part.x, seed, stage, restart))

    def _attacked(
        self, subject: Subject, part: Slice, objective: Objective, held: Attempt | None, starts: Iterable[Tensor]
    ) -> Attempt:
        """From one start after the other; of each image the attempt that got past, else the first."""
        for start in starts:
            if held is None:
                held = self._tried(subject, self._climbed(subject, objective, start, part.x, part.y), part.y)
                continue
            left = (~held.past).nonzero().squeeze(1)
            if len(left) == 0:
                break
            images = self._climbed(subject, objective, start[left], part.x[left], part.y[left])
            found = self._tried(subject, images, part.y[left])
            news = left[found.past]
            merged = (old.index_copy(0, news, new[found.past]) for old, new in zip(held, found, strict=True))
            held = Attempt(*merged)
        assert held is not None
        return held

    def _climbed(self, subject: Subject, objective: Objective, start: Tensor, x: Tensor, y: Tensor) -> Tensor:
        epsilon = x.new_full((len(x),), subject.threat.epsilon)
        with subject.predict.using("eval") as predict:
            reference = Reference(natural=predict(x)) if objective.needs_reference else Reference()
            return climb(
                lambda images: objective(predict(images), y, reference),
                start,
                x,
                threat=subject.threat,
                epsilon=epsilon,
                step_size=step_sizes(self.step_size, Budget(epsilon)),
                steps=self.steps,
            )

    def _tried(self, subject: Subject, images: Tensor, y: Tensor) -> Attempt:
        logits = subject.logits(images)
        return Attempt(images, is_right(logits, y), score(logits) >= (self.threshold or 0.0))

    def passes(self, norm: str, classes: int) -> Passes:
        attempts = 1 + RESISTING * 2 * self.restarts
        return Passes(forward=round(1 + attempts * (self.steps + 1)), input_backward=round(attempts * self.steps))
