"""New strategy: what should the prediction on the adversarial image match?"""

from __future__ import annotations

from torch import Tensor

from robustkit import registry, setting, spec
from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Progress
from robustkit.core.strategy import Record, Scene

__all__ = ["NewStrategy"]


@registry("target").register("new-strategy")
@spec
class NewStrategy:
    """The prediction on the natural image, smoothed: the share `smoothing` is spread over all classes."""

    smoothing: float = setting(default=0.1, at_least=0, at_most=1)
    mode: Mode = "train"

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        return scene.batch.x

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None  # `prepare` asks for a forward
        natural = output.logits.softmax(dim=1)
        return (1 - self.smoothing) * natural + self.smoothing / natural.shape[1]

    def observe(self, record: Record) -> None:
        """Called after each step; a target with a memory writes it here (see robustkit's `targets/momentum.py`)."""

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1)
