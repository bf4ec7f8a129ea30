"""How do features become logits?

A head is built for a feature width D and a class count K, and maps features (B, D), and labels where a margin is
wanted, to an `Output`: logits for everything, margined logits for the classification loss, and a penalty of its own.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Head
from robustkit.heads.gaussian_mixture import GaussianMixture
from robustkit.heads.linear import Linear

registry = _registry("head")

__all__ = ["GaussianMixture", "Head", "Linear", "registry"]
