"""How robust is the copy? PGD with restarts as LAS-AT's reward has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.batch import Passes
from robustkit.core.rng import Generator
from robustkit.core.strategy import Predict, ThreatModel
from robustkit.functional import per_image

STEPS, RESTARTS, STRIDE = 10, 2, 1 / 4
"""Steps of each restart, and their length in multiples of epsilon: 2/255 at 8/255."""
PASSES = Passes(forward=STEPS + 1, input_backward=STEPS) * RESTARTS


@torch.no_grad()
def strongest(
    predict: Predict, x: Tensor, y: Tensor, threat: ThreatModel, generator: Generator, *, stop_when_fooled: bool
) -> Tensor:
    """(B, C, H, W), within the threat's epsilon: of each image the restart whose cross-entropy is higher.

    The model is in training mode, also for that comparison, so its running statistics follow the examples: it is a
    copy. `stop_when_fooled`: an image does not move in a step in which it is misclassified.
    """
    epsilon = x.new_full((len(y),), threat.epsilon)
    found, highest = x, x.new_full((len(y),), -torch.inf)
    with predict.using("train") as predict:
        for _ in range(RESTARTS):
            x_adv = threat.random(x, epsilon, generator)
            for _ in range(STEPS):
                with torch.enable_grad():
                    x_adv.requires_grad_()
                    logits = predict(x_adv).logits
                    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
                stride = STRIDE * epsilon
                if stop_when_fooled:
                    stride = stride * (logits.argmax(dim=1) == y)
                x_adv = threat.project(x_adv.detach() + threat.ascend(gradient) * per_image(stride, x), x, epsilon)
            value = F.cross_entropy(predict(x_adv).logits, y, reduction="none")
            found = torch.where(per_image(value >= highest, x), x_adv, found)
            highest = torch.maximum(value, highest)
    return found
