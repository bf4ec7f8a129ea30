"""The loop of every iterative attack: step up a value, stay within the threat model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from robustkit.core.batch import Budget
from robustkit.core.recipe import Recipe
from robustkit.core.strategy import Predict, Repeating, ThreatModel
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


def step_sizes(own: float | None, budget: Budget) -> Tensor:
    """(B,) an attack's own step size in pixels; None: the budget's, else epsilon / 4."""
    if own is not None:
        return torch.full_like(budget.epsilon, own)
    return budget.epsilon / 4 if budget.step_size is None else budget.step_size


def most_steps(own: int, recipe: Recipe) -> int:
    """How many steps an attack takes at most there: its own number, or what the epsilon schedule says."""
    return max(getattr(recipe.epsilon, "step_counts", (own,)))


def repeatedly(predict: Predict, key: Hashable, function: Callable[..., Tensor], tensors: tuple[Any, ...]) -> Tensor:
    """`function(*tensors)`, recorded and replayed where `predict` can do that (see `core.strategy.Repeating`)."""
    if isinstance(predict, Repeating):
        return predict.repeatedly(key, function, tensors)
    return function(*tensors)
