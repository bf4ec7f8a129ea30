"""Which images?

A data set is a spec (see `core.spec`) that answers

    load() -> Data                      training and test images, and the names of the classes
    augmentation -> Augmentation | None what happens to each training image
    facts -> (shape | None, K | None)   image shape (C, H, W) and class count, as far as known without loading

One data set, one file: `digits` (no download), `cifar`, `svhn`, `tiny_imagenet`, `image_folder` (your own pictures),
`with_synthetic` (generated images beside a data set's own), `synthetic` (noise with a pattern, for smoke runs). A new
one needs these three, and one line: `@registry.register("name")`.
"""

from robustkit.core.registry import registry as _registry
from robustkit.core.strategy import Dataset
from robustkit.datasets.cifar import Cifar10, Cifar100
from robustkit.datasets.digits import Digits
from robustkit.datasets.image_folder import ImageFolder
from robustkit.datasets.svhn import SVHN
from robustkit.datasets.synthetic import Synthetic
from robustkit.datasets.tiny_imagenet import TinyImageNet
from robustkit.datasets.with_synthetic import WithSynthetic

registry = _registry("dataset")

__all__ = [
    "SVHN",
    "Cifar10",
    "Cifar100",
    "Dataset",
    "Digits",
    "ImageFolder",
    "Synthetic",
    "TinyImageNet",
    "WithSynthetic",
    "registry",
]
