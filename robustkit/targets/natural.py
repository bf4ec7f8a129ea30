"""The prediction on the natural image."""

from __future__ import annotations

from torch import Tensor

from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.core.strategy import Record, Scene


@registry("target").register("natural")
@spec
class Natural:
    """The prediction on the natural image, f(x)."""

    mode: Mode = "train"

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        return scene.batch.x

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None
        return output.logits.softmax(dim=1)

    def observe(self, record: Record) -> None:
        return

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=1)
