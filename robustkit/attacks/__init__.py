"""How do we get there?

An attack turns images x (B, C, H, W) into adversarial ones, given `predict` (the engine's forward), labels, a budget
(radius, perhaps step size and number of steps, for each image), a threat model and a generator. It is stateless, so
the same value serves training, evaluation and other attacks. `climb` is the loop that all iterative attacks share.
"""

from robustkit.attacks.adam_pgd import AdamPGD
from robustkit.attacks.calibrated import Calibrated
from robustkit.attacks.climb import climb
from robustkit.attacks.climb_while import climb_while
from robustkit.attacks.dynamic import Dynamic
from robustkit.attacks.friendly import Friendly
from robustkit.attacks.grouped import Grouped
from robustkit.attacks.ldat import LDAT
from robustkit.attacks.mi_fgsm import MIFGSM
from robustkit.attacks.pgd import PGD
from robustkit.attacks.rs_fgsm import RSFGSM
from robustkit.attacks.within import Within
from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Attack

registry = _registry("attack")

__all__ = [
    "LDAT",
    "MIFGSM",
    "PGD",
    "RSFGSM",
    "AdamPGD",
    "Attack",
    "Calibrated",
    "Dynamic",
    "Friendly",
    "Grouped",
    "Within",
    "climb",
    "climb_while",
    "registry",
]
