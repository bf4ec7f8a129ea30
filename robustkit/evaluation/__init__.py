"""How robust is the finished model?

A measure says of each test image whether the model still gets it right: as it is (`Clean`), under an attack of ours
(`Attacked`), or under the official AutoAttack (`AutoAttack`, the verdict). `measure_model` takes a measure through the
test set, and `evaluate` does so for any torch module, without a recipe. Outcomes depend on the model, the images and
the seed, never on how many processes shared the work. The contract is `robustkit.core.strategy.Measure`.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Measure, Outcomes
from robustkit.evaluation.attacked import CW, CW_40, PGD_10, PGD_20, PGD_50_10, Attacked
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.evaluate import STANDARD, Result, evaluate, fixed_part, measure_model, wilson
from robustkit.evaluation.logits import LogitsOf

registry = _registry("measure")

__all__ = [
    "CW",
    "CW_40",
    "PGD_10",
    "PGD_20",
    "PGD_50_10",
    "STANDARD",
    "Attacked",
    "AutoAttack",
    "Clean",
    "LogitsOf",
    "Measure",
    "Outcomes",
    "Result",
    "evaluate",
    "fixed_part",
    "measure_model",
    "registry",
    "wilson",
]
