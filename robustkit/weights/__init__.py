"""Where are the weights when we step, and which are kept?

A weight perturbation displaces the weights around the pure pass and the optimiser's step, and takes its displacement
back afterwards. A weight average says how much of the old average survives each step; validation and both
checkpoints then use the average.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import WeightAverage, WeightPerturbation
from robustkit.weights.awp import AWP
from robustkit.weights.exponential import Exponential
from robustkit.weights.still import Still

registry = _registry("weights")
averages = _registry("average")

__all__ = ["AWP", "Exponential", "Still", "WeightAverage", "WeightPerturbation", "averages", "registry"]
