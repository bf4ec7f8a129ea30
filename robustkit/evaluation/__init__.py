"""How robust is the finished model?

A measure says of each test image whether the model still gets it right: as it is (`Clean`), under an attack of ours
(`Attacked`), or under the official AutoAttack (`AutoAttack`, the verdict). `evaluate` takes measures through a test
set, for any torch module. Outcomes depend on the model, the images and the seed, never on how many processes shared the
work, or how often it was killed. The contract is `robustkit.core.strategy.Measure`.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Measure, Outcomes, Slice, Subject
from robustkit.evaluation.attacked import CW, CW_40, PGD_10, PGD_20, PGD_40, PGD_50, PGD_50_10, Attacked
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.evaluate import evaluate, fixed_part
from robustkit.evaluation.findings import Finding
from robustkit.evaluation.results import Result, Results, wilson
from robustkit.evaluation.suites import ECAS, LDAT, QUICK, STANDARD, SUITES, UIAT

registry = _registry("measure")

__all__ = [
    "CW",
    "CW_40",
    "ECAS",
    "LDAT",
    "PGD_10",
    "PGD_20",
    "PGD_40",
    "PGD_50",
    "PGD_50_10",
    "QUICK",
    "STANDARD",
    "SUITES",
    "UIAT",
    "Attacked",
    "AutoAttack",
    "Clean",
    "Finding",
    "Measure",
    "Outcomes",
    "Result",
    "Results",
    "Slice",
    "Subject",
    "evaluate",
    "fixed_part",
    "registry",
    "wilson",
]
