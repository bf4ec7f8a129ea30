"""What should the prediction match?

A target distribution gives each image a row of probabilities (B, K), float32. It names the images to forward for it
(`prepare`, exactly once per step: there it may also advance a state such as universal perturbations), turns the
output on them into probabilities, and may remember what was used (`observe`). Targets wrap targets:
`Momentum(inner=Universal())`.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import TargetDistribution
from robustkit.targets.inverse import Inverse
from robustkit.targets.momentum import Momentum
from robustkit.targets.natural import Natural
from robustkit.targets.one_off import OneOff
from robustkit.targets.universal import Universal

registry = _registry("target")

__all__ = ["Inverse", "Momentum", "Natural", "OneOff", "TargetDistribution", "Universal", "registry"]
