"""From a row number to a batch.

`Data` holds two `Images`: N pictures of C x H x W pixels kept as uint8 0..255, labels (N,) int64 in [0, K), and
`fetch(rows)`. Rows are the only names images have: a batch carries the row of each of its images in the training set
before any split, so that strategies can remember things about single images. `make_batch` turns rows into a `Batch` of
float32 pixels in [0, 1] on the device; normalisation belongs to the model. The order of rows is decided elsewhere
(`core.order`), and which of them are held out for validation in `validation_split`. Which images there are is the
business of `robustkit.datasets`.

Images are in memory (`InMemory`), in a file (`Stored`), or one set after another (`Joined`). Where pixels are not on
the device already, a thread fetches the next batch while the present one is worked on (`Ahead`).
"""

from robustkit.data.ahead import Ahead
from robustkit.data.augment import Augmentation
from robustkit.data.images import Data, Images, InMemory, Joined
from robustkit.data.loader import make_batch, validation_split
from robustkit.data.stored import Stored

__all__ = ["Ahead", "Augmentation", "Data", "Images", "InMemory", "Joined", "Stored", "make_batch", "validation_split"]
