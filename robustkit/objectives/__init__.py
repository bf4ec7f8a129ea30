"""What does an attack climb?

An objective maps the model's output on the current images to one value per image (B,), to be maximised. Some compare
with a `Reference`: the output on the natural image, which the attack forwards once before its first step.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Objective, Reference
from robustkit.objectives.confident_wrong import ConfidentWrong
from robustkit.objectives.cross_entropy import CrossEntropyObjective
from robustkit.objectives.inverse import InverseObjective
from robustkit.objectives.kl import KL
from robustkit.objectives.margin import Margin

registry = _registry("objective")

__all__ = [
    "KL",
    "ConfidentWrong",
    "CrossEntropyObjective",
    "InverseObjective",
    "Margin",
    "Objective",
    "Reference",
    "registry",
]
