"""IAT: the prediction on an inverse adversarial example of each image."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Objective, Record, Reference, Scene
from robustkit.objectives.inverse import InverseObjective


@registry("target").register("inverse")
@spec
class Inverse:
    """The prediction on x descended to be easy, image by image (IAT; UIAT, CVPR 2023, section 3.1).

    `radius` and `step_size` in pixels of [0, 1]. The descent runs in eval mode from x + `noise` N(0, 1); `mode` is the
    mode of the pass that reads the target.
    """

    radius: float = setting(default=4 / 255, at_least=0)
    steps: int = setting(default=5, at_least=0)
    step_size: float = setting(default=2 / 255, above=0)
    objective: Objective = InverseObjective()
    noise: float = setting(default=0.001, at_least=0)
    mode: Mode = "train"

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        x, y = scene.batch.x, scene.batch.y
        descent = PGD(
            steps=self.steps, step_size=self.step_size, objective=self.objective, start="gaussian", noise=self.noise
        )
        with torch.no_grad(), scene.predict.using("eval") as predict:
            needed = self.objective.needs_reference
            reference = Reference(natural=predict(x), adversarial=predict(x_adv)) if needed else Reference()
        radius = torch.full_like(budget.epsilon, self.radius)
        generator = scene.generator("inverse")
        found = descent(scene.predict, x, y, Budget(radius), scene.threat, generator, reference=reference)
        return scene.threat.project(found, x, radius)

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None
        return output.logits.softmax(dim=1)

    def observe(self, record: Record) -> None:
        return

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=self.steps + 2 * self.objective.needs_reference + 1, input_backward=self.steps)
