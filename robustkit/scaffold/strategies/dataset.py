"""New strategy: which images?"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from robustkit import registry, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory

__all__ = ["NewStrategy"]

TEST_IMAGES = 360


@registry("dataset").register("new-strategy")
@spec
class NewStrategy:
    """Even or odd? scikit-learn's handwritten digits, 8x8 grey, in two classes; the last 360 are for the test."""

    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (1, 8, 8), 2

    def load(self) -> Data:
        digits = load_digits()
        pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target.astype(np.int64)) % 2
        train = InMemory(pixels[:-TEST_IMAGES], labels[:-TEST_IMAGES])
        test = InMemory(pixels[-TEST_IMAGES:], labels[-TEST_IMAGES:])
        return Data(train, test, ("even", "odd"))
