"""How robust is the finished model?

A measure says of each test image whether the model still gets it right: as it is (`Clean`), under an attack of ours
(`Attacked`), of foolbox (`MinimumNorm`) or made on another network (`Transfer`), or under the official AutoAttack
(`AutoAttack`, the verdict). `evaluate` takes measures through a test set, for any torch module. Outcomes depend on the
model, the images and the seed, never on how many processes shared the work, or how often it was killed. The contract is
`robustkit.core.strategy.Measure`.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Measure, Outcomes, Slice, Subject
from robustkit.evaluation.attacked import CW, CW_40, PGD_10, PGD_20, PGD_40, PGD_50, PGD_50_10, Attacked
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.detection import Detection
from robustkit.evaluation.evaluate import evaluate, fixed_part
from robustkit.evaluation.findings import Finding
from robustkit.evaluation.minimum_norm import CARLINI_WAGNER, DDN, DEEPFOOL, MinimumNorm
from robustkit.evaluation.results import Result, Results, wilson
from robustkit.evaluation.suites import DETECTION, ECAS, LDAT, LDAT_L2, QUICK, STANDARD, SUITES, UIAT, ldat_transfer
from robustkit.evaluation.transfer import Transfer

registry = _registry("measure")

__all__ = [
    "CARLINI_WAGNER",
    "CW",
    "CW_40",
    "DDN",
    "DEEPFOOL",
    "DETECTION",
    "ECAS",
    "LDAT",
    "LDAT_L2",
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
    "Detection",
    "Finding",
    "Measure",
    "MinimumNorm",
    "Outcomes",
    "Result",
    "Results",
    "Slice",
    "Subject",
    "Transfer",
    "evaluate",
    "fixed_part",
    "ldat_transfer",
    "registry",
    "wilson",
]
