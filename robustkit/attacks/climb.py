"""The loop of every iterative attack: step up a value, stay within the threat model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkit.core.strategy import ThreatModel
from robustkit.functional import per_image


def climb(
    value: Callable[[Tensor], Tensor],
    start: Tensor,
    x: Tensor,
    *,
    threat: ThreatModel,
    epsilon: Tensor,
    step_size: Tensor,
    steps: int,
    steps_per_image: Tensor | None = None,
) -> Tensor:
    """Ascend `value` (images -> (B,)) from `start`, projecting after each step.

    Args:
        value: one number per image; its gradient with respect to the images is all that is computed.
        start, x: (B, C, H, W); the ball is around x.
        epsilon, step_size: (B,) in the threat model's unit.
        steps: how many; image i stops moving after `steps_per_image[i]` of them, where given.

    Returns:
        (B, C, H, W), detached.
    """
    stride = per_image(step_size, x)
    x_adv = start.detach()
    for step in range(steps):
        with torch.enable_grad():
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(value(x_adv).sum(), x_adv)
        move = threat.ascend(gradient) * stride
        if steps_per_image is not None:
            move = move * per_image(step < steps_per_image, x)
        x_adv = threat.project(x_adv.detach() + move, x, epsilon)
    return x_adv.detach()
