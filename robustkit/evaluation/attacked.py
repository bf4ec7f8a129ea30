"""Accuracy under projected gradient descent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget, Passes
from robustkit.core.registry import registry
from robustkit.core.rng import derive, whole
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Objective, Outcomes, Slice, Subject
from robustkit.evaluation.logits import is_right
from robustkit.objectives.cross_entropy import CrossEntropyObjective
from robustkit.objectives.margin import Margin

RESISTING = 0.5
"""Share of images that is assumed to resist an attack, where a cost is predicted."""


@registry("measure").register("attacked")
@spec
class Attacked:
    """Accuracy under PGD, in eval mode, at the threat model's epsilon (Madry et al. 2018).

    An image counts if the model gets it right as it is and after every one of `restarts` attacks; each attack is made
    on those still right. So accuracy never exceeds the clean one, and more restarts only lower it. `step_size` in
    pixels of [0, 1], None: epsilon / 4 (2/255 at 8/255).
    """

    key: str = "pgd-20"
    steps: int = setting(default=20, at_least=1)
    step_size: float | None = setting(default=None, above=0)
    restarts: int = setting(default=1, at_least=1)
    objective: Objective = CrossEntropyObjective()
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    images: int | None = setting(default=None, at_least=1)

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        attack = PGD(
            steps=self.steps, step_size=self.step_size, objective=self.objective, start=self.start, mode="eval"
        )
        predict, threat = subject.predict, subject.threat
        seed = derive(seed, self.key, part.number)
        right = is_right(subject.logits(part.x), part.y)
        for restart in range(self.restarts):
            left = right.nonzero().squeeze(1)
            if len(left) == 0:
                break
            images, labels = part.x[left], part.y[left]
            budget = Budget(epsilon=images.new_full((len(left),), threat.epsilon))
            x_adv = attack(predict, images, labels, budget, threat, whole(images, seed, restart))
            right[left] = is_right(subject.logits(x_adv), labels)
        yield Outcomes(right)

    def passes(self, norm: str, classes: int) -> Passes:
        attacks = self.steps * (1 + RESISTING * (self.restarts - 1))
        return Passes(forward=round(1 + attacks + self.restarts), input_backward=round(attacks))


PGD_10 = Attacked(key="pgd-10", steps=10)
PGD_20 = Attacked()
PGD_40 = Attacked(key="pgd-40", steps=40)
PGD_50 = Attacked(key="pgd-50", steps=50)
PGD_50_10 = Attacked(key="pgd-50-10", steps=50, restarts=10)
CW = Attacked(key="cw", objective=Margin())
"""PGD-20 on the margin (Carlini and Wagner 2017, in the ball of the threat model)."""
CW_40 = Attacked(key="cw-40", objective=Margin(), steps=40, step_size=0.01)
"""The same with the settings of the evaluation in HAT's code."""
