"""What every check looks at: a model, the images that it gets right, and attacks on them.

A check asks whether some attack B breaks images that another, A, could not. Both see the same images, so what counts is
how many are broken by B but not by A, not the difference of two accuracies: it is zero but for luck where A is the
stronger one. `at_least` says what share of all images that number proves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit import functional
from robustkit.attacks.climb import climb
from robustkit.core.batch import Output
from robustkit.core.device import widest
from robustkit.core.rng import Generator, derive, whole
from robustkit.core.strategy import Subject, ThreatModel
from robustkit.engine.folding import close
from robustkit.evaluation.findings import Finding, Verdict, finding
from robustkit.evaluation.logits import is_right
from robustkit.evaluation.results import wilson

STEPS = 20
"""Steps of the attack that a claim of robustness usually rests on, PGD-20 on cross-entropy: the one on trial."""

NOISE, FRAUD = 0.04, 0.10
"""Shares of images beyond which something is a warning, and a failure. Random starts and ties move 1 or 2 images in 100
of an honest model; of a fraud nearly all. With 100 images 8 prove more than the one, 16 more than the other; with 50
images it is 5 and 10 (`at_least`)."""

GAP, GAP_FRAUD = 0.08, 0.15
"""The same for gradient attacks of another make: other losses, restarts, FAB. Honest methods show gaps of up to 10
points between PGD and AutoAttack (soft targets, MART). With 100 images 14 and 22 prove more, with 50 it is 8 and 13."""

EXPENSIVE = 50
"""Images for attacks that forward hundreds of times."""

VOTES = 10
"""Forwards of a randomised model whose majority decides."""

Value = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> what an attack climbs (B,)."""


@attrs.frozen(eq=False)
class Detector:
    """A reject option: images (B, C, H, W) -> scores (B,), accepted from `threshold` on."""

    score: Callable[[Tensor], Tensor]
    threshold: float

    def slack(self, images: Tensor) -> Tensor:
        """(B,) how far above the threshold: not negative where accepted."""
        return self.score(images) - self.threshold


