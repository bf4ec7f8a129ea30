"""A reject option: a model that says how sure it is, and is not asked for a class where it is not sure enough.

rejector = Rejector(robustkit.load("runs/quickstart-1"), threshold=0.6)
said = rejector(images)
said.labels[~said.rejected]

The score is the largest posterior, the softmax of the logits: of a Gaussian-mixture head the posterior of its densities
(LDAT, CMC 2024, section 4.4; by elimination, see docs/detection.md), of any other head the usual confidence. Whether
that detects adversarial images at all only an attack can say that knows the threshold (`evaluation.Detection`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.errors import UserError
from robustkit.engine.predictor import ModulePredictor
from robustkit.heads.gaussian_mixture import GaussianMixtureHead


class Said(NamedTuple):
    """What a model says of images: all on their device, float32.

    `likelihoods` are there where the head is a Gaussian mixture: the logarithm of each class's density, relative to the
    density at the class's centre (-|f - mu_k|^2 / 2, in nats; 0 at the centre).
    """

    labels: Tensor  # (B,) int64
    scores: Tensor  # (B,) in [1 / K, 1]
    rejected: Tensor  # (B,) bool
    posteriors: Tensor  # (B, K)
    likelihoods: Tensor | None  # (B, K)


@attrs.frozen(eq=False)
class Rejector:
    """A model that maps images (B, C, H, W) in [0, 1] to logits, or to an Output, and a threshold on its score.

    An image is rejected where its score lies below `threshold`, or is no number.
    """

    model: nn.Module
    threshold: float = 0.0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Said:
        """What the model says of `images`, in eval mode; afterwards it is in the mode that it was in."""
        with ModulePredictor(self.model).using("eval") as predict:
            logits = predict(images).logits
        posteriors = logits.softmax(dim=1)
        scores, labels = posteriors.max(dim=1)
        mixture = isinstance(getattr(getattr(self.model, "network", self.model), "head", None), GaussianMixtureHead)
        likelihoods = logits.clamp_max(0) if mixture else None  # a square, taken as a difference, may round below 0
        return Said(labels, scores, ~(scores >= self.threshold), posteriors, likelihoods)

    def scores(self, images: Tensor) -> Tensor:
        """(B,) scores of `images`, in the model's own mode and with gradients: for attacks and for `audit`."""
        return score(ModulePredictor(self.model)(images).logits)


def score(logits: Tensor) -> Tensor:
    """(B,) the largest posterior: in [1 / K, 1], float32."""
    return logits.float().softmax(dim=1).amax(dim=1)


def scores_of(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """(N,) scores on the CPU of batches (B, C, H, W), by a model as `Rejector` takes it, in eval mode."""
    rejector = Rejector(model)
    return torch.cat([rejector(images).scores.cpu() for images in batches])


def threshold_for(scores: Tensor, false_rejections: float = 0.05) -> float:
    """The highest threshold that rejects at most that share of `scores` (N,), those of natural, held-out images.

    It is one of the scores, so that scores like it are accepted; equal ones make the share smaller.

    Raises:
        UserError: there are no scores, one is no number, or the share is not in [0, 1).
    """
    if not 0 <= false_rejections < 1:
        raise UserError(f"must be in [0, 1), got {false_rejections:g}", place="false_rejections", remedy="e.g. 0.05")
    if len(scores) == 0 or not bool(scores.isfinite().all()):
        fault = "there are none" if len(scores) == 0 else "some are NaN or infinite"
        raise UserError(fault, place="scores", remedy="give those of held-out natural images")
    rejected = math.floor(false_rejections * len(scores) + 1e-6)
    return float(scores.sort().values[rejected])


def shares(right: Tensor, accepted: Tensor) -> dict[str, float]:
    """What became of images: `right` (N,) bool is how they were classified, `accepted` (N,) whether. They sum to 1."""
    fates = {
        "classified": right & accepted,
        "detected": ~right & ~accepted,
        "falsely accepted": ~right & accepted,
        "falsely rejected": right & ~accepted,
    }
    return {name: int(fate.sum()) / len(right) for name, fate in fates.items()}


def defence_success(shares: dict[str, float]) -> float:
    """The share of images that are classified right and accepted, or wrong and rejected (LDAT's success rate)."""
    return shares["classified"] + shares["detected"]


def auroc(natural: Tensor, adversarial: Tensor) -> float:
    """How well a score tells them apart: the chance that a natural image's is the higher one, ties counting half.

    Of scores (N,) and (M,): the area under the ROC curve, 1 where every natural image has the higher one, 0.5 where the
    score tells nothing. For a second score beside the posterior: the likelihood of the predicted class.
    """
    ordered = adversarial.sort().values
    below = torch.searchsorted(ordered, natural.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, natural.contiguous(), right=True)
    return float((below + up_to).cpu().double().mean()) / 2 / len(adversarial)
