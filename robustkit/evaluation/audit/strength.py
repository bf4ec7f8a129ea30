"""Checks that the attack behaves as attacks do: more effort and more room break more (Carlini et al. 2019)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import functional
from robustkit.attacks.climb import climb
from robustkit.evaluation.audit.case import GAP, GAP_FRAUD, STEPS, Case, grade, percent
from robustkit.evaluation.findings import Finding, finding
from robustkit.threats.linf import Linf

STEP_COUNTS = (1, 5, 10, STEPS, 50)
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
"""In units of epsilon."""
UNBOUNDED_STEPS = 100
RESTARTS = 5
DRAWS = 20
RIVAL = 0.8
"""Noise that breaks so many of the images that PGD breaks rivals it, where PGD breaks less than half of all; on images
of 8 x 8 pixels noise reaches half of an honest model's, on larger ones much less."""


def steps(case: Case) -> Finding:
    """Does accuracy fall with the number of steps? One step that beats many is a sign of masking (Athalye et al.)"""
    broken = [
        case.by_pgd if count == STEPS else case.broken(case.attack(case.cross_entropy, "pgd", steps=count))
        for count in STEP_COUNTS
    ]
    lost = max(int(few.sum()) - int(more.sum()) for few, more in pairwise(broken))
    late = int((broken[-1] & ~case.by_pgd).sum())
    verdict, remedy = grade(max(lost, 0), len(case)), "more steps break less: see the gradient checks, attack by scores"
    if verdict == "ok" and grade(late, len(case)) != "ok":
        verdict, remedy = "warning", f"PGD-{STEPS} has not converged: report {STEP_COUNTS[-1]} steps or more"
    curve = [case.accuracy(found) for found in broken]
    return finding(
        "steps",
        verdict,
        f"accuracy {_listed(curve)} after {', '.join(map(str, STEP_COUNTS))} steps; {STEP_COUNTS[-1]} break {late} of "
        f"{len(case)} images that {STEPS} do not",
        remedy,
        images=len(case),
        steps=list(STEP_COUNTS),
        accuracy=curve,
        lost=lost,
        late=late,
    )


def epsilon(case: Case) -> Finding:
    """Does accuracy fall with the radius? (Carlini et al. 2019)"""
    radii = [share * case.threat.epsilon for share in RADII]
    broken = []
    for share, radius in zip(RADII, radii, strict=True):
        images = case.pgd if share == 1 else case.attack(case.cross_entropy, "pgd", epsilon=radius)
        broken.append(case.broken(images, radius))
    lost = max(int(small.sum()) - int(large.sum()) for small, large in pairwise(broken))
    curve = [len(case) / case.total, *(case.accuracy(found) for found in broken)]
    return finding(
        "epsilon",
        grade(max(lost, 0), len(case)),
        f"accuracy {_listed(curve)} at 0, {', '.join(f'{share:g}' for share in RADII)} epsilon",
        "a larger ball holds the smaller one, so it is the attack that fails: tune it",
        images=len(case),
        epsilon=[0.0, *radii],
        accuracy=curve,
        lost=lost,
    )


def unbounded(case: Case) -> Finding:
    """Does an attack that may do anything reach 0 %? It starts at the image: the gradient has to do the work.

    Whatever the norm, every pixel moves at once: sparse steps (L1) would stall where pixels are at 0 or 1.
    """
    one = case.x.new_ones(len(case))
    size = 2.5 / UNBOUNDED_STEPS * one
    images = climb(
        case.cross_entropy, case.x, case.x, threat=Linf(), epsilon=one, step_size=size, steps=UNBOUNDED_STEPS
    )
    radius = float(case.threat.size(torch.ones_like(case.x[:1])))  # of the whole box
    left = len(case) - int(case.broken(images, radius).sum())
    return finding(
        "unbounded",
        grade(left, len(case)),
        f"{left} of {len(case)} images survive {UNBOUNDED_STEPS} steps anywhere in [0, 1] (epsilon {radius:g})",
        "any image can be made any other, so the gradient is hidden: see the gradient checks",
        images=len(case),
        epsilon=radius,
        left=left,
    )


