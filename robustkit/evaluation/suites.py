"""Suites by name: what is commonly reported together. A recipe takes them as they are, or composes its own."""

from __future__ import annotations

from collections.abc import Sequence

from robustkit.core.errors import UserError
from robustkit.core.recipe import Suite, result_key
from robustkit.core.registry import hint
from robustkit.core.spec import evolve
from robustkit.core.strategy import Measure
from robustkit.evaluation.attacked import CW, CW_40, PGD_10, PGD_20, PGD_40, PGD_50, PGD_50_10
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean

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
LDAT = Suite(measures=(Clean(), PGD_40, APGD_DLR, FAB, AutoAttack()))
"""The L-infinity columns of the LDAT paper (CMC 2024) but for DeepFool, and AutoAttack, which it does not report."""

SUITES = {"quick": QUICK, "standard": STANDARD, "uiat": UIAT, "ecas": ECAS, "ldat": LDAT}


def suite_of(wanted: str | Suite | Sequence[Measure]) -> Suite:
    """A suite by its name, as it is, or made of measures.

    Raises:
        UserError: there is no suite of that name.
    """
    if isinstance(wanted, Suite):
        return wanted
    if isinstance(wanted, str):
        if wanted not in SUITES:
            raise UserError(f"there is no suite '{wanted}'", place="suite", remedy=hint(wanted, SUITES))
        return SUITES[wanted]
    return Suite(measures=tuple(wanted))


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
