"""How hard, for each image?

Once per step an epsilon schedule looks at the scene and returns one `Budget`: a radius for each image (B,), and
optionally a step size, a number of steps and a weight. A constant radius, a cycle over epochs, and a radius chosen
by each image's own entropy are all the same to the rest of the step.
"""

from robustkit.core.batch import Budget
from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import EpsilonSchedule
from robustkit.epsilons.curriculum import Curriculum
from robustkit.epsilons.cyclic import Cyclic, CyclicBatch
from robustkit.epsilons.ecas import ECAS
from robustkit.epsilons.fixed import Fixed
from robustkit.epsilons.linear import Linear

registry = _registry("epsilon")

__all__ = ["ECAS", "Budget", "Curriculum", "Cyclic", "CyclicBatch", "EpsilonSchedule", "Fixed", "Linear", "registry"]
