"""Shorten each perturbation until a naturally trained network is right again: DAAT, from its abstract."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Attack, Predict, ThreatModel
from robustkit.core.world import World
from robustkit.helper import Frozen, Helper, Untrained

PIXELS = tuple(k / 255 for k in range(1, 9))
"""1/255 ... 8/255."""


@registry("attack").register("calibrated")
@spec
class Calibrated:
    """The perturbation of `inner`, cut to the largest of `radii` at which `helper` is right (DAAT, from its abstract).

    Yang and Xu, ECCV 2022, let a naturally trained calibration network decide how large each image's ball may be. No
    formula, schedule or code of theirs could be had, and their "dynamic training strategy" is left out: this is a
    re-implementation from the abstract and provisional. With d what `inner` found within the budget, epsilon_i is the
    largest e of `radii` (pixels) with argmax helper(x_i + clip(d_i, +-e)) = y_i, the smallest of them where there is
    none, and x_i + clip(d_i, +-epsilon_i) the result. No image moves further than the largest radius; a radius of 0
    leaves those clean that the helper gets wrong anyway.
    """

    inner: Attack = PGD()
    helper: Helper | Untrained = Helper()
    radii: tuple[float, ...] = setting(default=PIXELS, at_least=0)

    def validate(self) -> None:
        if not self.radii:
            raise SpecError("must hold at least one radius", place="Calibrated.radii")

    def check(self, recipe: Recipe) -> None:
        """Refuse other norms."""
        if recipe.threat.norm != "Linf":
            fault = f"calibrated perturbations are for L-inf, the threat model is {recipe.threat.norm}"
            raise RecipeError(fault, place="attack", remedy="another attack, e.g. attack=pgd")

    @property
    def reach(self) -> float:
        return self.inner.reach

    @property
    def mode(self) -> Mode:
        return getattr(self.inner, "mode", "eval")

    def build(self, world: World) -> Calibrating:
        return Calibrating(self, world)

    def rehearsed(self, recipe: Recipe) -> Calibrated:
        """With an untrained helper of the recipe's own architecture."""
        return evolve(self, helper=Untrained(model=recipe.model, head=recipe.head))

    def passes(self, progress: Progress) -> Passes:
        return self.inner.passes(progress) + Passes(forward=len(self.radii))


class Calibrating(nn.Module):
    """State: which helper it is."""

    def __init__(self, spec: Calibrated, world: World) -> None:
        super().__init__()
        self.spec = spec
        self.helper = Frozen(spec.helper, world)

    def ready(self) -> dict[str, str]:
        """Loads the helper, before training begins; says which it is."""
        return {"calibration": self.helper.ready()}

    def at(self, progress: Progress) -> Calibrating:
        if not hasattr(self.spec.inner, "at"):
            return self
        then = copy(self)
        then.spec = evolve(self.spec, inner=self.spec.inner.at(progress))
        return then

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        found = self.spec.inner(predict, x, y, budget, threat, generator)
        radii = torch.stack([x.new_full((len(x),), radius) for radius in self.spec.radii])  # (R, B)
        tried = torch.cat([threat.project(found, x, radius) for radius in radii])
        right = self.helper(tried).argmax(dim=1).view(radii.shape) == y
        epsilon = torch.where(right, radii, min(self.spec.radii)).amax(dim=0)
        return threat.project(found, x, epsilon)
