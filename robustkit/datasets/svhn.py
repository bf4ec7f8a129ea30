"""SVHN: house numbers, cropped to one digit."""

from __future__ import annotations

from pathlib import Path

import torch

from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, InMemory
from robustkit.datasets.location import Sought
from robustkit.datasets.published import load_published


@registry("dataset").register("svhn")
@spec
class SVHN:
    """Street View House Numbers, 32x32 colour, 10 digits, 73,257 training and 26,032 test images (Netzer et al. 2011).

    The "extra" images are not used. Looked for in `root`, else ROBUSTKIT_SVHN_DIR, else ROBUSTKIT_DATA_DIR, else
    ./data, as train_32x32.mat and test_32x32.mat or as an image folder; downloaded there if `download`. Papers do not
    augment it, and a mirrored digit is no digit: leave `augment` without a flip.
    """

    root: str | None = setting(default=None, location=True)
    download: bool = setting(default=True, location=True)
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int], int]:
        return (3, 32, 32), 10

    @property
    def sought(self) -> Sought:
        return Sought(self.root, "ROBUSTKIT_SVHN_DIR", ("train_32x32.mat", "test_32x32.mat"))

    def load(self) -> Data:
        """Images (N, 3, 32, 32); class k is digit k."""
        from torchvision import datasets

        def read(folder: Path, download: bool) -> Data:
            parts = (datasets.SVHN(folder, split=split, download=download) for split in ("train", "test"))
            train, test = (
                InMemory(torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels)) for part in parts
            )
            return Data(train, test, tuple(map(str, range(10))))

        return load_published(
            "SVHN",
            read,
            self.sought,
            download=self.download,
            facts=self.facts,
        )
