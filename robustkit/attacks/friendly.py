"""FAT: PGD that stops once an image is misclassified."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.attacks.climb import most_steps, repeatedly, step_sizes
from robustkit.attacks.climb_while import Rows, climb_while
from robustkit.attacks.pgd import refuse_misfits
from robustkit.core.batch import Budget, Mode, Output, Passes, Progress, start_epoch
from robustkit.core.errors import SpecError
from robustkit.core.recipe import Recipe, refuse_late_start
from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import evolve, setting, spec
from robustkit.core.strategy import Objective, Predict, Reference, ThreatModel
from robustkit.objectives.cross_entropy import CrossEntropyObjective


@registry("attack").register("friendly")
@spec
class Friendly:
    """Early-stopped PGD (FAT: Zhang et al., ICML 2020, Algorithm 1): an image stays where it is misclassified.

    Each of at most `steps` steps begins with a prediction. An image that is found misclassified for the `tau` + 1st
    time, not necessarily in a row, is final as it is, be it at its random start. With `tau` = `steps` and `omega` 0 it
    is PGD.

    `tau` grows in training: its first value holds at first, the next one after each epoch T of `switch`, a fraction of
    training up to 1, else an epoch, counted from 1. Outside of training (no `at`) the first holds.

    `step_size` in pixels; None takes the budget's, else epsilon / 4. `start`: "uniform" in the ball and the box,
    "gaussian" (x + `noise` N(0, 1), clipped; for TRADES and MART), or "clean". `omega` N(0, 1) is added to each step.
    """

    steps: int = setting(default=10, at_least=0)
    tau: tuple[int, ...] = setting(default=(0, 1, 2), at_least=0)
    switch: tuple[float, ...] = setting(default=(50 / 120, 90 / 120), above=0)
    step_size: float | None = setting(default=None, above=0)
    objective: Objective = CrossEntropyObjective()
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    noise: float = setting(default=0.001, at_least=0)
    omega: float = setting(default=0.001, at_least=0)
    mode: Mode = "eval"
    reach: ClassVar[float] = 1.0
    stops_early: ClassVar[bool] = True

    def validate(self) -> None:
        if len(self.tau) != len(self.switch) + 1:
            raise SpecError(
                f"{len(self.tau)} values of tau and {len(self.switch)} switches do not fit",
                place="Friendly.switch",
                remedy="give one switch between each two values, switch=() for a single one",
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse what PGD refuses, and switches beyond the end."""
        refuse_misfits(self, self.objective, self.step_size, recipe)
        for epoch in self.switch:
            refuse_late_start(epoch, recipe, "attack.switch")

    def at(self, progress: Progress) -> Friendly:
        """With the `tau` of that epoch alone."""
        done = sum(progress.epoch >= start_epoch(epoch, progress.epochs) for epoch in self.switch)
        return evolve(self, tau=(self.tau[done],), switch=())

    def __call__(
        self, predict: Predict, x: Tensor, y: Tensor, budget: Budget, threat: ThreatModel, generator: Generator
    ) -> Tensor:
        steps = self.steps if budget.steps is None else budget.max_steps
        start = self._start(x, budget, threat, generator)
        noise = None
        if self.omega and steps:
            noise = torch.stack([self.omega * generator.normal(x) for _ in range(steps)])
        with predict.using(self.mode) as predict:
            reference = Reference()
            if self.objective.needs_reference:
                with torch.no_grad():
                    reference = Reference(natural=predict(x))

            def ascend(
                start: Tensor,
                x: Tensor,
                y: Tensor,
                reference: Reference,
                budget: Budget,
                step_size: Tensor,
                tau: Tensor,
                noise: Tensor | None,
            ) -> Tensor:
                wrongs = torch.zeros_like(tau)

                def look(step: int, rows: Rows, images: Tensor) -> tuple[Tensor, Tensor]:
                    images = images.detach().requires_grad_()
                    with torch.enable_grad():
                        output = predict(images)
                        value = self.objective(output, y[rows], _of(rows, reference))
                        (gradient,) = torch.autograd.grad(value.sum(), images)
                    wrongs[rows] += output.logits.argmax(dim=1) != y[rows]
                    return gradient, wrongs[rows] <= tau[rows]

                return climb_while(
                    look,
                    start,
                    x,
                    threat=threat,
                    epsilon=budget.epsilon,
                    step_size=step_size,
                    steps=steps,
                    steps_per_image=budget.steps,
                    noise=noise,
                    mode=self.mode,
                )

            tau = torch.full_like(y, self.tau[0])
            found = (start, x, y, reference, budget, step_sizes(self.step_size, budget), tau, noise)
            same = evolve(self, tau=(0,), switch=())  # what it does whatever tau, which is among the tensors
            return repeatedly(predict, ("friendly", same, threat), ascend, found)

    def _start(self, x: Tensor, budget: Budget, threat: ThreatModel, generator: Generator) -> Tensor:
        if self.start == "gaussian":
            return threat.project(x + self.noise * generator.normal(x), x, budget.epsilon)
        return threat.random(x, budget.epsilon, generator) if self.start == "uniform" else x

    def passes(self, progress: Progress) -> Passes:
        """At most: images that are final leave the batch where that saves time."""
        return Passes(forward=self.steps + self.objective.needs_reference, input_backward=self.steps)

    def passes_in(self, recipe: Recipe, progress: Progress) -> Passes:
        """With as many steps as the epsilon schedule has it take at most, where it says."""
        return evolve(self, steps=most_steps(self.steps, recipe)).passes(progress)


def _of(rows: Rows, reference: Reference) -> Reference:
    """The reference of those images."""
    if reference.natural is None:
        return reference
    return Reference(natural=Output(*(value[rows] for value in reference.natural)))
