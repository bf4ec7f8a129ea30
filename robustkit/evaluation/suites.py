"""Suites by name: what is commonly reported together. A recipe takes them as they are, or composes its own."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.attacks.mi_fgsm import MIFGSM
from robustkit.attacks.pgd import PGD
from robustkit.attacks.rs_fgsm import RSFGSM
from robustkit.core.errors import UserError
from robustkit.core.recipe import Suite, result_key
from robustkit.core.registry import hint
from robustkit.core.spec import evolve
from robustkit.core.strategy import Attack, Measure
from robustkit.evaluation.attacked import CW, CW_40, PGD_10, PGD_20, PGD_40, PGD_50, PGD_50_10
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.detection import Detection
from robustkit.evaluation.minimum_norm import CARLINI_WAGNER, DDN, DEEPFOOL
from robustkit.evaluation.transfer import Transfer
from robustkit.helper import Helper, Untrained
from robustkit.threats.l2 import L2
from robustkit.threats.linf import Linf

APGD_DLR = AutoAttack(key="apgd-dlr", attacks=("apgd-dlr",))
"""APGD on the DLR loss, by AutoAttack's authors' code: 100 steps, one start."""
FAB = AutoAttack(key="fab", attacks=("fab",))
"""FAB, untargeted, by AutoAttack's authors' code: 100 steps, one start."""

QUICK = Suite(images=1000, measures=(Clean(), PGD_20, CW, AutoAttack(images=256)))
"""Minutes rather than hours, with the intervals of 1,000 images, and of 256 for AutoAttack."""
STANDARD = Suite(measures=(Clean(), PGD_20, CW, AutoAttack()))
"""What is measured where nothing else is asked for, on all test images."""
UIAT = Suite(measures=(Clean(), PGD_20, CW, CW_40, PGD_50_10, AutoAttack()))
"""The columns of Dong et al. (CVPR 2023), with both readings of its CW, and PGD-50-10 of the single-step methods."""
ECAS = Suite(measures=(Clean(), PGD_10, PGD_20, PGD_50, CW, AutoAttack()))
"""The columns of the ECAS paper (BMVC 2023)."""
LDAT = Suite(measures=(Clean(), PGD_40, APGD_DLR, FAB, DEEPFOOL, AutoAttack()))
"""The L-infinity columns of the LDAT paper (CMC 2024), and AutoAttack, which it does not report."""
LDAT_L2 = Suite(
    name="l2",
    threat=L2(epsilon=0.5),
    measures=(PGD_40, APGD_DLR, FAB, CARLINI_WAGNER, DEEPFOOL, DDN, AutoAttack()),
)
"""Its L2 columns, DDN, which it announces and does not report, and AutoAttack."""

DETECTION = Suite(measures=(Clean(), Detection()))
"""What a reject option is worth: threshold from held-out images, under PGD-40 and under an attack that knows it."""

SUITES: dict[str, tuple[Suite, ...]] = {
    "quick": (QUICK,),
    "standard": (STANDARD,),
    "uiat": (UIAT,),
    "ecas": (ECAS,),
    "ldat": (LDAT, LDAT_L2),
    "detection": (DETECTION,),
}


def ldat_transfer(undefended: Helper | Untrained, defended: Helper | Untrained) -> tuple[Suite, Suite]:
    """The columns of Tables 4 and 5 of the LDAT paper: examples made on another network, L-infinity 8/255.

    `undefended` is a naturally trained network, `defended` one of the judged architecture under PGD-AT. The footnotes
    of the paper's tables name them the other way round; its text and its numbers do not.
    """
    attacks: dict[str, Attack] = {
        "transfer-fgsm": RSFGSM(noise=0.0, step=1.0, mode="eval"),
        "transfer-mi-fgsm": MIFGSM(steps=10, decay=1.0),
        "transfer-pgd-40": PGD(steps=40, step_size=2 / 255),
    }

    def suite(name: str, surrogate: Helper | Untrained) -> Suite:
        made = tuple(Transfer(key=key, surrogate=surrogate, attack=attack) for key, attack in attacks.items())
        return Suite(name=name, threat=Linf(epsilon=8 / 255), measures=made)

    return suite("undefended", undefended), suite("defended", defended)


def suites_of(wanted: str | Suite | Sequence[Measure] | Sequence[Suite]) -> tuple[Suite, ...]:
    """Suites by their name, as they are, or one made of measures.

    Raises:
        UserError: there is no suite of that name.
    """
    if isinstance(wanted, Suite):
        return (wanted,)
    if isinstance(wanted, str):
        if wanted not in SUITES:
            raise UserError(f"there is no suite '{wanted}'", place="suite", remedy=hint(wanted, SUITES))
        return SUITES[wanted]
    parts = tuple(wanted)
    suites = tuple(part for part in parts if isinstance(part, Suite))
    if suites and len(suites) == len(parts):
        return suites
    return (Suite(measures=parts),)  # type: ignore[arg-type]  # it refuses what is no measure


def some_of(suites: Sequence[Suite], keys: Sequence[str] | None, limit: int | None) -> tuple[Suite, ...]:
    """The suites with only those measures (None: all), on at most so many test images.

    Raises:
        UserError: none of them has such a measure.
    """
    known = [result_key(suite, measure) for suite in suites for measure in suite.measures]
    for key in keys or ():
        if key not in known:
            raise UserError(f"there is no measure '{key}'", place="--measures", remedy=hint(key, known))
    chosen = []
    for suite in suites:
        measures = tuple(m for m in suite.measures if keys is None or result_key(suite, m) in keys)
        images = suite.images if limit is None else min(limit, suite.images or limit)
        chosen.append(evolve(suite, measures=measures, images=images))
    return tuple(chosen)
