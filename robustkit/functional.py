"""Pure mathematics shared by attacks, targets and losses. Logits are (B, K); results are float32, one per image.

Entropies and divergences of float64 logits are float64, so that a test can tell rounding from mistakes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def precise(values: Tensor) -> Tensor:
    """In float32, from whatever precision a forward had; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def entropy(logits: Tensor) -> Tensor:
    """(B,) entropy of softmax(logits) in nats; exact where probabilities underflow (`p log p` would be NaN)."""
    log_p = F.log_softmax(precise(logits), dim=1)
    return torch.special.entr(log_p.exp()).sum(dim=1)  # type: ignore[no-any-return]


def kl_from_probabilities(p: Tensor, logits: Tensor) -> Tensor:
    """(B,) KL(p || softmax(logits)) for target rows p that may hold zeros, differentiable in both."""
    p = precise(p)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # finite at 0, and so is its gradient (`F.kl_div`'s is NaN)
    return (p * (log_p - F.log_softmax(precise(logits), dim=1))).sum(dim=1)


def kl_from_logits(target_logits: Tensor, logits: Tensor) -> Tensor:
    """(B,) KL(softmax(target_logits) || softmax(logits)), differentiable in both."""
    log_p = F.log_softmax(precise(target_logits), dim=1)
    log_q = F.log_softmax(precise(logits), dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) largest wrong logit minus the true one: positive where the image is misclassified."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return wrong - true


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the largest logit is the true one. NaN is never right (argmax would make it class 0, or whichever)."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) shaped to multiply `images` (B, C, H, W)."""
    return values.view(-1, *([1] * (images.ndim - 1)))
