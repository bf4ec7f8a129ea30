"""Contract checks for strategies, built-in or your own: an AssertionError says what is wrong; what to do.

    from robustkit.testing import check

    def test_contract() -> None:
        check(MyAttack(step=1.25))

A check takes a second or two on the CPU: two convolutions with batch normalisation, six images, a real `Scene`.
`check` asks for what every strategy of the kind must do (see `core.strategy`), and that nothing in it would hold up a
GPU, which takes none to see; that yours does what its paper says is for your own tests. `tiny_recipe(attack=Mine())`
composes it into a recipe that trains in a second or two, and `check_steps(recipe, "my recipe")` looks at a whole
recipe's steps for what would hold up a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustkit.testing.attack import check_attack
from robustkit.testing.average import check_average
from robustkit.testing.device import check_device, check_steps
from robustkit.testing.epsilon import check_epsilon
from robustkit.testing.head import check_head
from robustkit.testing.loss import check_loss
from robustkit.testing.objective import check_objective
from robustkit.testing.optimizer import check_optimizer
from robustkit.testing.schedule import check_schedule
from robustkit.testing.spec import PROTOCOLS, check_spec, kind_of
from robustkit.testing.target import check_target
from robustkit.testing.threat import check_threat
from robustkit.testing.tiny import tiny_recipe
from robustkit.testing.weights import check_weights

__all__ = ["PROTOCOLS", "check", "check_steps", "kind_of", "tiny_recipe"]

CHECKS: dict[str, Callable[[Any], None]] = {
    "threat": check_threat,
    "epsilon": check_epsilon,
    "attack": check_attack,
    "objective": check_objective,
    "target": check_target,
    "head": check_head,
    "loss": check_loss,
    "weights": check_weights,
    "average": check_average,
    "optimizer": check_optimizer,
    "schedule": check_schedule,
}
"""Kind -> its check. Data sets and measures have none: what they need is not to be had everywhere."""


def check(strategy: Any) -> None:
    """Everything that strategies of its kind must do.

    Raises:
        AssertionError: it does not; the sentence says what.
    """
    CHECKS.get(kind_of(strategy), check_spec)(strategy)
    check_device(strategy)
