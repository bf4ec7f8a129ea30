"""Mix each image's target with the one it had the last time it was seen."""

from __future__ import annotations

from typing import Any

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


@registry("target").register("momentum")
@spec
class Momentum:
    """From epoch T on, p = gamma p_before + (1 - gamma) q, image by image (UIAT, CVPR 2023, Eq. 8).

    `start` is T as a fraction of training (0.75: epoch 75 of 100), or an epoch counted from 1. Targets are remembered
    from epoch T - 1 on; an image not seen since then keeps q.
    """

    inner: TargetDistribution = Universal()
    gamma: float = setting(default=0.9, at_least=0, at_most=1)
    start: float = setting(default=0.75, at_least=0)

    def check(self, recipe: Recipe) -> None:
        """Refuse a start beyond the end."""
        refuse_late_start(self.start, recipe, "target.start")

    def build(self, world: World) -> MomentumMemory:
        return MomentumMemory(self, world)

    def passes(self, progress: Progress) -> Passes:
        return self.inner.passes(progress)

    @property
    def mode(self) -> Mode:
        return self.inner.mode


class MomentumMemory(nn.Module):
    """State: one row of probabilities for each training image, and what the inner target keeps."""

    def __init__(self, spec: Momentum, world: World) -> None:
        super().__init__()
        self.spec = spec
        self.inner: Any = build(spec.inner, world)
        self.memory = PerSampleMemory(world, world.classes)

    @property
    def mode(self) -> Mode:
        return self.spec.mode

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        images: Tensor | None = self.inner.prepare(scene, budget, x_adv, advance=advance)
        return images

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        q: Tensor = self.inner(output, batch, progress)
        if progress.epoch + 1 < start_epoch(self.spec.start, progress.epochs):
            return q
        before, seen = self.memory.read(batch.index)
        return torch.where(seen[:, None], self.spec.gamma * before + (1 - self.spec.gamma) * q, q)

    def observe(self, record: Record) -> None:
        self.inner.observe(record)
        if record.target is not None and record.progress.epoch + 2 >= start_epoch(
            self.spec.start, record.progress.epochs
        ):
            self.memory.write(record.batch.index, record.target)
