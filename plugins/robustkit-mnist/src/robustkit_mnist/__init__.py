"""MNIST and two data sets of its shape for robustkit: 60,000 training and 10,000 test images, 28x28 grey, 10 classes.

The three differ in what they show, in their names and in nothing else: torchvision's files are read by `_load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch.nn.functional as F

from robustkit import registry, setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory
from robustkit.datasets.location import Sought
from robustkit.datasets.published import load_published

__all__ = ["FashionMnist", "Kmnist", "Mnist"]
__version__ = "0.1.0"

Size = Literal[28, 32]
"""Pixels of a side. 32: two rows of zeros around the image, for networks made for CIFAR."""


@registry("dataset").register("mnist")
@spec
class Mnist:
    """MNIST, handwritten digits, 28x28 grey, 10 classes, 60,000 training and 10,000 test images (LeCun et al. 1998).

    Looked for in `root`, else ROBUSTKIT_MNIST_DIR, else ROBUSTKIT_DATA_DIR, else ./data, as torchvision's files
    (MNIST/raw/train-images-idx3-ubyte, ...); downloaded there if `download`. `size` 32 adds two rows of zeros around
    the image. A mirrored digit is no digit: leave `augment` without a flip.
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    size: Size = 28
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (1, self.size, self.size), 10

    @property
    def sought(self) -> Sought:
        return _sought(self.root, "MNIST")

    def load(self) -> Data:
        """Images (N, 1, size, size); class k is digit k."""
        return _load("MNIST", "MNIST", self.sought, self.size, download=self.download)


@registry("dataset").register("fashion-mnist")
@spec
class FashionMnist:
    """Fashion-MNIST, clothes, 28x28 grey, 10 classes, 60,000 training and 10,000 test images (Xiao et al. 2017).

    Looked for as MNIST is, in `root`, else ROBUSTKIT_FASHIONMNIST_DIR, ...: FashionMNIST/raw/train-images-idx3-ubyte,
    ... .
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    size: Size = 28
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (1, self.size, self.size), 10

    @property
    def sought(self) -> Sought:
        return _sought(self.root, "FashionMNIST")

    def load(self) -> Data:
        """Images (N, 1, size, size)."""
        return _load("Fashion-MNIST", "FashionMNIST", self.sought, self.size, download=self.download)


@registry("dataset").register("kmnist")
@spec
class Kmnist:
    """Kuzushiji-MNIST, cursive Japanese, 28x28 grey, 10 classes, 60,000 and 10,000 images (Clanuwat et al. 2018).

    Looked for as MNIST is, in `root`, else ROBUSTKIT_KMNIST_DIR, ...: KMNIST/raw/train-images-idx3-ubyte, ... .
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    size: Size = 28
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (1, self.size, self.size), 10

    @property
    def sought(self) -> Sought:
        return _sought(self.root, "KMNIST")

    def load(self) -> Data:
        """Images (N, 1, size, size)."""
        return _load("Kuzushiji-MNIST", "KMNIST", self.sought, self.size, download=self.download)


def _sought(root: str | None, source: str) -> Sought:
    """Four files, in the folder that torchvision gives its class `source`."""
    files = (f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
    paths = tuple(f"{source}/raw/{file}" for file in files)
    return Sought(root, f"ROBUSTKIT_{source.upper()}_DIR", paths, or_folder=False)


def _load(title: str, source: str, sought: Sought, size: int, *, download: bool) -> Data:
    """Both parts from torchvision's class `source`: its files are numbers, of which nothing is unpickled."""
    from torchvision import datasets

    margin = (size - 28) // 2

    def read(folder: Path, download: bool) -> Data:
        parts = [getattr(datasets, source)(folder, train=train, download=download) for train in (True, False)]
        train, test = (InMemory(F.pad(part.data[:, None], [margin] * 4), part.targets) for part in parts)
        names = range(10) if source == "MNIST" else parts[0].classes
        return Data(train, test, tuple(map(str, names)))

    return load_published(title, read, sought, download=download, facts=((1, size, size), 10))
