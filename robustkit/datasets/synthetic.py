"""Noise with a pattern for each class: data of any shape at once, for smoke runs and tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustkit.core.registry import registry
from robustkit.core.rng import derive
from robustkit.core.spec import setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory

GRID = 4
"""A class's pattern has GRID x GRID tiles."""


@registry("dataset").register("synthetic")
@spec
class Synthetic:
    """Random images of any shape with a tile pattern for each class, made up on the spot.

    Each image is the mean of its class's pattern and uniform noise, which small nets learn within a few steps. Classes
    take turns, so they are equally frequent. The images depend on the settings alone.
    """

    train: int = setting(default=256, at_least=1)
    test: int = setting(default=64, at_least=1)
    classes: int = setting(default=10, at_least=1)
    size: int = setting(default=32, at_least=1)
    channels: int = setting(default=3, at_least=1)
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (self.channels, self.size, self.size), self.classes

    def load(self) -> Data:
        """Images (N, channels, size, size)."""
        generator = torch.Generator().manual_seed(derive(0, "synthetic"))
        tiles = torch.rand(self.classes, self.channels, GRID, GRID, generator=generator)
        patterns = F.interpolate(tiles, (self.size, self.size), mode="nearest")
        train, test = (_draw(patterns, count, generator) for count in (self.train, self.test))
        return Data(train, test, tuple(map(str, range(self.classes))))


def _draw(patterns: Tensor, count: int, generator: torch.Generator) -> InMemory:
    labels = torch.arange(count) % len(patterns)
    noise = torch.rand(count, *patterns.shape[1:], generator=generator)
    return InMemory(((patterns[labels] + noise) * (255 / 2)).round().to(torch.uint8), labels)
