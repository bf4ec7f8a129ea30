"""CIFAR-10 and CIFAR-100: the benchmarks of nearly every paper on adversarial training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robustkit.core.errors import DataError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory, first_per_class
from robustkit.datasets.location import Sought
from robustkit.datasets.published import load_published

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@registry("dataset").register("cifar10")
@spec
class Cifar10:
    """CIFAR-10, 32x32 colour, 10 classes, 50,000 training and 10,000 test images (Krizhevsky 2009).

    Looked for in `root`, else ROBUSTKIT_CIFAR10_DIR, else ROBUSTKIT_DATA_DIR, else ./data, as torchvision's files
    (cifar-10-batches-py) or as an image folder (train/<class>/, test/<class>/); downloaded there if `download`.
    `per_class` keeps the first so many training images of each class: studies on a small budget.
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    augment: Augment = "crop-flip"
    padding: Padding = "zero"
    per_class: int | None = setting(default=None, at_least=1)

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (3, 32, 32), 10

    @property
    def sought(self) -> Sought:
        return Sought(self.root, "ROBUSTKIT_CIFAR10_DIR", ("cifar-10-batches-py",))

    def load(self) -> Data:
        """Images (N, 3, 32, 32)."""
        from torchvision.datasets import CIFAR10

        data = load_published(
            "CIFAR-10",
            lambda folder, download: _read(CIFAR10, folder, download),
            self.sought,
            download=self.download,
            facts=self.facts,
        )
        if data.classes != CIFAR10_CLASSES:  # other names would sort, and so number, the classes otherwise
            raise DataError(
                f"the classes of CIFAR-10 are called {', '.join(data.classes)}",
                remedy=f"rename the folders to {', '.join(CIFAR10_CLASSES)}",
            )
        return first_per_class(data, self.per_class)


@registry("dataset").register("cifar100")
@spec
class Cifar100:
    """CIFAR-100, 32x32 colour, 100 fine classes, 50,000 training and 10,000 test images (Krizhevsky 2009).

    Looked for in `root`, else ROBUSTKIT_CIFAR100_DIR, else ROBUSTKIT_DATA_DIR, else ./data, as torchvision's files
    (cifar-100-python) or as an image folder (train/<class>/, test/<class>/); downloaded there if `download`.
    `per_class` keeps the first so many training images of each class: studies on a small budget.
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    augment: Augment = "crop-flip-rotate"
    padding: Padding = "zero"
    per_class: int | None = setting(default=None, at_least=1)

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (3, 32, 32), 100

    @property
    def sought(self) -> Sought:
        return Sought(self.root, "ROBUSTKIT_CIFAR100_DIR", ("cifar-100-python",))

    def load(self) -> Data:
        """Images (N, 3, 32, 32)."""
        from torchvision.datasets import CIFAR100

        data = load_published(
            "CIFAR-100",
            lambda folder, download: _read(CIFAR100, folder, download),
            self.sought,
            download=self.download,
            facts=self.facts,
        )
        return first_per_class(data, self.per_class)


def _read(source: Any, folder: Path, download: bool) -> Data:
    """Both parts from torchvision's class `source`, which checks each file's checksum before it unpickles it."""
    parts = [source(folder, train=train, download=download) for train in (True, False)]
    train, test = (
        InMemory(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return Data(train, test, tuple(parts[0].classes))
