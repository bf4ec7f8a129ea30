"""The loop of attacks that leave an image where it is once it has had enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustkit.core.batch import Mode
from robustkit.core.strategy import ThreatModel
from robustkit.functional import per_image

Rows = Tensor | slice
"""Which images of the batch: their places, or all of them."""


def climb_while(
    look: Callable[[int, Rows, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    x: Tensor,
    *,
    threat: ThreatModel,
    epsilon: Tensor,
    step_size: Tensor,
    steps: int,
    steps_per_image: Tensor | None = None,
    noise: Tensor | None = None,
    mode: Mode,
) -> Tensor:
    """Ascend as `climb` does; an image of which `look` says no takes neither that step nor a later one.

    Images that stand still leave the batch where none sees another and looking waits for no device: in eval mode on the
    CPU. Elsewhere they are computed to the end and masked. The result is the same.

    Args:
        look: (step, rows, images) -> the gradient at these `images`, the `rows` of the batch, and (bool) who goes on.
        start, x: (B, C, H, W); the ball is around x.
        epsilon, step_size: (B,) in the threat model's unit.
        steps: how many at most; image i takes at most `steps_per_image[i]`, where given.
        noise: (steps, B, C, H, W), added to each step before projecting.

    Returns:
        (B, C, H, W), detached; where an image took no step, `start`.
    """
    drops = mode == "eval" and x.device.type == "cpu"
    x_adv = start.detach().clone()
    moving = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rows: Rows = slice(None)
    for step in range(steps):
        if steps_per_image is not None:
            moving &= step < steps_per_image
        if drops:
            rows = moving.nonzero().squeeze(1)
            if len(rows) == 0:
                break
        here = x_adv[rows]
        gradient, goes_on = look(step, rows, here)
        moving[rows] &= goes_on
        move = threat.ascend(gradient) * per_image(step_size[rows], here)
        if noise is not None:
            move = move + noise[step, rows]
        there = threat.project(here + move, x[rows], epsilon[rows])
        x_adv[rows] = torch.where(per_image(moving[rows], here), there, here)
    return x_adv
