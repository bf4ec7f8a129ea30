"""Which images? Data sets, and the way from a row number to a batch.

A data set is a spec (see `core.spec`) that answers

    load() -> Data                      training and test images, and the names of the classes
    augmentation -> Augmentation | None what happens to each training image
    facts -> (shape | None, K | None)   image shape (C, H, W) and class count, as far as known without loading

`Data` holds two `Images`: N pictures of C x H x W pixels kept as uint8 0..255, labels (N,) int64 in [0, K), and
`fetch(rows)`. Rows are the only names images have: a batch carries the row of each of its images in the training set
before any split, so that strategies can remember things about single images. `make_batch` turns rows into a `Batch` of
float32 pixels in [0, 1] on the device; normalisation belongs to the model. The order of rows is decided elsewhere
(`core.order`), and which of them are held out for validation in `validation_split`.

One data set, one file: `digits` (no download), `cifar`, `svhn`, `image_folder` (your own pictures), `synthetic`
(noise with a pattern, for smoke runs). A new one needs `load`, `augmentation` and `facts`, and one line:
`@registry.register("name")`.
"""

from robustkit.core.registry import registry as _registry

registry = _registry("dataset")

from robustkit.data.augment import Augmentation  # noqa: E402
from robustkit.data.cifar import Cifar10, Cifar100  # noqa: E402
from robustkit.data.digits import Digits  # noqa: E402
from robustkit.data.image_folder import ImageFolder  # noqa: E402
from robustkit.data.images import Data, Images, InMemory  # noqa: E402
from robustkit.data.loader import make_batch, validation_split  # noqa: E402
from robustkit.data.svhn import SVHN  # noqa: E402
from robustkit.data.synthetic import Synthetic  # noqa: E402

__all__ = [
    "SVHN",
    "Augmentation",
    "Cifar10",
    "Cifar100",
    "Data",
    "Digits",
    "ImageFolder",
    "Images",
    "InMemory",
    "Synthetic",
    "make_batch",
    "registry",
    "validation_split",
]