@attrs.frozen(eq=False, slots=False)
class Case:
    """The model on trial: `x` (N, C, H, W) and `y` (N,) are those of `total` images that it gets right.

    Its methods take perturbed versions (B, C, H, W) of the first B of these.
    """

    subject: Subject
    x: Tensor
    y: Tensor
    total: int
    seed: int
    came_training: bool
    surrogate: nn.Module | None = None
    detector: Detector | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def threat(self) -> ThreatModel:
        return self.subject.threat

    def logits(self, images: Tensor) -> Tensor:
        """(B, K), with a gradient: of zeros where the model lets none through."""
        return connected(self.subject.logits(images), images)

    def cross_entropy(self, images: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(images), self.y[: len(images)], reduction="none")

    def margin(self, images: Tensor) -> Tensor:
        return functional.margin(self.logits(images), self.y[: len(images)])

    def generator(self, count: int | None, *purpose: str | int) -> Generator:
        return whole(self.x[:count], self.seed, "audit", *purpose)

    def attack(
        self,
        value: Value,
        purpose: str | int,
        *,
        steps: int = STEPS,
        epsilon: float | None = None,
        count: int | None = None,
    ) -> Tensor:
        """Projected gradient ascent of `value` from the case's first `count` images (all), one restart per `purpose`.

        The step is 2.5 epsilon / steps (Madry et al. 2018), at most epsilon: any image of the ball can be reached.
        """
        x = self.x[:count]
        radius = x.new_full((len(x),), self.threat.epsilon if epsilon is None else epsilon)
        start = self.threat.random(x, radius, self.generator(count, purpose))
        step = radius * min(1.0, 2.5 / steps)
        return climb(value, start, x, threat=self.threat, epsilon=radius, step_size=step, steps=steps)

    @torch.no_grad()
    def broken(self, images: Tensor, epsilon: float | None = None) -> Tensor:
        """(B,) bool: in the ball and the box, and misclassified (a randomised model: in most forwards)."""
        x, y = self.x[: len(images)], self.y[: len(images)]
        radius = self.threat.epsilon if epsilon is None else epsilon
        allowed = self.threat.size(images - x) <= radius * (1 + 1e-5) + 1e-6
        allowed &= ((images >= -1e-6) & (images <= 1 + 1e-6)).flatten(1).all(dim=1)  # false for NaN
        forwards = VOTES if self.randomised else 1
        right = sum(is_right(self.subject.logits(images), y).float() for _ in range(forwards))
        return allowed & (torch.as_tensor(right) < forwards / 2)

    @cached_property
    def randomised(self) -> bool:
        """Two forwards of the same images differ."""
        with torch.no_grad():
            return not close(self.subject.logits(self.x), self.subject.logits(self.x))

    @cached_property
    def pgd(self) -> Tensor:
        """Adversarial images (N, C, H, W) of the attack on trial."""
        return self.attack(self.cross_entropy, "pgd")

    @cached_property
    def by_pgd(self) -> Tensor:
        """(N,) bool, broken by the attack on trial."""
        return self.broken(self.pgd)

    @cached_property
    def by_margin(self) -> Tensor:
        """(N,) bool, broken by the same attack on the margin, which does not saturate (Carlini and Wagner 2017)."""
        return self.broken(self.attack(self.margin, "margin"))

    @property
    def by_gradients(self) -> Tensor:
        """(N,) bool, broken by either: what plain white-box attacks find."""
        return self.by_pgd | self.by_margin

    def double(self) -> Callable[[Tensor], Tensor]:
        """Images -> logits in float64, or in float32 where the model or its device cannot do that."""
        module = self.subject.logits.module
        assert isinstance(module, nn.Module)

        def forward(model: nn.Module, images: Tensor) -> Tensor:
            output = model(images)
            logits: Tensor = output.logits if isinstance(output, Output) else output
            return logits.to(widest(logits.device))

        try:
            wide = copy.deepcopy(module).double()
            with torch.no_grad():
                forward(wide, self.x[:1].double())
        except (RuntimeError, TypeError):
            return lambda images: forward(module, images.float())
        return lambda images: forward(wide, images)

    def accuracy(self, broken: Tensor) -> float:
        """Share of all images that are still right."""
        rate = (len(broken) - int(broken.sum())) / len(broken)
        return rate * len(self) / self.total

    def key(self, purpose: str) -> int:
        """A seed for code that takes whole numbers."""
        return derive(self.seed, "audit", purpose) % 2**31


def connected(logits: Tensor, images: Tensor) -> Tensor:
    """Logits (B, K) with a gradient of zeros where the model lets none through, instead of an error."""
    if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
        return logits + 0 * images.flatten(1).sum(dim=1, keepdim=True)
    return logits


def at_least(count: int, n: int) -> float:
    """The share that `count` of `n` images proves: the lower end of its 95 % interval (Wilson 1927)."""
    return wilson(count, n)[0]


def grade(count: int, n: int, warning: float = NOISE, failure: float = FRAUD) -> Verdict:
    """What `count` of `n` images that ought not to be there mean."""
    share = at_least(count, n)
    return "failure" if share > failure else "warning" if share > warning else "ok"


def missed(
    case: Case,
    check: str,
    attack: str,
    broken: Tensor,
    remedy: str,
    *,
    bounds: tuple[float, float] = (NOISE, FRAUD),
    **data: Any,
) -> Finding:
    """The finding on an attack that plain gradient attacks should be as strong as: what does it break that they miss?

    Args:
        broken: (B,) bool, of the case's first B images.
        bounds: shares of images beyond which it is a warning, and a failure.
    """
    n = len(broken)
    extra = int((broken & ~case.by_gradients[:n]).sum())
    plain = int(case.by_gradients[:n].sum())
    evidence = f"{attack} breaks {extra} of {n} images that plain PGD cannot ({int(broken.sum())} in all, PGD {plain})"
    verdict = grade(extra, n, *bounds)
    return finding(check, verdict, evidence, remedy, images=n, broken=int(broken.sum()), missed=extra, **data)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
