"""Checks of the gradient itself: is it there, is it the function's, does it lead anywhere?"""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit import functional
from robustkit.core.device import widest
from robustkit.evaluation.audit.case import FRAUD, VOTES, Case, Value, at_least, connected, grade, percent
from robustkit.evaluation.findings import Finding, Verdict, finding
from robustkit.functional import per_image

PROBED = 16
"""Images whose gradient is held against finite differences; 4 prove more than `FRAUD` of them wrong."""
USEFUL = 0.8
"""A gradient that is not the function's, but raises the loss for so many images, is a substitute that attacks can use.
"""
DIRECTIONS = 8
"""Random directions that the attack's is compared with."""
STEP = 1e-3
"""L2 length of a finite difference: float32 logits still resolve it, and few kinks lie within."""
ERROR = 0.2
"""Relative error of a slope that kinks and rounding explain."""
SATURATED = 0.5
"""A loss of exactly 0 is common on single images of confident models, not on so large a share of all."""


def zero_gradients(case: Case) -> Finding:
    """Is there a gradient? (Athalye et al. 2018, shattered gradients; Pintor et al. 2022, silent failures)"""
    zero, lost = {}, 0
    for name, value in (("cross-entropy", case.cross_entropy), ("margin", case.margin)):
        flat = gradient(value, case.x).flatten(1)
        zero[name] = int((flat == 0).all(dim=1).sum())
        lost = max(lost, int((~flat.isfinite()).any(dim=1).sum()))
    evidence = f"of {len(case)} images the gradient is all zero for " + " and ".join(
        f"{count} ({name})" for name, count in zero.items()
    )
    return finding(
        "zero gradients",
        grade(max(*zero.values(), lost), len(case)),
        evidence + (f", and not finite for {lost}" if lost else ""),
        "attack the margin, or logits divided by their scale"
        if not zero["margin"]
        else "put something smooth into the backward pass of what has no gradient (BPDA), or attack by scores",
        images=len(case),
        zero=zero,
        not_finite=lost,
    )


def saturation(case: Case) -> Finding:
    """Does cross-entropy still say anything in float32? (Carlini and Wagner 2017 on defensive distillation)

    A loss of exactly 0 has lost the true class's gradient but not the others'; where all wrong probabilities are 0
    there is none at all (from a margin of 104).
    """
    with torch.no_grad():
        logits = case.subject.logits(case.x)
        margin = float(-functional.margin(logits, case.y).median())
        wrong = logits.softmax(dim=1).scatter(1, case.y[:, None], 0).amax(dim=1)
        mute = int((wrong == 0).sum())
        exact = float((case.cross_entropy(case.x) == 0).float().mean())
    verdict = grade(mute, len(case))
    return finding(
        "saturation",
        "warning" if verdict == "ok" and exact > SATURATED else verdict,
        f"median margin of the logits {margin:.3g}; the loss is exactly 0 for {percent(exact)} of the images, all "
        f"wrong probabilities are 0 for {mute} of {len(case)}",
        "attack the margin or DLR loss, or logits divided by their scale",
        images=len(case),
        median_margin=margin,
        loss_zero=exact,
        mute=mute,
    )


def gradient_correctness(case: Case) -> Finding:
    """Is the gradient the function's? Its length against the slope that a finite difference along it measures."""
    if case.randomised:
        return finding("gradient correctness", "skipped", "the model is randomised")
    y, logits = case.y[:PROBED], case.double()

    def value(images: Tensor) -> Tensor:
        return functional.margin(connected(logits(images), images), y)

    draws = case.generator(PROBED, "correctness").uniform(case.x[:PROBED])
    x = 0.05 + 0.85 * case.x[:PROBED] + 0.05 * draws  # inside the box, off the grid of pixel values
    x = x.to(widest(x.device))
    slope = gradient(value, x)
    length = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    known = (length > 0) & length.isfinite()
    if not bool(known.any()):
        return finding("gradient correctness", "skipped", f"no gradient to compare on {len(x)} images")
    way = STEP * slope / per_image(length.clamp_min(1e-30), x)
    with torch.no_grad():
        measured = (value(x + way) - value(x - way)) / (2 * STEP)
        rises = value(x + case.threat.epsilon * case.threat.ascend(slope)) > value(x)
    errors = ((measured - length).abs() / length.clamp_min(1e-30))[known]
    wrong, up, n = int((errors > ERROR).sum()), int(rises[known].sum()), len(errors)
    verdict: Verdict = "ok"
    remedy = "a layer has a backward pass of its own: attack with a better one (BPDA), or by scores"
    if at_least(wrong, n) > FRAUD:
        verdict = "failure"
        if up >= USEFUL * n:
            verdict = "warning"
            remedy = "the gradient is a substitute (straight-through?): report an attack by scores beside it"
    return finding(
        "gradient correctness",
        verdict,
        f"finite differences contradict the gradient on {wrong} of {n} images (median error "
        f"{percent(float(errors.median()))}); a step of epsilon along it raises the margin on {up}",
        remedy,
        images=n,
        wrong=wrong,
        rises=up,
        errors=[round(error, 4) for error in errors.tolist()],
    )


@torch.no_grad()
def landscape(case: Case) -> Finding:
    """Does the attack's direction raise the loss far more than random ones? (Pintor et al. 2022, bad directions)

    The curves are the mean margin on the way from the images to where PGD ended, and along the best of some random
    directions of length epsilon. The linearity gap (Qin et al. 2019) is how far off the first-order prediction is.
    """

    def margin(images: Tensor) -> Tensor:
        forwards = VOTES if case.randomised else 1
        return torch.stack([case.margin(images) for _ in range(forwards)]).mean(dim=0)

    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    move = case.pgd - case.x
    attack = torch.stack([margin(case.x + share * move) for share in shares])
    random = torch.full_like(attack, -torch.inf)
    generator = case.generator(None, "landscape")
    for _ in range(DIRECTIONS):
        way = case.threat.ascend(generator.normal(case.x)) * case.threat.epsilon
        along = torch.stack([margin((case.x + share * way).clamp(0, 1)) for share in shares])
        random = torch.where(along[-1] > random[-1], along, random)
    rise, luck = attack[-1] - attack[0], random[-1] - random[0]
    predicted = (gradient(case.margin, case.x) * move).flatten(1).sum(dim=1)
    gap = float(((rise - predicted).abs().mean() / rise.abs().mean().clamp_min(1e-12)).nan_to_num())
    beaten = int((~(rise > luck)).sum())  # NaN rises nowhere
    return finding(
        "loss landscape",
        grade(beaten, len(case)),
        f"PGD raises the margin by {float(rise.mean()):.3g}, the best of {DIRECTIONS} random directions by "
        f"{float(luck.mean()):.3g}, and by no less on {beaten} of {len(case)} images; linearity gap {percent(gap)}",
        "the gradient does not lead uphill: average it over noise, or attack by scores",
        images=len(case),
        shares=shares,
        attack=attack.mean(dim=1).nan_to_num().tolist(),
        random=random.mean(dim=1).tolist(),
        beaten=beaten,
        linearity_gap=gap,
    )


def gradient(value: Value, images: Tensor) -> Tensor:
    """Of `value`, for each image (B, C, H, W)."""
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(value(images).sum(), images)
    return found
