"""HAT: far beyond the adversarial image, say what a natural network says of it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Scene
from robustkit.core.world import World
from robustkit.functional import kl_from_logits
from robustkit.helper import Frozen, Helper, Untrained


@registry("loss").register("hat")
@spec
class Hat:
    """CE(f(x), y) + weight KL(f(x) || f(x_adv)) + helper_weight CE(f(x_h), y_h) (Rade and Moosavi-Dezfooli, ICLR 2022).

    The helper image x_h = x + reach (x_adv - x) is not clipped; its label y_h is what `helper`, a naturally trained
    network, says of x_adv. `robust` "ce" has CE(f(x_adv), y) in place of the KL; `label_smoothing` is of the first
    term. Its attack is TRADES': `PGD(objective=KL(), start="gaussian")`, for "ce" `PGD()`.
    """

    weight: float = setting(default=2.5, at_least=0)
    helper_weight: float = setting(default=0.5, at_least=0)
    reach: float = setting(default=2.0, at_least=0)
    robust: Literal["kl", "ce"] = "kl"
    label_smoothing: float = setting(default=0.0, at_least=0, below=1)
    helper: Helper | Untrained = Helper()
    needs_target: ClassVar[bool] = False
    detach_target: ClassVar[bool] = True

    def build(self, world: World) -> Helped:
        return Helped(self, world)

    def rehearsed(self, recipe: Recipe) -> Hat:
        """With an untrained helper of the recipe's own architecture."""
        return evolve(self, helper=Untrained(model=recipe.model, head=recipe.head))

    def passes(self, progress: Progress) -> Passes:
        return Passes(forward=3, parameter_backward=3)

    def preparation(self, progress: Progress) -> Passes:
        """The helper's forward."""
        return Passes(forward=1)


class Helped(nn.Module):
    """State: which helper it is."""

    def __init__(self, spec: Hat, world: World) -> None:
        super().__init__()
        self.spec = spec
        self.helper = Frozen(spec.helper, world)

    def ready(self) -> dict[str, str]:
        """Loads the helper, before training begins; says which it is."""
        return {"helper": self.helper.ready()}

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        x = scene.batch.x
        views = {"natural": x, "adversarial": x_adv, "helper": x + self.spec.reach * (x_adv - x)}
        return Prepared(views, {"helper labels": self.helper(x_adv).argmax(dim=1)})

    def __call__(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        natural, adversarial, beyond = outputs["natural"], outputs["adversarial"], outputs["helper"]
        if self.spec.robust == "kl":
            robust = kl_from_logits(natural.logits, adversarial.logits).mean()
        else:
            robust = F.cross_entropy(adversarial.margined, batch.y)
        return {
            "cross-entropy": F.cross_entropy(natural.margined, batch.y, label_smoothing=self.spec.label_smoothing),
            "robust": self.spec.weight * robust,
            "helper": self.spec.helper_weight * F.cross_entropy(beyond.logits, extras["helper labels"]),
        }
