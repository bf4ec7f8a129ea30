"""Checks of how the model behaves as a function: the same answer twice, and for an image alone or in company."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.engine.folding import close
from robustkit.evaluation.audit.case import VOTES, Case, grade, percent
from robustkit.evaluation.findings import Finding, finding

GRADIENTS = 10
"""Forwards over which the attack on a randomised model averages; AutoAttack's "rand" takes 20."""
BATCH = 8
"""Images of a batch, each of which is forwarded alone, too."""


def determinism(case: Case) -> Finding:
    """Is the model randomised, and if so, does an attack on its expectation do better? (Athalye et al. 2018, EOT)"""
    if not case.randomised:
        return finding("determinism", "ok", "two forwards of the same images give equal logits")

    def value(images: Tensor) -> Tensor:
        return torch.stack([case.cross_entropy(images) for _ in range(GRADIENTS)]).mean(dim=0)

    extra = int((case.broken(case.attack(value, "pgd")) & ~case.by_pgd).sum())
    with torch.no_grad():
        right = torch.stack([case.subject.logits(case.x).argmax(dim=1) == case.y for _ in range(VOTES)]).float()
    accuracy = float(right.mean())
    return finding(
        "determinism",
        "failure" if grade(extra, len(case)) == "failure" else "warning",
        f"the model is randomised (right in {percent(accuracy)} of {VOTES} forwards of images that it mostly gets "
        f"right); gradients averaged over {GRADIENTS} forwards break {extra} of {len(case)} images that PGD cannot",
        'attack the expectation (EOT): report AutoAttack(version="rand"), and accuracy over many forwards',
        images=len(case),
        forwards=VOTES,
        accuracy=accuracy,
        extra=extra,
    )


@torch.no_grad()
def independence(case: Case) -> Finding:
    """Does an image get the same logits alone as in a batch? Batch statistics at test time make others matter."""
    came = ""
    if case.came_training:
        came = (
            f"; it came in training mode, where {_modal(case.subject.logits)} layers differ, and is judged in eval mode"
        )
    if case.randomised:
        return finding("batch independence", "skipped", f"the model is randomised{came}")
    few = case.x[:BATCH]
    together = case.subject.logits(few)
    alone = torch.cat([case.subject.logits(image[None]) for image in few])
    worst = float((alone - together).abs().max())
    return finding(
        "batch independence",
        "ok" if close(alone, together) else "failure",
        f"logits alone and in a batch differ by {worst:.2g}{came}",
        "judge it with fixed statistics (model.eval(), track_running_stats=True)",
        images=len(few),
        difference=worst,
        came_training=case.came_training,
    )


def _modal(model: nn.Module) -> int:
    """Layers that are another function in training mode."""
    modal = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return sum(isinstance(module, modal) for module in model.modules())