def restarts(case: Case) -> Finding:
    """Do random restarts bring much? Then the landscape is rough, and one start is not enough (Mosbach et al. 2018)"""
    broken = case.by_pgd
    for restart in range(1, RESTARTS):
        broken = broken | case.broken(case.attack(case.cross_entropy, restart))
    extra = int((broken & ~case.by_pgd).sum())
    return finding(
        "restarts",
        "warning" if grade(extra, len(case), GAP) != "ok" else "ok",
        f"{RESTARTS} random starts break {extra} of {len(case)} images more than one",
        "report an attack with restarts; AutoAttack has them",
        images=len(case),
        restarts=RESTARTS,
        extra=extra,
    )


def noise(case: Case) -> Finding:
    """Is random noise nearly as strong as the attack? Then the attack's gradient is worth little."""
    generator = case.generator(None, "noise")
    broken = torch.zeros_like(case.by_pgd)
    for _ in range(DRAWS):
        way = case.threat.ascend(generator.normal(case.x)) * case.threat.epsilon
        broken |= case.broken((case.x + way).clamp(0, 1))
    by_noise, by_pgd, n = int(broken.sum()), int(case.by_pgd.sum()), len(case)
    extra = int((broken & ~case.by_gradients).sum())
    verdict = grade(extra, n)
    if verdict == "ok" and grade(by_noise, n) != "ok" and by_noise >= RIVAL * by_pgd and by_pgd < n / 2:
        verdict = "warning"
    return finding(
        "noise",
        verdict,
        f"noise of size epsilon breaks {by_noise} of {n} images in {DRAWS} draws, PGD-{STEPS} {by_pgd}; {extra} are "
        "broken by noise and by no gradient",
        "an attack that noise rivals follows no gradient: see the gradient checks",
        images=n,
        draws=DRAWS,
        noise=by_noise,
        pgd=by_pgd,
        extra=extra,
    )


def losses(case: Case) -> Finding:
    """Do other losses break what cross-entropy cannot? (Carlini and Wagner 2017; Croce and Hein 2020)

    The margin, cross-entropy on logits divided by their scale, and DLR, which has no scale (for 3 classes or more).
    """
    with torch.no_grad():
        scale = case.margin(case.x).abs().median().clamp_min(1e-12)

    def scaled(images: Tensor) -> Tensor:
        return F.cross_entropy(case.logits(images) / scale, case.y[: len(images)], reduction="none")

    def dlr(images: Tensor) -> Tensor:
        logits = case.logits(images)
        top = logits.sort(dim=1, descending=True).values
        return functional.margin(logits, case.y[: len(images)]) / (top[:, 0] - top[:, 2] + 1e-12)

    broken = {"cross-entropy": case.by_pgd, "the margin": case.by_margin}
    broken["scaled cross-entropy"] = case.broken(case.attack(scaled, "pgd"))
    if case.logits(case.x[:1]).shape[1] > 2:
        broken["DLR"] = case.broken(case.attack(dlr, "pgd"))
    extra = {name: int((found & ~case.by_pgd).sum()) for name, found in broken.items() if name != "cross-entropy"}
    most = max(extra.values())
    accuracy = {name: case.accuracy(found) for name, found in broken.items()}
    return finding(
        "losses",
        grade(most, len(case), GAP, GAP_FRAUD),
        f"accuracy {', '.join(f'{percent(share)} on {name}' for name, share in accuracy.items())}; another loss breaks "
        f"up to {most} of {len(case)} images that cross-entropy cannot",
        "report AutoAttack, or PGD on the margin: cross-entropy misses images here",
        images=len(case),
        accuracy=accuracy,
        extra=extra,
        scale=float(scale),
    )


def _listed(curve: list[float]) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in curve) + " %"
