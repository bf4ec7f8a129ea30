"""DAT: PGD that stops once an image is adversarial enough for that time of training."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.attacks.climb import most_steps, repeatedly, step_sizes
from robustkit.attacks.climb_while import Rows, climb_while
from robustkit.core.batch import Budget, Mode, Passes, Progress, start_epoch
from robustkit.core.errors import RecipeError
from robustkit.core.recipe import Recipe, refuse_late_start
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Predict, Reference, ThreatModel
from robustkit.functional import per_image
from robustkit.objectives.cross_entropy import CrossEntropyObjective


def fosc(gradient: Tensor, moved: Tensor, epsilon: Tensor) -> Tensor:
    """epsilon |g|_1 - <moved, g>: how far the linearised loss could still rise in the L-inf ball (Wang et al., 2019).

    The paper's first-order stationary condition. It is 0 where no move within the ball helps to first order, epsilon
    |g|_1 in its centre, and never negative while `moved` lies within it.

    Args:
        gradient: (B, C, H, W) of each image's own cross-entropy. That of a mean over B images is B times too small.
        moved: (B, C, H, W), the iterate less the centre.
        epsilon: (B,) in pixels.

    Returns:
        (B,) in units of the loss.
    """
    g = gradient.flatten(1)
    return epsilon * g.abs().sum(dim=1) - (g * moved.flatten(1)).sum(dim=1)


@registry("attack").register("dynamic")
@spec
class Dynamic:
    """PGD until the first-order stationary condition (`fosc`) holds to a tolerance (DAT: Wang et al., ICML 2019).

    From x + U(-epsilon, epsilon), not clipped to the box, every image takes one sign step. Each later one, `steps` in
    all, is taken only by images whose FOSC still exceeds the threshold; the others are final. The budget's step size,
    else epsilon / 4.

    The threshold falls in training, from `threshold` in the first epoch straight to 0 after epoch `until` (a fraction
    of training up to 1, else an epoch), where it stays; `until` None, and outside of training (no `at`): it stays as it
    is. `center`: whence FOSC measures the move, from the "clean" image (the definition), or from the random "start"
    (the authors' code, where it may be negative).

    The authors' code takes one gradient more, after the last step, and only logs it.
    """

    steps: int = setting(default=10, at_least=0)
    threshold: float = setting(default=0.5, at_least=0)
    until: float | None = setting(default=100 / 120, above=0)
    center: Literal["clean", "start"] = "clean"
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0
    stops_early: ClassVar[bool] = True

    def check(self, recipe: Recipe) -> None:
        """Refuse other norms, and a threshold that falls beyond the end."""
        if recipe.threat.norm != "Linf":
            raise RecipeError(
                f"FOSC is for L-inf, the threat model is {recipe.threat.norm}",
                place="attack",
                remedy="set threat=linf, or attack=pgd",
            )
        if self.until is not None:
            refuse_late_start(self.until, recipe, "attack.until")

    def at(self, progress: Progress) -> Dynamic:
        """With the threshold of that epoch."""
        if self.until is None:
            return self
        left = max(0.0, 1 - progress.epoch / start_epoch(self.until, progress.epochs))
        return evolve(self, threshold=self.threshold * left, until=None)

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        steps = self.steps if budget.steps is None else budget.max_steps
        start = x + (2 * generator.uniform(x) - 1) * per_image(budget.epsilon, x)
        step_size = step_sizes(None, budget)
        threshold = torch.full_like(budget.epsilon, self.threshold)
        with predict.using(self.mode) as predict:

            def ascend(
                start: Tensor, x: Tensor, y: Tensor, budget: Budget, step_size: Tensor, threshold: Tensor
            ) -> Tensor:
                center = x if self.center == "clean" else start

                def look(step: int, rows: Rows, images: Tensor) -> tuple[Tensor, Tensor]:
                    images = images.detach().requires_grad_()
                    with torch.enable_grad():
                        value = CrossEntropyObjective()(predict(images), y[rows], Reference())
                        (gradient,) = torch.autograd.grad(value.sum(), images)
                    left = fosc(gradient, images.detach() - center[rows], budget.epsilon[rows])
                    return gradient, (left > threshold[rows]) | (step == 0)

                return climb_while(
                    look,
                    start,
                    x,
                    threat=threat,
                    epsilon=budget.epsilon,
                    step_size=step_size,
                    steps=steps,
                    steps_per_image=budget.steps,
                    mode=self.mode,
                )

            found = (start, x, y, budget, step_size, threshold)
            same = evolve(self, threshold=0.0, until=None)  # what it does whatever the threshold
            result = repeatedly(predict, ("dynamic", same, threat), ascend, found)
        return threat.project(result, x, budget.epsilon)  # an image that took no step is still at its start

    def passes(self, progress: Progress) -> Passes:
        """At most: images that are final leave the batch where that saves time."""
        return Passes(forward=self.steps, input_backward=self.steps)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """With as many steps as the epsilon schedule has it take at most, where it says."""
        return evolve(self, steps=most_steps(self.steps, recipe)).passes(progress)
