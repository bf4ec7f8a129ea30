"""Attacks that look for the nearest misclassified image, by foolbox; which of them count is ours to say."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from robustkit.core.batch import Passes
from robustkit.core.errors import LibraryError, UserError
from robustkit.core.registry import registry
from robustkit.core.rng import derive
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Outcomes, Slice, Subject, ThreatModel
from robustkit.core.world import World
from robustkit.evaluation.logits import is_right

CANDIDATES = 10
"""Classes whose boundaries DeepFool looks at: foolbox's default."""
SEARCHES = 9
"""Constants that the attack of Carlini and Wagner tries for each image."""


@registry("measure").register("minimum-norm")
@spec
class MinimumNorm:
    """Accuracy under an attack that looks for the nearest misclassified image, by foolbox (Rauber et al., JOSS 2020).

    `attack` is "deepfool" (Moosavi-Dezfooli et al., CVPR 2016; L-inf and L2), "cw" (Carlini and Wagner, S&P 2017; L2)
    or "ddn" (Rony et al., CVPR 2019; L2), with `steps` iterations: of C&W in each of nine binary search steps, none cut
    short; all else is foolbox's default. It is made on the images that the model gets right.

    An image is broken if what the attack found for it is misclassified and no further from it than epsilon. Nothing is
    clipped to the ball first: a point inside the ball on the way to one that is too far away is no example.
    """

    key: str = "deepfool"
    attack: Literal["deepfool", "cw", "ddn"] = "deepfool"
    steps: int = setting(default=40, at_least=1)
    images: int | None = setting(default=None, at_least=1)

    def ready(self, threat: ThreatModel, world: World) -> MinimumNorm:
        """Itself.

        Raises:
            UserError: foolbox is not there, or has no such attack in that ball.
        """
        self._in(threat)
        return self

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        yield Outcomes(self._searched(subject, part, seed)[1])

    def examples(self, subject: Subject, part: Slice, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Once, by its key: images (B, C, H, W), those broken as they were broken and the others as they are."""
        yield self.key, self._searched(subject, part, seed)[0]

    def _searched(self, subject: Subject, part: Slice, seed: int) -> tuple[Tensor, Tensor]:
        """The images, and (B,) bool, whether they are right still."""
        attack, threat = self._in(subject.threat), subject.threat
        made, right = part.x.clone(), is_right(subject.logits(part.x), part.y)
        left = right.nonzero().squeeze(1)
        if len(left):
            images, labels = part.x[left].contiguous(), part.y[left]
            with _contained(images.device, derive(seed, self.key, part.number)):
                foolbox = _foolbox()
                model = foolbox.PyTorchModel(subject.logits, bounds=(0, 1), device=images.device)
                found, _, _ = attack(model, images, foolbox.criteria.Misclassification(labels), epsilons=None)
            x_adv = found.detach().clamp(0, 1)
            near = threat.size(x_adv - images) <= threat.epsilon
            broken = near & ~is_right(subject.logits(x_adv), labels)
            made[left[broken]], right[left] = x_adv[broken], ~broken
        return made, right

    def passes(self, norm: str, classes: int) -> Passes:
        """At most: DeepFool ends once all images of a slice are wrong, which most are after a few steps."""
        each = {"deepfool": min(CANDIDATES, classes) - 1, "cw": SEARCHES, "ddn": 1}[self.attack]
        checks = 4 if self.attack == "deepfool" else 3  # the image, the result by foolbox and by us; DeepFool's ranking
        return Passes(forward=each * self.steps + checks, input_backward=each * self.steps)

    def _in(self, threat: ThreatModel) -> Any:
        """foolbox's attack for that ball."""
        attacks = _foolbox().attacks
        match self.attack, threat.norm:
            case "deepfool", "Linf":
                return attacks.LinfDeepFoolAttack(steps=self.steps, candidates=CANDIDATES)
            case "deepfool", "L2":
                return attacks.L2DeepFoolAttack(steps=self.steps, candidates=CANDIDATES)
            case "cw", "L2":  # its early stop goes by the loss of a whole batch
                return attacks.L2CarliniWagnerAttack(binary_search_steps=SEARCHES, steps=self.steps, abort_early=False)
            case "ddn", "L2":
                return attacks.DDNAttack(steps=self.steps)
        known = "L-inf and L2" if self.attack == "deepfool" else "L2"
        remedy = f"put it into a suite of its own, e.g. Suite(name='l2', threat=L2(epsilon=0.5), ...); it knows {known}"
        raise UserError(f"there is no {self.attack} for {threat.norm}", place=f"measure '{self.key}'", remedy=remedy)


DEEPFOOL = MinimumNorm()
CARLINI_WAGNER = MinimumNorm(key="cw", attack="cw")
"""In L2; the `CW` of other suites is PGD on the margin."""
DDN = MinimumNorm(key="ddn", attack="ddn")


def _foolbox() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it takes a filter from where SciPy once kept it
            import foolbox
    except ImportError as error:
        there = getattr(error, "name", None) != "foolbox"
        fault = f"cannot be imported: {str(error).splitlines()[0]}" if there else "is not installed"
        remedy = "pip install foolbox, or robustkit with that extra: pip install 'robustkit[foolbox]'"
        raise LibraryError(f"{fault}: DeepFool, C&W and DDN are its", place="foolbox", remedy=remedy) from error
    return foolbox


@contextmanager
def _contained(device: torch.device, seed: int) -> Iterator[None]:
    """Gradients, draws by the seed, and no trace: torch's random state and the root logger's handlers as before."""
    devices = [device] if device.type == "cuda" else []
    handlers = list(logging.root.handlers)  # `logging.info` puts one there
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            logging.root.handlers[:] = handlers
