"""Where may an image go?

A threat model is a ball around each image, intersected with the box [0, 1]. Its radius `epsilon` is in pixels of
[0, 1] (8/255 is the usual L-inf radius on CIFAR-10). Training may attack with other radii, image by image: those come
from the epsilon schedule, and reach the threat model as a tensor (B,). The contract is `robustkit.core.strategy.
ThreatModel`: `random`, `project` (ball first, box last; L1: both at once), `ascend` (the steepest unit step; L1: a
sparse one) and `size` (the norm).
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import ThreatModel
from robustkit.threats.l1 import L1
from robustkit.threats.l2 import L2
from robustkit.threats.linf import Linf

registry = _registry("threat")

__all__ = ["L1", "L2", "Linf", "ThreatModel", "registry"]
