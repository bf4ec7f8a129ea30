"""GradAlign: near an image, the loss should slope as it does at the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Output, Passes, Prepared, Progress
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import OuterLoss, Record, Reference, Scene, build
from robustkit.core.world import World
from robustkit.functional import per_image
from robustkit.losses.cross_entropy import CrossEntropy
from robustkit.objectives.cross_entropy import CrossEntropyObjective

LARGEST = 16 / 255
"""The rule for the weight was found up to this radius."""


@registry("loss").register("grad-align")
@spec
class GradAlign:
    """Any outer loss, plus weight (1 - mean cos(g(x), g(x + u))) (Andriushchenko and Flammarion, NeurIPS 2020).

    g is the gradient of the cross-entropy with respect to the image, u ~ U(-eps, eps) within each image's own radius,
    and x + u is not clamped to the box. g(x) is a constant: gradients reach the weights through g(x + u) alone. Images
    where either is zero are left out. `weight` None follows the authors' rule for CIFAR-10, 0.02 * 10^(255 epsilon / 8)
    of the threat model's epsilon.

    Its attack is `RSFGSM(noise=0.0, mode="train-frozen")`: the statistics of x move here, in the pass that gives g(x).
    """

    inner: OuterLoss = CrossEntropy()
    weight: float | None = setting(default=None, at_least=0)

    @property
    def needs_target(self) -> bool:
        return self.inner.needs_target

    @property
    def detach_target(self) -> bool:
        return self.inner.detach_target

    def check(self, recipe: Recipe) -> None:
        """Refuse other norms, radii that the rule for the weight was not made for, and joint forwards."""
        if recipe.threat.norm != "Linf":
            raise RecipeError(f"GradAlign is for L-inf, the threat model is {recipe.threat.norm}", place="loss")
        if self.weight is None and recipe.threat.epsilon > LARGEST * (1 + 1e-6):
            raise RecipeError(
                f"the rule for the weight ends at 16/255, the radius is {255 * recipe.threat.epsilon:g}/255",
                place="loss.weight",
                remedy="set it, e.g. loss.weight=2",
            )
        if getattr(self.inner, "joint", False):
            raise RecipeError(
                "images that are differentiated cannot share a forward with others",
                place="loss.inner.joint",
                remedy="set loss.inner.joint=false",
            )

    def build(self, world: World) -> GradientAlignment:
        return GradientAlignment(self, build(self.inner, world))

    def rehearsed(self, recipe: Recipe) -> GradAlign:
        return evolve(self, inner=self.inner.rehearsed(recipe)) if hasattr(self.inner, "rehearsed") else self

    def preparation(self, progress: Progress) -> Passes:
        return self.inner.preparation(progress) if hasattr(self.inner, "preparation") else Passes()

    def passes(self, progress: Progress) -> Passes:
        """Beside the inner loss: two forwards, two gradients, and one of these differentiated again."""
        return self.inner.passes(progress) + Passes(forward=2, input_backward=2, parameter_backward=2)


class GradientAlignment(nn.Module):
    """State: that of the inner loss."""

    def __init__(self, spec: GradAlign, inner: Any) -> None:
        super().__init__()
        self.spec, self.inner = spec, inner

    def ready(self) -> dict[str, str]:
        return self.inner.ready() if hasattr(self.inner, "ready") else {}

    def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Prepared:
        inner: Prepared = self.inner.prepare(scene, budget, x_adv)
        x = scene.batch.x
        u = (2 * scene.generator("grad-align").uniform(x) - 1) * per_image(budget.epsilon, x)
        ours = {"image": x.detach().clone().requires_grad_(), "neighbour": (x.detach() + u).requires_grad_()}
        shares = inner.shares or dict.fromkeys(inner.views, 1 / len(inner.views))
        weight = self.spec.weight
        if weight is None:
            weight = 0.02 * 10 ** (255 * scene.threat.epsilon / 8)
        extras = {**inner.extras, **ours, "grad-align weight": x.new_full((1,), weight)}
        return inner._replace(views=ours | inner.views, extras=extras, shares=dict.fromkeys(ours, 0.0) | shares)

    def forward(
        self,
        outputs: dict[str, Output],
        target: Tensor | None,
        batch: Batch,
        extras: dict[str, Tensor],
        progress: Progress,
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.inner(outputs, target, batch, extras, progress)
        here, there = (
            torch.autograd.grad(
                CrossEntropyObjective()(outputs[view], batch.y, Reference()).sum(),
                [extras[view]],
                retain_graph=True,
                create_graph=view == "neighbour",
            )[0]
            for view in ("image", "neighbour")
        )
        return terms | {"grad-align": extras["grad-align weight"].squeeze() * misalignment(here, there)}

    def observe(self, record: Record) -> None:
        if hasattr(self.inner, "observe"):
            self.inner.observe(record)


def misalignment(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean cos(a_i, b_i) over the rows of (B, ...) that are zero in neither; 0 where none is left."""
    a, b = a.flatten(1), b.flatten(1)
    kept = (_norms(a) > 0) & (_norms(b) > 0)
    one = torch.ones_like(a[:, :1])  # in place of a zero row, whose norm has no gradient
    a, b = (torch.where(kept[:, None], rows, one) for rows in (a, b))
    cosines = (a * b).sum(dim=1) / (_norms(a) * _norms(b))
    return ((1 - cosines) * kept).sum() / kept.sum().clamp_min(1)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)  # type: ignore[no-any-return]
