"""New strategy: what is reported of a finished model?"""

from __future__ import annotations

from collections.abc import Iterator

from robustkit import registry, setting, spec
from robustkit.core.batch import Passes
from robustkit.core.rng import whole
from robustkit.core.strategy import Outcomes, Slice, Subject
from robustkit.evaluation.logits import is_right

__all__ = ["NewStrategy"]


@registry("measure").register("new-strategy")
@spec
class NewStrategy:
    """Accuracy on images with Gaussian noise of standard deviation `sigma`, clipped to [0, 1]."""

    key: str = "new-strategy"
    sigma: float = setting(default=0.1, at_least=0)
    images: int | None = setting(default=None, at_least=1)

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        noise = whole(part.x, seed, self.key, part.number).normal(part.x)
        yield Outcomes(is_right(subject.logits((part.x + self.sigma * noise).clamp(0, 1)), part.y))

    def passes(self, norm: str, classes: int) -> Passes:
        return Passes(forward=1)
