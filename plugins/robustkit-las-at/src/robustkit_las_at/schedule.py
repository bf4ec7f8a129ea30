"""LAS-AT: radius, steps and step size of each image are drawn from a policy that learns which of them pay."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from robustkit import Recipe, evolve, px, registry, setting, spec
from robustkit.core.batch import Budget, Mode, Passes, Progress
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.strategy import LossRuntime, OuterLoss, Scene, Schedule
from robustkit.core.world import World
from robustkit.epsilons import Fixed
from robustkit.losses import CrossEntropy, Trades
from robustkit.schedules import Constant
from robustkit_las_at import probe
from robustkit_las_at.policy import Policy, pick

CLIP = 1.0
"""The longest gradient that the policy steps along."""


@registry("epsilon").register("las-at")
@spec
class LASAT:
    """Attack parameters drawn for each image from a policy that is learnt (LAS-AT, Jia et al., CVPR 2022).

    A network of its own (`backbone`) gives distributions over `radii`, `steps`, `step_sizes`, and over `weights` where
    there are some (LAS-TRADES: they multiply each image's KL, so the loss is `Trades(weight=1)`). One value of each is
    drawn for each image. The attack's own `steps` must be the largest of `steps`: it makes that many for the batch, in
    which images stop moving after theirs.

    In every `interval`-th step the policy learns first, by REINFORCE on one reward for the whole batch, R1 + R2 + R3:
    R1 is the loss of examples that it chose (cross-entropy, at most 10; with `weights` TRADES' loss, at most 20), in
    `mode`. A copy of the model makes a training step on them, with `rehearsal_loss` or the recipe's own; R2 is
    `robust_reward` times its accuracy under PGD-10 with two restarts, R3 `natural_reward` times that without attack.
    In that PGD misclassified images stay where they are unless `stop_when_fooled` is false. `lr`, `schedule`,
    `momentum` and `weight_decay` are of the policy's own gradient descent.

    The defaults are those of LAS-PGD-AT on CIFAR-10. The policy's own passes are not counted: one forward a step, and
    in steps in which it learns a forward and a backward more.
    """

    radii: tuple[float, ...] = setting(default=tuple(k * px for k in range(3, 16)), above=0)
    steps: tuple[int, ...] = setting(default=tuple(range(3, 15)), at_least=1)
    step_sizes: tuple[float, ...] = setting(default=tuple(k * px for k in range(1, 6)), above=0)
    weights: tuple[float, ...] = setting(default=(), at_least=0)
    interval: int = setting(default=20, at_least=1)
    robust_reward: float = 4.0
    natural_reward: float = 2.0
    mode: Mode = "eval"
    rehearsal_loss: OuterLoss | None = None
    stop_when_fooled: bool = True
    backbone: str = "resnet18_cifar"
    lr: float = setting(default=1e-4, above=0)
    schedule: Schedule = Constant()
    momentum: float = setting(default=0.0, at_least=0, below=1)
    weight_decay: float = setting(default=0.0, at_least=0)
    sets_step_size: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    stops_early: ClassVar[bool] = True  # a target that moves in each step stays in a rehearsal, and declares its move

    def validate(self) -> None:
        for name in ("radii", "steps", "step_sizes"):
            if not getattr(self, name):
                raise SpecError("must hold at least one value", place=f"LASAT.{name}")
        if hasattr(self.rehearsal_loss, "build"):
            raise SpecError("must be a loss without state", place="LASAT.rehearsal_loss", remedy="e.g. cross-entropy")

    @property
    def most_steps(self) -> int:
        return max(self.steps)

    @property
    def strength(self) -> CrossEntropy | Trades:
        """The loss whose value is R1."""
        return Trades(weight=1.0) if self.weights else CrossEntropy()

    @property
    def highest(self) -> float:
        """What R1 is at most."""
        return 20.0 if self.weights else 10.0

    def learns(self, progress: Progress) -> bool:
        """Whether the policy learns in this step."""
        return progress.step % self.interval == 0

    def check(self, recipe: Recipe) -> None:
        """Refuse attacks that make another number of steps, and losses that do not use what is chosen for them."""
        steps, remedy = getattr(recipe.attack, "steps", None), f"e.g. attack=pgd attack.steps={self.most_steps}"
        if recipe.attack is None:
            raise RecipeError("las-at chooses for an attack, and there is none", place="attack", remedy=remedy)
        if steps is None:
            raise RecipeError("las-at chooses steps, and this attack has none", place="attack", remedy=remedy)
        if steps != self.most_steps:
            fault = f"the attack makes {steps} steps, but las-at chooses up to {self.most_steps}"
            raise RecipeError(fault, place="attack.steps", remedy=f"set attack.steps={self.most_steps}")
        if self.weights and recipe.loss != Trades(weight=1.0):
            fault, remedy = "las-at's weights multiply TRADES' KL alone", "loss=trades loss.weight=1"
            raise RecipeError(fault, place="epsilon.weights", remedy=f"set {remedy}, or epsilon.weights=()")
        if self.rehearsal_loss is not None and self.rehearsal_loss.needs_target != recipe.loss.needs_target:
            fault = "one of rehearsal_loss and the recipe's loss uses a target, the other does not"
            raise RecipeError(fault, place="epsilon.rehearsal_loss", remedy="set epsilon.rehearsal_loss=none")

    def build(self, world: World) -> Learner:
        return Learner(self, world)

    def passes(self, progress: Progress) -> Passes:
        """Where the attack climbs the cross-entropy and weights are not displaced."""
        loss = self.rehearsal_loss or CrossEntropy()
        return self._passes(Passes(self.most_steps, self.most_steps) + loss.passes(progress), progress)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """An attack and a step of this recipe, which are rehearsed, and what the rewards take.

        Exact but for targets with a state (universal perturbations), which do not move then.
        """
        if not self.learns(progress):
            return Passes()
        once = evolve(recipe, epsilon=Fixed(), loss=self.rehearsal_loss or recipe.loss)
        return self._passes(sum(once.passes(progress).values(), Passes()), progress)

    def _passes(self, rehearsed: Passes, progress: Progress) -> Passes:
        if not self.learns(progress):
            return Passes()
        return rehearsed + Passes(forward=self.strength.passes(progress).forward) + probe.PASSES + Passes(forward=2)


class Learner(nn.Module):
    """State: the policy, its velocity where it has momentum, the rewards (3,) that it learnt from last, and the epoch's
    sums of them and of their number (4,).
    """

    trains_itself = True
    velocity: Tensor
    rewards: Tensor
    earned: Tensor

    def __init__(self, spec: LASAT, world: World) -> None:
        super().__init__()
        self.spec = spec
        spaces = {"epsilon": spec.radii, "steps": spec.steps, "step_size": spec.step_sizes, "weight": spec.weights}
        self.chosen = [field for field, values in spaces.items() if values]  # fields of a budget
        for field in self.chosen:
            self.register_buffer(field, torch.tensor(spaces[field]), persistent=False)
        self.policy = Policy(spec.backbone, [len(spaces[field]) for field in self.chosen], world)
        if spec.momentum:
            self.register_buffer("velocity", torch.zeros(sum(p.numel() for p in self.policy.parameters())))
        self.register_buffer("rewards", torch.zeros(3))
        self.register_buffer("earned", torch.zeros(4))

    def forward(self, scene: Scene) -> Budget:
        if self.spec.learns(scene.progress):
            self.learn(scene)
        self.policy.eval()
        with torch.no_grad():
            return self.choose(scene, "las-at")[0]

    def choose(self, scene: Scene, purpose: str) -> tuple[Budget, Tensor]:
        """A budget, drawn for each image, and the logarithm of its probability (B,)."""
        x = scene.batch.x
        opinions: list[Tensor] = self.policy(x)
        draws = scene.generator(purpose).uniform(x.new_empty(len(x), len(opinions)))
        picks = [pick(opinion, draw) for opinion, draw in zip(opinions, draws.unbind(dim=1), strict=True)]
        logs = [opinion.gather(1, option[:, None]) for opinion, option in zip(opinions, picks, strict=True)]
        values = {field: getattr(self, field)[option] for field, option in zip(self.chosen, picks, strict=True)}
        return Budget(**values, max_steps=self.spec.most_steps), torch.cat(logs, dim=1).sum(dim=1)

    def learn(self, scene: Scene) -> None:
        """One step of the policy on this batch. Of the model nothing moves but its statistics, with `mode` "train"."""
        self.policy.train()
        with torch.enable_grad():
            budget, log_probability = self.choose(scene, "las-at learning")
        self.rewards.copy_(self.reward(scene, budget))
        self.earned += torch.cat([self.rewards, self.rewards.new_ones(1)])
        self.reinforce(scene, log_probability, self.rewards.sum())

    def after_epoch(self, report: dict[str, Any]) -> None:
        """Adds the epoch's mean rewards, under the paper's names, to its report."""
        *sums, count = self.earned.tolist()
        self.earned.zero_()
        if count:
            report["rewards"] = {f"R{number}": total / count for number, total in enumerate(sums, start=1)}

    @torch.no_grad()
    def reward(self, scene: Scene, budget: Budget) -> Tensor:
        """R1, R2 and R3 (3,) of the global batch, attacked by that budget."""
        attack, (x, y, _) = scene.attack, scene.batch
        assert attack is not None  # `check` refuses
        x_adv = attack(scene.predict, x, y, budget, scene.threat, scene.generator("las-at attack"))
        strength = self.spec.strength
        prepared = strength.prepare(scene, budget, x_adv)
        with scene.predict.using(self.spec.mode) as predict:
            outputs = {view: predict(images) for view, images in prepared.views.items()}
        terms = strength(outputs, None, scene.batch, prepared.extras, scene.progress)

        after = scene.rehearse(budget, x_adv, cast("LossRuntime | None", self.spec.rehearsal_loss))
        draws, stop = scene.generator("las-at probe"), self.spec.stop_when_fooled
        attacked = probe.strongest(after, x, y, scene.threat, draws, stop_when_fooled=stop)
        with after.using("eval") as predict:
            robust, natural = ((predict(images).logits.argmax(dim=1) == y).float().mean() for images in (attacked, x))

        value = torch.stack(list(terms.values())).sum()
        rewards = torch.stack([value, self.spec.robust_reward * robust, self.spec.natural_reward * natural])
        rewards = scene.world.sum(rewards * len(y) / scene.part.total)
        rewards[0].clamp_(0, self.spec.highest)
        return rewards

    def reinforce(self, scene: Scene, log_probability: Tensor, reward: Tensor) -> None:
        """One step of gradient descent on -reward times the mean of `log_probability` (B,) over the global batch."""
        parameters = list(self.policy.parameters())
        loss = -reward * log_probability.sum() / scene.part.total
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            move = scene.world.sum(torch.cat([gradient.reshape(-1) for gradient in found]))
            move *= (CLIP / (torch.linalg.vector_norm(move) + 1e-6)).clamp_max(1)
            if self.spec.weight_decay:
                move += self.spec.weight_decay * torch.cat([p.reshape(-1) for p in parameters])
            if self.spec.momentum:
                move = self.velocity.mul_(self.spec.momentum).add_(move)
            rate = self.spec.lr * self.spec.schedule(scene.progress).lr_scale
            parts = torch.split(move, [p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.sub_(rate * part.view(parameter.shape))
