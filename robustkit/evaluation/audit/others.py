"""Checks by attacks of another kind: none of them should break what plain gradient attacks cannot (Athalye et al.)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit import functional
from robustkit.attacks.climb import climb
from robustkit.backbones.convnet import ConvNet
from robustkit.core.rng import Generator
from robustkit.evaluation.audit.case import (
    EXPENSIVE,
    GAP,
    GAP_FRAUD,
    STEPS,
    Case,
    Value,
    connected,
    grade,
    missed,
    percent,
)
from robustkit.evaluation.audit.gradients import gradient
from robustkit.evaluation.findings import Finding, finding

QUERIES = 1000
"""Of Square; AutoAttack takes 5,000, to reach small numbers. Frauds fall in the first hundreds."""
PAIRS, SCORE_STEPS = 20, 15
"""Finite differences for each gradient estimate, and steps along those: 600 forwards."""
AVERAGED = 8
"""Gradients in each average."""
FAB_STEPS, FAB_TARGETS = 40, 3
IMITATION_STEPS = 120


def by_scores(case: Case) -> Finding:
    """Do attacks that use scores alone break more? That is the surest sign of masking.

    Square (Andriushchenko et al. 2020), and PGD on finite differences (Ilyas et al. 2018).
    """
    from pyautoattack.square import SquareAttack

    square = SquareAttack(
        case.subject.logits,
        norm=case.threat.norm,
        eps=case.threat.epsilon,
        n_queries=QUERIES,
        seed=case.key("square"),
        device=case.x.device,
    )
    by_square = official(case, square)
    estimated = partial(along, case.margin, case, case.generator(len(by_square), "by scores"))
    by_differences = case.broken(case.attack(estimated, "scores", steps=SCORE_STEPS, count=len(by_square)))
    return missed(
        case,
        "by scores",
        f"Square with {QUERIES} queries or finite differences",
        by_square | by_differences,
        "gradients are masked: report Square with 5,000 queries, and attack with gradients that lead somewhere (BPDA)",
        square=int(by_square.sum()),
        differences=int(by_differences.sum()),
        queries=QUERIES,
    )


def smoothing(case: Case) -> Finding:
    """Do gradients averaged over noise lead further? Then the landscape is shattered (Athalye et al. 2018)."""
    generator = case.generator(None, "smoothing")

    def value(images: Tensor) -> Tensor:
        near = images.new_full((len(images),), case.threat.epsilon / 2)
        total = torch.zeros_like(near)
        for _ in range(AVERAGED):
            total = total + case.margin(case.threat.random(images, near, generator))
        return total / AVERAGED

    broken = case.broken(case.attack(value, "smoothing"))
    remedy = "average the gradient over noise around the images, in every attack that is reported"
    return missed(case, "smoothing", f"PGD on gradients averaged over {AVERAGED} draws of noise", broken, remedy)


def minimum_norm(case: Case) -> Finding:
    """FAB looks for the nearest boundary, with neither a loss nor a step size that could be wrong (Croce and Hein)."""
    from pyautoattack.fab_pt import FABAttack_PT

    targets = min(FAB_TARGETS, case.logits(case.x[:1]).shape[1] - 1)
    fab = FABAttack_PT(
        case.logits,
        norm=case.threat.norm,
        eps=case.threat.epsilon,
        n_restarts=1,
        n_iter=FAB_STEPS,
        targeted=True,
        n_target_classes=targets,
        seed=case.key("fab"),
        device=case.x.device,
    )
    remedy, who = "PGD's steps or loss do not fit: report AutoAttack", f"FAB (likeliest targets: {targets})"
    return missed(case, "minimum norm", who, official(case, fab), remedy, bounds=(GAP, GAP_FRAUD))


def transfer(case: Case) -> Finding:
    """Do adversarial images of another model break this one? White-box attacks must be stronger (Athalye et al.).

    The other model is the surrogate; or else an imitation, a small network fitted to this model's answers on mixtures
    of the images (Papernot et al. 2017). It has gradients whatever this one hides.
    """
    surrogate = case.surrogate if case.surrogate is not None else imitate(case)

    def value(images: Tensor) -> Tensor:
        return functional.margin(connected(surrogate(images), images), case.y[: len(images)])

    broken = case.broken(case.attack(value, "transfer"))
    who = "PGD on an imitation of the model" if case.surrogate is None else "PGD on the surrogate"
    remedy = "a model's own gradient must beat another's: it is masked; report transfer attacks and Square"
    with torch.no_grad():
        agrees = float((surrogate(case.x).argmax(dim=1) == case.y).float().mean())
    return missed(case, "transfer", f"{who}, which agrees on {percent(agrees)},", broken, remedy, agreement=agrees)


def detector(case: Case) -> Finding:
    """Does an attack that knows the detector pass it? (Carlini and Wagner 2017; Bryniarski et al. 2022)

    It climbs the margin while the model is right and the detector's score while the detector objects; an image falls
    that is misclassified and accepted at any step. Scores without a gradient are climbed by finite differences.
    """
    judge = case.detector
    if judge is None:
        return finding("detector", "skipped", "no detector is given")

    @torch.no_grad()
    def passes(images: Tensor) -> Tensor:
        return case.broken(images) & (judge.slack(images) >= 0)

    generator = case.generator(None, "detector")
    slope = gradient(lambda images: connected(judge.slack(images)[:, None], images)[:, 0], case.x)
    smooth = bool((slope != 0).any())

    def value(images: Tensor) -> Tensor:
        score = judge.slack(images) if smooth else along(judge.slack, case, generator, images)
        margin = case.margin(images)
        return torch.where(margin < 0, margin, score)

    radius = case.x.new_full((len(case),), case.threat.epsilon)
    fallen, steps = passes(case.pgd), 2 * STEPS
    plain = int(fallen.sum())
    for start in (case.x, case.pgd):
        images = start
        for step in range(steps):
            size = radius * 2.5 / steps * (1 - step / steps)
            images = climb(value, images, case.x, threat=case.threat, epsilon=radius, step_size=size, steps=1)
            fallen = fallen | passes(images)
    n, extra = len(case), int(fallen.sum()) - plain
    with torch.no_grad():
        refused = int((judge.slack(case.x) < 0).sum())
    return finding(
        "detector",
        grade(extra, n),
        f"PGD breaks {int(case.by_pgd.sum())} of {n} images and gets {plain} past the detector, too; an attack that "
        f"knows the detector gets {int(fallen.sum())} past both; {refused} clean images are rejected",
        "report the adaptive number: the detector knows one attack, not adversarial images",
        images=n,
        fooled=int(case.by_pgd.sum()),
        plain=plain,
        adaptive=int(fallen.sum()),
        rejected_clean=refused,
    )


def official(case: Case, attack: Any) -> Tensor:
    """(B,) bool of the first images: broken by plain PGD, or by an attack of AutoAttack's authors on the rest."""
    broken = case.by_gradients[:EXPENSIVE].clone()
    left = (~broken).nonzero().squeeze(1)
    if len(left):
        images = case.x[:EXPENSIVE].clone()
        images[left] = attack.perturb(images[left], case.y[left])
        broken |= case.broken(images)
    return broken


