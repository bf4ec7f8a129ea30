"""Handwritten digits that come with scikit-learn: no download, one second to an accuracy that means something."""

from __future__ import annotations

import numpy as np
import torch

from robustkit.core.registry import registry
from robustkit.core.spec import spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory

TEST_IMAGES = 360


@registry("dataset").register("digits")
@spec
class Digits:
    """Handwritten digits, 8x8 grey, embedded in scikit-learn.

    1,797 images of 10 classes (UCI "Optical Recognition of Handwritten Digits", the test half), values 0..16 scaled to
    0..255. 1,437 are for training; 360, drawn once and for all with equal shares of the classes, for the test.
    """

    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (1, 8, 8), 10

    def load(self) -> Data:
        """Images (N, 1, 8, 8)."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        labels = torch.from_numpy(digits.target.astype(np.int64))
        pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        split = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
        train, test = (InMemory(pixels[rows], labels[rows]) for rows in map(np.sort, split))
        return Data(train, test, tuple(map(str, range(10))))
