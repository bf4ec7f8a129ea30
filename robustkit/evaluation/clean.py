"""Accuracy on the images as they are."""

from __future__ import annotations

from collections.abc import Iterator

from robustkit.core.batch import Passes
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Outcomes, Slice, Subject
from robustkit.evaluation.logits import is_right


@registry("measure").register("clean")
@spec
class Clean:
    """Accuracy on unperturbed images ("natural" in many papers)."""

    images: int | None = setting(default=None, at_least=1)

    @property
    def key(self) -> str:
        return "clean"

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        yield Outcomes(is_right(subject.logits(part.x), part.y))

    def passes(self, norm: str, classes: int) -> Passes:
        return Passes(forward=1)
