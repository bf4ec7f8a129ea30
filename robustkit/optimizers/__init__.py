"""How do parameters move?"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Optimizer
from robustkit.optimizers.sgd import SGD

registry = _registry("optimizer")

__all__ = ["SGD", "Optimizer", "registry"]
