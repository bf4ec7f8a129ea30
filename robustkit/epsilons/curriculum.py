"""Attack with more and more steps, a stage at a time, and mix in those of the stages before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Predict, Scene, ThreatModel
from robustkit.core.world import World

FINEST = 1 << 53
"""A draw between 0 and 1 is a whole number below this, divided by it."""


@registry("epsilon").register("curriculum")
@spec
class Curriculum:
    """Curriculum of attack strengths with batch mixing (CAT, Cai et al., IJCAI 2018; details from its code).

    At stage k a batch has k + 1 equal parts; part l takes l steps of (2 epsilon / l) U(1, 10 / l), drawn once for each
    part and step of training, and part 0 stays clean. `value` is epsilon; None takes the threat model's. With the rule
    "validation" a stage ends when accuracy under PGD-k on the held-out images has not improved for `patience` epochs
    and that on the training batches is above `train_accuracy`: training goes back to the stage's best weights and on
    with k + 1. With "training" it ends when `train_accuracy` is passed. None is the code's 0.9 and 0.95. The last stage
    is `stages` under either rule (the code's "validation" has no last one).

    Its attack is `Grouped(inner=PGD(mode="train"))`.
    """

    value: float | None = setting(default=None, above=0)
    stages: int = setting(default=7, at_least=0)
    rule: Literal["validation", "training"] = "validation"
    patience: int = setting(default=10, at_least=1)
    train_accuracy: float | None = setting(default=None, at_least=0, at_most=1)
    sets_step_size: ClassVar[bool] = True
    stops_early: ClassVar[bool] = True

    @property
    def step_counts(self) -> tuple[int, ...]:
        """How many steps equal parts of a batch take in the last stage."""
        return tuple(range(self.stages + 1))

    def check(self, recipe: Recipe) -> None:
        """Refuse the rule "validation" where not every epoch is validated."""
        if self.rule == "training":
            return
        if not recipe.validation.images:
            raise RecipeError(
                "the curriculum's stages end by accuracy on held-out images, and there are none",
                place="validation.images",
                remedy="validation.images=1000, or epsilon.rule=training",
            )
        if recipe.validation.every > 1:
            raise RecipeError(
                f"the curriculum counts epochs without improvement, but only every {recipe.validation.every}. is "
                "validated",
                place="validation.every",
                remedy="validation.every=1, or epsilon.rule=training",
            )

    def build(self, world: World) -> Stages:
        return Stages(self)

    def passes(self, progress: Progress) -> Passes:
        return Passes()


class Stages(nn.Module):
    """State: the stage, its best accuracy on held-out images (-1: none yet), and the epochs waited since then."""

    stage: Tensor
    best: Tensor
    waited: Tensor

    def __init__(self, spec: Curriculum) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best", torch.full((), -1.0, dtype=torch.float64))
        self.register_buffer("waited", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> Stages:
        return self  # its numbers steer the host: on another device, every step would wait for them

    def __call__(self, scene: Scene) -> Budget:
        x, part, radius = scene.batch.x, scene.part, self._radius(scene.threat)
        parts = min(int(self.stage) + 1, part.total)  # a batch of fewer images has as many parts as images
        rows = torch.arange(part.start, part.stop, device=x.device)
        # Every so many rows belong to one part, the rest to the last: so all processes have as much to do.
        steps = torch.where(rows < part.total // parts * parts, rows % parts, parts - 1)
        step_size = x.new_zeros(len(x))
        generator = scene.generator("curriculum")
        for count in range(1, parts):
            factor = 1 + (10 / count - 1) * generator.integer(FINEST) / FINEST
            step_size = torch.where(steps == count, 2 * radius / count * factor, step_size)
        epsilon = x.new_full((len(x),), radius) * (steps > 0)  # a random start leaves clean images clean
        return Budget(epsilon, step_size, steps, max_steps=parts - 1)

    def watched(self) -> dict[str, Callable[..., Tensor]]:
        """PGD-k, whose accuracy decides; the natural one does at stage 0."""
        return {"stage": self._attack} if self.stage and self.spec.rule == "validation" else {}

    def after_epoch(self, report: dict[str, Any]) -> Literal["keep", "rewind"] | None:
        """Notes the epoch's stage in its report, and decides on the next one's."""
        report["stage"] = int(self.stage)
        bound = self.spec.train_accuracy
        if bound is None:
            bound = 0.9 if self.spec.rule == "validation" else 0.95
        may_advance = report["train"]["right adversarial"] > bound and int(self.stage) < self.spec.stages
        if self.spec.rule == "training":
            self.stage += may_advance
            return None
        held_out = report["validation"]
        accuracy = held_out.get("stage", held_out["natural"])
        if accuracy > self.best:
            self.best.fill_(accuracy)
            self.waited.zero_()
            return "keep"
        self.waited += 1
        if self.waited < self.spec.patience or not may_advance:
            return None
        self.stage += 1
        self.best.fill_(-1.0)
        self.waited.zero_()
        return "rewind"

    def _radius(self, threat: ThreatModel) -> float:
        return threat.epsilon if self.spec.value is None else self.spec.value

    def _attack(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        """As many steps as the stage has, each of 2 epsilon over their number, in eval mode."""
        stage = int(self.stage)
        epsilon = torch.full_like(budget.epsilon, self._radius(threat))
        attack = registry("attack").get("pgd")(steps=stage)
        x_adv: Tensor = attack(predict, x, y, Budget(epsilon, 2 * epsilon / stage), threat, generator)
        return x_adv
