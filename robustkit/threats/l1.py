"""L1: the absolute values of the perturbation sum to at most epsilon."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustkit.core.registry import registry
from robustkit.core.rng import Generator
from robustkit.core.spec import setting, spec
from robustkit.functional import per_image


@registry("threat").register("l1")
@spec
class L1:
    """The absolute values of the perturbation sum to at most epsilon (Croce and Hein 2021).

    A steepest step would move one pixel. `ascend` moves the `share` of all pixels with the largest gradients, each as
    far (Tramer and Boneh 2019, whose share is 0.01; AutoAttack starts with 0.2 and adapts it).
    """

    epsilon: float = setting(default=12.0, above=0)
    share: float = setting(default=0.05, above=0, at_most=1)
    norm: ClassVar[Literal["L1"]] = "L1"

    def random(self, x: Tensor, epsilon: Tensor, generator: Generator) -> Tensor:
        """A Laplace direction, scaled by U(0, 1) epsilon."""
        signed = 2 * generator.uniform(x) - 1
        draws = signed.sign() * -torch.log1p(-signed.abs().clamp_max(1 - torch.finfo(x.dtype).eps))
        length = generator.uniform(x[:, :1, :1, :1]) * per_image(epsilon, x)
        direction = draws / per_image(self.size(draws).clamp_min(torch.finfo(x.dtype).tiny), x)
        return (x + direction * length).clamp_(0, 1)

    def project(self, x_adv: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
        """The nearest image in the ball and the box at once (Croce and Hein 2021, Prop. 2.1).

        Going into the one and then the other is not it, and leaves most of the ball unused. Pixel i moves by
        min(max(|d_i| - shrink, 0), room_i) in the direction of d = x_adv - x, with the least shrink that is enough.
        """
        wanted = (x_adv - x).flatten(1)
        length = wanted.abs()
        room = torch.where(wanted > 0, 1 - x.flatten(1), x.flatten(1))
        shrink = _shrink(length, room, epsilon)
        moved = wanted.sign() * torch.minimum((length - shrink[:, None]).clamp_min(0), room)
        projected = (x + moved.view_as(x)).clamp_(0, 1)
        return torch.where(per_image(shrink > 0, x), projected, x_adv.clamp(0, 1))

    def ascend(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().flatten(1)
        count = max(1, math.ceil(self.share * size.shape[1]))
        least = size.topk(count, dim=1).values[:, -1:]
        step = gradient.sign() * (size >= least).view_as(gradient)
        return step / per_image(self.size(step).clamp_min(1), step)

    def size(self, perturbation: Tensor) -> Tensor:
        return perturbation.abs().flatten(1).sum(dim=1)


def _shrink(length: Tensor, room: Tensor, epsilon: Tensor) -> Tensor:
    """(B,) least s >= 0 with sum_i min(max(length_i - s, 0), room_i) <= epsilon; length and room are (B, D).

    The sum falls with s, linearly between 2 D places: pixel i takes part from length_i - room_i to length_i.
    """
    begins = (length - room).clamp_min(0)
    places, order = torch.cat([begins, length], dim=1).sort(dim=1)
    falling = torch.where(order < length.shape[1], 1.0, -1.0).to(length.dtype).cumsum(dim=1)[:, :-1]
    drops = (falling * places.diff(dim=1)).cumsum(dim=1)
    excess = (length - begins).sum(dim=1) - epsilon
    segment = (drops < excess[:, None]).sum(dim=1, keepdim=True).clamp_max(drops.shape[1] - 1)
    shrink = places.gather(1, segment + 1) - (drops.gather(1, segment) - excess[:, None]) / falling.gather(
        1, segment
    ).clamp_min(1)
    # The cumulated sums carry rounding errors of thousands of pixels: one Newton step on the sum itself takes them out.
    part = (length > shrink) & (begins <= shrink)
    left = torch.minimum((length - shrink).clamp_min(0), room).sum(dim=1, keepdim=True) - epsilon[:, None]
    shrink = shrink + left / part.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(excess > 0, shrink.squeeze(1).clamp_min(0), 0)