@torch.no_grad()
def along(value: Value, case: Case, generator: Generator, images: Tensor) -> Tensor:
    """(B,) a linear function of `images` whose gradient is that of `value`, by finite differences of scores.

    Antithetic Gaussian directions (Ilyas et al. 2018), with half of epsilon as their size in the threat's norm.
    """
    here = images.detach()
    size = case.threat.epsilon / 2 / case.threat.size(torch.ones_like(here[:1]))
    total = torch.zeros_like(here)
    for _ in range(PAIRS):
        way = generator.normal(here)
        rise = value((here + size * way).clamp(0, 1)) - value((here - size * way).clamp(0, 1))
        total += rise.view(-1, 1, 1, 1) * way
    with torch.enable_grad():
        return (total * images).flatten(1).sum(dim=1)


def imitate(case: Case) -> Callable[[Tensor], Tensor]:
    """A small network that answers as the model does near the images and between them; its logits are standardised."""
    classes = case.logits(case.x[:1]).shape[1]
    torch.manual_seed(case.key("imitation"))
    network = ConvNet(num_classes=classes, in_chans=case.x.shape[1]).to(case.x.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, IMITATION_STEPS)
    generator = case.generator(None, "imitation")
    far = case.x.new_full((len(case),), 2 * case.threat.epsilon)
    for _ in range(IMITATION_STEPS):
        other = torch.randperm(len(case), device=case.x.device)
        share = generator.uniform(case.x[:, :1, :1, :1])
        images = case.threat.random(share * case.x + (1 - share) * case.x[other], far, generator)
        with torch.no_grad():
            answers = case.subject.logits(images)
            answers = (answers - answers.mean(dim=1, keepdim=True)) / (answers.std() + 1e-12)
        with torch.enable_grad():
            loss = F.mse_loss(network(images), answers)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)
