"""LBGAT: a teacher learns the natural images beside the model, which learns the teacher's logits."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.model import Model
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import derive
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Scene
from robustkit.core.world import World
from robustkit.functional import kl_from_logits
from robustkit.heads.linear import Linear


@registry("loss").register("lbgat")
@spec
class LBGAT:
    """MSE(z_adv, t) + CE(t, y) + weight KL(f(x) || f(x_adv)) (Cui et al., ICCV 2021).

    z are the model's logits, t those of `teacher` on x: a network that starts untrained and is trained by the same
    optimiser. Nothing is held constant: t is drawn towards z_adv, too. The model sees labels through t alone. Squares
    are averaged over images and classes. Its attack is TRADES': `PGD(objective=KL(), start="gaussian")`.
    """

    weight: float = setting(default=6.0, at_least=0)
    teacher: Model = Model(backbone="resnet18_cifar")
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def build(self, world: World) -> Guided:
        return Guided(self, world)

    def rehearsed(self, recipe: Recipe) -> LBGAT:
        """With a teacher of the recipe's own architecture."""
        return evolve(self, teacher=recipe.model)

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=3, parameter_backward=2)

    def preparation(self, progress: Progress) -> Passes:
        """The teacher's backward."""
        return Passes(parameter_backward=1)


class Guided(nn.Module):
    """State: the teacher. It is always in training mode; no evaluation and no export knows it."""

    def __init__(self, spec: LBGAT, world: World) -> None:
        super().__init__()
        self.spec = spec
        teacher = spec.teacher.build(Linear(), world.classes, world.image_shape, derive(world.seed, "teacher"))
        self.teacher = teacher.to(memory_format=torch.channels_last)

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        x = scene.batch.x
        return Prepared(
            {"adversarial": x_adv, "natural": x, "teacher": x},
            shares={"adversarial": 0.5, "natural": 0.5, "teacher": 0.0},
            networks={"teacher": self.teacher},
        )

    def forward(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        natural, adversarial, teacher = (outputs[name].logits for name in ("natural", "adversarial", "teacher"))
        return {
            "guidance": F.mse_loss(adversarial, teacher),
            "teacher": F.cross_entropy(teacher, batch.y),
            "consistency": self.spec.weight * kl_from_logits(natural, adversarial).mean(),
        }
