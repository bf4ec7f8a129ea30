"""Compute the inner target in one epoch only, and keep it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Progress, start_epoch
from robustkit.core.memory import PerSampleMemory
from robustkit.core.recipe import Recipe, refuse_late_start
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Record, Scene, TargetDistribution, build
from robustkit.core.world import World
from robustkit.targets.universal import Universal


@registry("target").register("one-off")
@spec
class OneOff:
    """Before epoch T' the prediction on x; in it the inner target; after it what was found then.

    UIAT one-off (UIAT, CVPR 2023, section 3.3; supplement Eq. 2). `start` is T' as a fraction of training
    (0.8: epoch 80 of 100), or an epoch counted from 1. `freeze`: "probabilities" keeps each image's row (no forward
    after T'), "perturbation" keeps the inner target's state and forwards again. An image not seen in epoch T' falls
    back to the latter.
    """

    inner: TargetDistribution = Universal()
    start: float = setting(default=0.8, at_least=0)
    freeze: Literal["probabilities", "perturbation"] = "probabilities"
    waits: ClassVar[bool] = True  # once, or where an image was not seen

    def check(self, recipe: Recipe) -> None:
        """Refuse a start beyond the end."""
        refuse_late_start(self.start, recipe, "target.start")

    def build(self, world: World) -> OneOffMemory:
        return OneOffMemory(self, world)

    @property
    def mode(self) -> Mode:
        return self.inner.mode

    def passes(self, progress: Progress) -> Passes:
        phase = progress.epoch + 1 - start_epoch(self.start, progress.epochs)
        if phase == 0:
            return self.inner.passes(progress)
        return Passes(forward=int(phase < 0 or self.freeze == "perturbation"))


class OneOffMemory(nn.Module):
    """State: the row that each image got in epoch T', and what the inner target keeps."""

    def __init__(self, spec: OneOff, world: World) -> None:
        super().__init__()
        self.spec = spec
        self.inner: Any = build(spec.inner, world)
        self.memory = PerSampleMemory(world, world.classes)
        self._complete: bool | None = None  # worked out once epoch T' is over

    @property
    def mode(self) -> Mode:
        return self.spec.mode

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        phase = self._phase(scene.progress)
        if phase < 0:
            return scene.batch.x
        if phase > 0 and self.spec.freeze == "probabilities" and self._all_seen(scene):
            return None
        images: Tensor | None = self.inner.prepare(scene, budget, x_adv, advance=advance and phase == 0)
        return images

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        phase = self._phase(progress)
        if phase < 0:
            assert output is not None
            return output.logits.softmax(dim=1)
        if phase == 0 or self.spec.freeze == "perturbation":
            q: Tensor = self.inner(output, batch, progress)
            return q
        before, seen = self.memory.read(batch.index)
        return before if output is None else torch.where(seen[:, None], before, self.inner(output, batch, progress))

    def observe(self, record: Record) -> None:
        self.inner.observe(record)
        if record.target is not None and self._phase(record.progress) == 0:
            self.memory.write(record.batch.index, record.target)

    def _all_seen(self, scene: Scene) -> bool:
        """Whether each image of the batch has a row; asked of the device only if some training image has none."""
        if self._complete is None:
            self._complete = int(self.memory.visited.sum()) >= scene.world.training
        return self._complete or not scene.world.any(not bool(self.memory.read(scene.batch.index)[1].all()))

    def _phase(self, progress: Progress) -> int:
        """Negative before epoch T', 0 in it, positive after."""
        return progress.epoch + 1 - start_epoch(self.spec.start, progress.epochs)
