"""Accuracy under adversarial images that were made on another network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.errors import SpecError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import whole
from robustkit.core.spec import evolve, setting, spec, walk
from robustkit.core.strategy import Attack, Outcomes, Slice, Subject, ThreatModel
from robustkit.core.world import World
from robustkit.engine import Predictor
from robustkit.evaluation.logits import is_right
from robustkit.helper import Frozen, Helper, Untrained


@registry("measure").register("transfer")
@spec
class Transfer:
    """Accuracy under adversarial images made on another network, the surrogate (Papernot et al. 2016): a black box.

    An image counts if the model gets it right as it is and as `attack` left it, which sees the `surrogate` alone, at
    the threat model's epsilon. The examples are made of all images, so they are the same for every model that is
    judged, and are brought into the ball and the box.

    A note says which network made them. A model that loses more here than to an attack on its own gradients masks them.
    """

    key: str = "transfer-pgd-40"
    surrogate: Helper | Untrained = Helper(run="runs/surrogate", made_by="recipes/natural.py")
    attack: Attack = PGD(steps=40)
    images: int | None = setting(default=None, at_least=1)

    def validate(self) -> None:
        for path, part in walk(self.attack, "Transfer.attack"):
            if getattr(part, "mode", "eval") != "eval":
                fault = f"attacks in mode '{part.mode}', and the surrogate must stay as it is"
                raise SpecError(fault, place=path, remedy="mode='eval'")
            if hasattr(part, "build"):
                raise SpecError(f"{type(part).__name__} has a state: it can only be the attack of training", place=path)

    def rehearsed(self, recipe: Recipe) -> Transfer:
        """With an untrained surrogate of the recipe's own architecture."""
        return evolve(self, surrogate=Untrained(model=recipe.model, head=recipe.head))

    def ready(self, threat: ThreatModel, world: World) -> Transfer:
        """Itself, with the sha256 of the surrogate that is there.

        Raises:
            UserError: as `Helper.network`; or it is not the one that is pinned.
        """
        frozen = Frozen(self.surrogate, world)
        frozen.ready()
        if isinstance(self.surrogate, Untrained):
            return self
        return evolve(self, surrogate=evolve(self.surrogate, sha256=bytes(frozen.sha256.tolist()).hex()))

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        (x, y, number), threat = part, subject.threat
        logits = subject.logits(x)
        channels, height, width = x.shape[1:]
        surrogate = _loaded(self.surrogate, logits.shape[1], (channels, height, width), x.device)
        budget = Budget(epsilon=x.new_full((len(x),), threat.epsilon))
        x_adv = self.attack(
            Predictor(surrogate.network, x.device), x, y, budget, threat, whole(x, seed, self.key, number)
        )
        x_adv = threat.project(x_adv, x, budget.epsilon)
        source = surrogate.ready()
        right = is_right(logits, y) & is_right(subject.logits(x_adv), y)
        yield Outcomes(right, notes=(f"the examples were made on {source}",) if source else ())

    def passes(self, norm: str, classes: int) -> Passes:
        """As if the surrogate cost what the model costs."""
        return self.attack.passes(Progress.at(0, 1, 1)) + Passes(forward=2)


@lru_cache(maxsize=1)
def _loaded(surrogate: Helper | Untrained, classes: int, shape: tuple[int, int, int], device: torch.device) -> Frozen:
    """Loaded once for all slices, and for all measures in a row that take the same one."""
    frozen = Frozen(surrogate, World(samples=0, training=0, classes=classes, image_shape=shape, device=device))
    frozen.ready()
    return frozen
