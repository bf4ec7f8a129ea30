"""What the detection score, the largest posterior, says of test images as they are and as attacks made them.

The sets of LDAT, section 4.4: natural, PGD, C&W, FAB; and, since a detector is worth what an attack leaves of it that
knows of it, those of `Detection`'s adaptive attack. FAB and C&W look for the nearest misclassified image; what they
could not break within the radius stays in their set as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from robustkit.core.errors import LibraryError
from robustkit.core.strategy import Outcomes, Slice, Subject
from robustkit.detection import score, shares
from robustkit.evaluation import CARLINI_WAGNER, AutoAttack, Detection, MinimumNorm
from robustkit.evaluation.logits import is_right
from robustkit.evaluation.suites import FAB
from robustkit.reporting.paper.finished import FinishedRun
from robustkit.threats.l2 import L2

THRESHOLD = 0.6
"""The paper's."""
BINS = 50
"""Of equal width, from 1 / K to 1."""
SETS = {"natural": "natural", "attack": "PGD-40", "cw": "C&W", "fab": "FAB", "adaptive": "adaptive PGD-40"}
"""By their stage, in the order in which they are shown."""


@attrs.frozen
class Scores:
    """Histograms of the score of what `made_by` makes of the images, and what the threshold does with them.

    The shares of a stage are those of `robustkit.detection.shares`; of "<stage>, right" and "<stage>, wrong" they are
    the images in each bin that are classified so.
    """

    made_by: Detection | MinimumNorm | AutoAttack
    threshold: float = THRESHOLD
    bins: int = BINS

    @property
    def key(self) -> str:
        return f"scores-{self.made_by.key}"

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        found: dict[str, dict[str, float]] = {}
        right = torch.zeros_like(part.y, dtype=torch.bool)
        for stage, images in self.made_by.examples(subject, part, seed):
            logits = subject.logits(images)
            right, scores = is_right(logits, part.y), score(logits)
            at = _bins(scores, logits.shape[1], self.bins)
            found[stage] = shares(right, scores >= self.threshold)
            for side, members in (("right", right), ("wrong", ~right)):
                counts = at[members].bincount(minlength=self.bins).tolist()
                found[f"{stage}, {side}"] = {str(number): count / len(right) for number, count in enumerate(counts)}
        yield Outcomes(right, shares=found)


def _bins(scores: Tensor, classes: int, bins: int) -> Tensor:
    """(B,) the bin of each score; one that is no number is in the first."""
    low = 1 / classes
    places = ((scores.cpu().double().nan_to_num(low) - low) / (1 - low) * bins).floor()
    return places.clamp(0, bins - 1).long().to(scores.device)


def scored(run: FinishedRun) -> tuple[list[dict[str, Any]], list[str]]:
    """The sets that can be had of a run, in the order of `SETS`, and what cannot, and why.

    Of each set its ball, the number of images, how many became what (`fates`), and how many of those that are
    classified "right" and "wrong" lie in each bin.
    """
    own = run.recipe.threat
    makers = ((Detection(threshold=THRESHOLD), own), (CARLINI_WAGNER, run.ball(L2(epsilon=0.5))), (FAB, own))
    found: dict[str, dict[str, Any]] = {}
    missing = []
    for maker, ball in makers:
        try:
            judged = run.judged(Scores(maker), ball)
        except LibraryError as error:
            missing.append(f"without {SETS[maker.key]}: {error}")
            continue
        n = len(judged.right)
        for stage in SETS.keys() & judged.shares.keys():
            found[stage] = {"norm": ball.norm, "epsilon": ball.epsilon, "n": n}
            found[stage]["fates"] = {name: round(share * n) for name, share in judged.shares[stage].items()}
            for side in ("right", "wrong"):
                bins = judged.shares[f"{stage}, {side}"]
                found[stage][side] = [round(bins[str(number)] * n) for number in range(BINS)]
    return [{"set": stage} | found[stage] for stage in SETS if stage in found], missing
