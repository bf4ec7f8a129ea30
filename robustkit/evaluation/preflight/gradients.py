"""Checks of what attacks rely on: a gradient that leads uphill, and a ball that holds."""

from __future__ import annotations

import torch.nn.functional as F

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget
from robustkit.core.rng import whole
from robustkit.evaluation.findings import Finding, finding
from robustkit.evaluation.preflight.case import Case, few, slope
from robustkit.functional import margin, per_image

STUCK = 0.25
"""Share of images without a gradient from which it is worth a word."""


def gradient(case: Case) -> Finding:
    """A finite gradient that is not zero reaches the images."""
    x, y, logits = few(case.x), few(case.y), case.subject.logits
    found = slope(lambda images: margin(logits(images), y), x)
    entropy = slope(lambda images: F.cross_entropy(logits(images), y, reduction="none"), x)
    remedy = "attacks follow this gradient: look for rounding, detach(), no_grad() or an argmax inside the model"
    if found is None or entropy is None:
        return finding("gradient", "failure", "no gradient reaches the images", remedy)
    n, broken = len(x), int((~found.isfinite()).flatten(1).any(dim=1).sum())
    zero, flat = (int((~each.flatten(1).any(dim=1)).sum()) for each in (found, entropy))
    data = {"n": n, "broken": broken, "zero": zero, "flat": flat}
    if broken:
        text = f"the gradient is NaN or infinite on {broken} of {n} images"
        remedy = "look for sqrt, log, norm or a division at 0 inside the model"
        return finding("gradient", "failure", text, remedy, **data)
    if zero == n and not case.trained:  # a head that starts at zero passes nothing on: ask below it
        below = slope(lambda images: case.subject.predict(images).features.sum(dim=1), x)
        if below is not None and bool(below.any()):
            return finding("gradient", "ok", "the head passes no gradient on yet, the features do", **data)
    if zero >= STUCK * n:
        text = f"the gradient is zero on {'all' if zero == n else f'{zero} of'} {n} images"
        return finding("gradient", "failure" if zero == n else "warning", text, remedy, **data)
    if flat >= STUCK * n:
        text = f"cross-entropy is saturated: its gradient is zero on {flat} of {n} images, the margin's is not"
        remedy = "PGD on cross-entropy stands still there: judge by CW and AutoAttack"
        return finding("gradient", "warning", text, remedy, **data)
    size = float(found.flatten(1).norm(dim=1).median())
    return finding("gradient", "ok", f"it reaches {n - zero} of {n} images, median length {size:.2g}", **data)


def one_step(case: Case) -> Finding:
    """A step up the gradient, a quarter of epsilon long, makes the true class less likely."""
    x, y, logits, threat = few(case.x), few(case.y), case.subject.logits, case.subject.threat
    uphill = slope(lambda images: margin(logits(images), y), x)
    if uphill is None or not bool(uphill.any()):
        return finding("one step", "skipped", "there is no gradient to follow")
    radius = x.new_full((len(x),), threat.epsilon)
    moved = threat.project(x + threat.ascend(uphill) * per_image(radius / 4, x), x, radius)
    size = float(threat.size(moved - x).max())
    rises = margin(logits(moved), y) - margin(logits(x), y)
    rise, higher, n = float(rises.mean()), int((rises > 0).sum()), len(x)
    data = {"rise": rise, "higher": higher, "n": n, "size": size}
    if size > threat.epsilon * (1 + 1e-4) + 1e-6:
        text = f"a projected step is {size:.4g} long, epsilon is {threat.epsilon:.4g}"
        remedy = f"{type(threat).__name__}.project must bring images into the ball"
        return finding("one step", "failure", text, remedy, **data)
    wrong = rise <= 0 or higher < n / 2
    if not case.trained:  # deep nets with fresh batch statistics hardly respond
        wrong &= abs(rise) > 1e-5 * max(1.0, float(case.logits.abs().max()))
    text = f"a step of epsilon / 4 raises the loss on {higher} of {n} images, by {rise:.2g} on average"
    remedy = "the gradient does not tell where the loss grows: accuracy under attack will be too high"
    return finding("one step", "warning" if wrong else "ok", text, remedy, **data)


def radius_zero(case: Case) -> Finding:
    """An attack that may not move changes nothing."""
    x, y, threat = few(case.x), few(case.y), case.subject.threat
    x_adv = PGD(steps=2)(case.subject.predict, x, y, Budget(x.new_zeros(len(x))), threat, whole(x, 0, "preflight"))
    moved = float((x_adv - x).abs().max())
    text = f"an attack of radius 0 moves pixels by up to {moved:.2g}"
    remedy = f"{type(threat).__name__} must keep images within epsilon, and in [0, 1]"
    return finding("radius 0", "failure" if moved > 1e-5 else "ok", text, remedy, moved=moved)
