"""A data set, and generated images beside its own."""

from __future__ import annotations

from pathlib import Path

import attrs

from robustkit.core.errors import DataError
from robustkit.core.order import Mixture
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.core.strategy import Dataset
from robustkit.data.augment import Augmentation
from robustkit.data.images import Data, Joined, describe
from robustkit.datasets.cifar import Cifar10
from robustkit.datasets.location import locate
from robustkit.datasets.npz import read_npz

PUBLISHED = "github.com/google-deepmind/deepmind-research, adversarial_robustness (cifar10_ddpm.npz, ...)"
"""Who has files (Rebuffi et al. 2021)."""


@registry("dataset").register("with-synthetic")
@spec
class WithSynthetic:
    """A data set with generated training images after its own (Rebuffi et al. 2021; UIAT, CVPR 2023, Table 4).

    The share `original` of each batch are images of `inner`; see `core.order.Mixture`. Only they are held out for
    validation. `file` is an npz file of `image` (N, H, W, C) uint8 and `label` (N,), looked for in `root`, else
    ROBUSTKIT_DATA_DIR, else ./data, and converted once into `cache` (default: beside it).
    """

    inner: Dataset = Cifar10()
    file: str = "cifar10_ddpm.npz"
    original: float = setting(default=0.3, above=0, below=1)
    root: str | None = setting(default=None, location=True)
    cache: str | None = setting(default=None, location=True)

    @property
    def augmentation(self) -> Augmentation | None:
        return self.inner.augmentation

    @property
    def augment(self) -> str:
        """What `augmentation` is called."""
        return getattr(self.inner, "augment", "none")

    @property
    def facts(self) -> tuple[tuple[int, int, int] | None, int | None]:
        return self.inner.facts

    def load(self) -> Data:
        path = locate(self.root) / self.file
        if not path.is_file():
            raise DataError(
                "there is no such file of synthetic images",
                place=str(path),
                remedy="put an npz file of 'image' (N, H, W, C) uint8 and 'label' (N,) there, or set data.root; "
                f"one million for CIFAR and SVHN each are listed at {PUBLISHED}",
            )
        data = self.inner.load()
        synthetic = read_npz(path, None if self.cache is None else Path(self.cache).expanduser())
        if synthetic.shape != data.train.shape:
            raise DataError(
                f"images are {describe(synthetic.shape)}, those of the data set {describe(data.train.shape)}",
                place=str(path),
                remedy="take the file that was made for these images",
            )
        wrong = ((synthetic.labels < 0) | (synthetic.labels >= len(data.classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"label {int(synthetic.labels[row])} of image {row} is not one of 0..{len(data.classes) - 1}",
                place=str(path),
                remedy="take the file that was made for these classes",
            )
        mixture = Mixture(own=len(data.train), share=self.original)
        return attrs.evolve(data, train=Joined(data.train, synthetic), mixture=mixture)
