"""UIAT: the prediction on x plus a perturbation that makes its whole class easier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attacks.climb import repeatedly
from robustkit.core.batch import Batch, Budget, Mode, Output, Passes, Progress
from robustkit.core.registry import registry
from robustkit.core.rng import derive
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Objective, Predict, Record, Reference, Scene
from robustkit.core.world import World
from robustkit.objectives.inverse import InverseObjective


@registry("target").register("universal")
@spec
class Universal:
    """The prediction on x + z_y, z_k learned for class k (UIAT, CVPR 2023, Eq. 6 to 8).

    Each step moves z by one sign step of `step_size` (None: the radius, as published) down the inverse objective,
    summed over the images of the class, within `radius` (pixels of [0, 1]); a class absent from the batch stays. The
    step runs in eval mode; `mode` is the mode of the pass that reads the target from the moved z.
    """

    radius: float = setting(default=4 / 255, at_least=0)
    step_size: float | None = setting(default=None, above=0)
    objective: Objective = InverseObjective()
    noise: float = setting(default=0.001, at_least=0)
    mode: Mode = "train"

    def build(self, world: World) -> UniversalPerturbations:
        return UniversalPerturbations(self, world)

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=2 + 2 * self.objective.needs_reference, input_backward=1)

    @property
    def accumulates(self) -> bool:
        """One step of z per batch: a batch in pieces would take several."""
        return False


class UniversalPerturbations(nn.Module):
    """State: z (K, C, H, W) in float32, equal in every process."""

    z: Tensor

    def __init__(self, spec: Universal, world: World) -> None:
        super().__init__()
        self.spec, self.world = spec, world
        generator = torch.Generator().manual_seed(derive(world.seed, "universal"))
        z = spec.noise * torch.randn(world.classes, *world.image_shape, generator=generator)
        self.register_buffer("z", z.to(world.device))

    @property
    def mode(self) -> Mode:
        return self.spec.mode

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor, *, advance: bool = True) -> Tensor | None:
        if advance:
            with scene.predict.using("eval") as predict:
                self._step(predict, scene.batch, x_adv)
        return self.images(scene.batch)

    def images(self, batch: Batch) -> Tensor:
        """(B, C, H, W): x + z_y in the box."""
        return (batch.x + self.z[batch.y]).clamp(0, 1)

    def _step(self, predict: Predict, batch: Batch, x_adv: Tensor) -> None:
        objective = self.spec.objective

        def slope(z: Tensor, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
            reference = Reference()
            if objective.needs_reference:
                with torch.no_grad():
                    reference = Reference(natural=predict(x), adversarial=predict(x_adv))
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                images = (x + z[y]).clamp(0, 1)  # the gather's gradient adds up each class's images
                (gradient,) = torch.autograd.grad(objective(predict(images), y, reference).sum(), z)
            return gradient

        gradient = repeatedly(predict, ("universal", objective), slope, (self.z, batch.x, batch.y, x_adv))
        gradient = self.world.sum(gradient)  # before the sign: every process then makes the same step
        radius = self.spec.radius
        step_size = radius if self.spec.step_size is None else self.spec.step_size
        self.z.copy_((self.z + step_size * gradient.sign()).clamp(-radius, radius))

    def __call__(self, output: Output | None, batch: Batch, progress: Progress) -> Tensor:
        assert output is not None
        return output.logits.softmax(dim=1)

    def observe(self, record: Record) -> None:
        return
