"""What travels in a step. Shapes: B images of C x H x W pixels in [0, 1], K classes, D features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import attrs
from torch import Tensor

if TYPE_CHECKING:
    from robustkit.core.model import RobustModel

Mode = Literal["eval", "train", "train-frozen"]
"""How a forward pass treats batch statistics: running ones; the batch's, tracked; the batch's, not tracked."""


class Batch(NamedTuple):
    """Images, labels, and the row of each image in the training set (before any split)."""

    x: Tensor  # (B, C, H, W) float in [0, 1]
    y: Tensor  # (B,) int64
    index: Tensor  # type: ignore[assignment]  # (B,) int64; hides tuple.index, which nobody needs


class Budget(NamedTuple):
    """How hard to attack each image. What is None the attack decides (its step size: epsilon / 4)."""

    epsilon: Tensor  # (B,) in the unit of the threat model, pixels in [0, 1]
    step_size: Tensor | None = None  # (B,) same unit
    steps: Tensor | None = None  # (B,) int64: images stop moving after so many steps
    weight: Tensor | None = None  # (B,) a per-image weight, for losses that use one
    max_steps: int = 0  # no image makes more, known to the host so that nothing waits for the device
    adjusted: Tensor | None = None  # (B,) int64: 1 where the image was given a large radius of its own, -1 a small one


class Output(NamedTuple):
    """What the model says of a batch. `margined` is for the classification loss alone; elsewhere use `logits`."""

    logits: Tensor  # (B, K) float32
    margined: Tensor  # (B, K) float32, equal to `logits` where no label was given or the head has no margin
    features: Tensor  # (B, D) the head's input
    penalty: Tensor  # (B,) the head's own regulariser for each image, 0 where it has none


class Prepared(NamedTuple):
    """What an outer loss wants forwarded, decided once per step before the pure pass."""

    # name -> images; the same tensor under two names is forwarded once, one that requires a gradient in float32
    views: dict[str, Tensor]
    extras: dict[str, Tensor] = {}
    shares: dict[str, float] = {}  # each view's share of the head's penalty; missing: equal shares
    joint: bool = False  # one concatenated forward (shared batch statistics) instead of one each
    untracked: frozenset[str] = frozenset()  # views that leave running statistics alone, if forwarded on their own
    networks: dict[str, RobustModel] = {}  # who forwards a view, where it is not the model but one trained beside it


class Part(NamedTuple):
    """Which rows [start, stop) of the global batch of `total` images this process holds."""

    start: int
    stop: int
    total: int


@attrs.frozen
class Progress:
    """Where training stands; everything counts from 0."""

    step: int
    epoch: int
    epochs: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @classmethod
    def at(cls, step: int, epochs: int, steps_per_epoch: int) -> Progress:
        return cls(step, step // steps_per_epoch, epochs, steps_per_epoch)


def start_epoch(start: float, epochs: int) -> int:
    """The epoch T, counted from 1, that a `start` setting means: a fraction of training up to 1, an epoch beyond."""
    return max(1, int(start * epochs + 0.5)) if start <= 1 else int(start)


@attrs.frozen
class Passes:
    """Passes over the batch; in units of one forward an input-only backward is 1, a parameter backward 2.

    A pass over half of the images is half a pass.
    """

    forward: float = 0
    input_backward: float = 0
    parameter_backward: float = 0

    @property
    def units(self) -> float:
        return self.forward + self.input_backward + 2 * self.parameter_backward

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.input_backward + other.input_backward,
            self.parameter_backward + other.parameter_backward,
        )

    def __mul__(self, share: float) -> Passes:
        return Passes(self.forward * share, self.input_backward * share, self.parameter_backward * share)
