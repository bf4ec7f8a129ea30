"""Your own pictures: one folder for each class."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import attrs
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from robustkit.core.errors import DataError
from robustkit.core.registry import registry
from robustkit.core.spec import setting, spec
from robustkit.data.augment import Augment, Augmentation, Padding, augmentation
from robustkit.data.images import Data, Images, InMemory, describe
from robustkit.datasets.location import locate

HELD_BYTES = 4 << 30
"""Pictures of so many bytes, decoded, are held in memory; of larger sets each batch decodes its own."""
CHUNK = 16
"""Pictures that a thread decodes before it looks for more."""
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, whatever a file is called. Pillow would hand others to further programs: EPS to Ghostscript."""
MOST_PIXELS = 1 << 26
"""Of a picture: 67 million, 8192 x 8192."""
LARGE = 1 << 24
"""Pictures of more pixels are decoded one at a time: threads together hold no more than a few of them."""
_large = threading.Lock()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we have a limit, and an error, of our own
TINY = 8192
"""Decoders release Python's lock, but files of fewer bytes than this are decoded faster by one thread than by two."""


@registry("dataset").register("image-folder")
@spec
class ImageFolder:
    """Your own pictures: root/train/<class>/<file> and root/test/<class>/<file>, or root/<class>/<file>.

    `test` may be called `val`. Without any of them the share `test_share` of each class's pictures, one
    at least, become test pictures; their names decide which, so that pictures added later move few. Classes are the
    sorted folder names, rows the sorted files. Pictures are RGB, or one channel if `grey`, upright and with
    transparency over white; sets of up to 4 GiB are held in memory, of larger ones each batch decodes its own. With
    `size`, the shorter side is resized and the middle size x size pixels are kept; without it, all pictures must be
    equally large.
    """

    root: str | None = setting(default=None, location=True)
    size: int | None = setting(default=None, at_least=1)
    grey: bool = False
    test_share: float = setting(default=0.2, above=0, below=1)
    augment: Augment = "none"
    padding: Padding = "zero"

    @property
    def augmentation(self) -> Augmentation | None:
        return augmentation(self.augment, self.padding)

    @property
    def facts(self) -> tuple[tuple[int, int, int] | None, None]:
        return (None if self.size is None else (1 if self.grey else 3, self.size, self.size)), None

    def load(self) -> Data:
        return read_image_folder(locate(self.root), self.size, self.grey, self.test_share)


def read_image_folder(root: Path, size: int | None = None, grey: bool = False, test_share: float = 0.2) -> Data:
    """All pictures in `root`; see `ImageFolder`.

    Raises:
        DataError: a folder is missing or empty, a file is no picture, sizes differ, or the test has unknown classes.
    """
    if root.is_dir() and not any((root / name).is_dir() for name in ("train", "test", "val")) and _folders(root):
        return _split(root, size, grey, test_share)
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(
                "there is no such folder",
                place=str(folder),
                remedy="set data.root to a folder that holds train/<class>/ and test/<class>/, or <class>/ alone",
            )
    classes = _folders(train)
    for name in _folders(test):
        if name not in classes:
            raise DataError(
                "a class without training images", place=str(test / name), remedy=f"remove it or add {train / name}"
            )
    for name in classes:
        if not visible(train / name):
            raise DataError("a class without pictures", place=str(train / name), remedy="fill or remove the folder")
    return Data(_read(train, classes, size, grey), _read(test, classes, size, grey), tuple(classes))


def _split(root: Path, size: int | None, grey: bool, test_share: float) -> Data:
    """Both parts of a folder that has not been split."""
    classes = _folders(root)
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for name in classes:
        files = visible(root / name)
        count = max(1, round(test_share * len(files)))
        if len(files) < 2 or count == len(files):
            remedy = "add some, or remove the folder" if len(files) < 2 else "lower data.test_share"
            raise DataError(
                f"has {len(files)} pictures: too few to train and test", place=str(root / name), remedy=remedy
            )
        ranked = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
        test[name], train[name] = sorted(ranked[:count]), sorted(ranked[count:])
    return Data(decoded(_paths(root, train), size, grey), decoded(_paths(root, test), size, grey), tuple(classes))


def _read(folder: Path, classes: list[str], size: int | None, grey: bool) -> Images:
    """One part that has a folder of its own."""
    found = {name: visible(folder / name) if (folder / name).is_dir() else [] for name in classes}
    if not any(found.values()):
        raise DataError("there are no pictures", place=str(folder), remedy="put them into <class>/<file>")
    return decoded(_paths(folder, found), size, grey)


def _paths(folder: Path, names: dict[str, list[str]]) -> list[list[Path]]:
    return [[folder / name / file for file in found] for name, found in names.items()]


def decoded(by_class: Sequence[Sequence[Path]], size: int | None = None, grey: bool = False) -> Images:
    """The picture files of each class, one at least in all; decoded now if they are few enough.

    Raises:
        DataError: a file is no picture; one that is decoded now is not as large as the first, where there is no `size`.
    """
    files = [file for found in by_class for file in found]
    labels = [label for label, found in enumerate(by_class) for _ in found]
    channels, height, width = decode(files[0], size, grey).shape
    pictures = Pictures(tuple(files), torch.tensor(labels), (channels, height, width), size, grey)
    if len(files) * channels * height * width > HELD_BYTES:
        return pictures
    return InMemory(pictures.fetch(torch.arange(len(files))), pictures.labels)


@attrs.frozen(eq=False)
class Pictures:
    """Picture files, decoded when a batch asks for them; all of them as large as the first."""

    files: tuple[Path, ...]
    labels: Tensor
    shape: tuple[int, int, int]
    size: int | None
    grey: bool

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, index: Tensor) -> Tensor:
        rows = index.tolist()
        pixels = np.empty((len(rows), *self.shape), np.uint8)

        def fill(start: int) -> None:
            for place in range(start, min(start + CHUNK, len(rows))):
                picture = decode(self.files[rows[place]], self.size, self.grey)
                if picture.shape != self.shape:
                    raise DataError(
                        f"is {describe(picture.shape)}, but {self.files[0]} is {describe(self.shape)}",
                        place=str(self.files[rows[place]]),
                        remedy=f"set data.size={min(self.shape[1:])}",
                    )
                pixels[place] = picture

        workers = 1 if _size(self.files[0]) < TINY else min(16, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(fill, range(0, len(rows), CHUNK)):
                pass
        return torch.from_numpy(pixels)


def decode(path: Path, size: int | tuple[int, int] | None = None, grey: bool = False) -> np.ndarray:
    """(C, H, W) uint8: RGB, or one channel if `grey`; the shorter side resized and the middle kept, if `size` is given.

    It is one number for squares, or (H, W). Pictures are turned upright (Exif), transparency lies over white, greys of
    16 bits become those of 8, and of moving pictures the first is taken.

    Raises:
        DataError: it is no picture that can be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")  # a pipe would be waited for
        with Image.open(path, formats=formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
            with _large if image.width * image.height > LARGE else nullcontext():
                picture = _opaque(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
                if size is not None:
                    height, width = (size, size) if isinstance(size, int) else size
                    picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise whatever they like
        gone = isinstance(error, OSError) and error.errno is not None  # decoders' own errors have no number
        remedy = "put it back; a run goes on with robustkit resume" if gone else "replace or delete it"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"is no readable picture ({reason})", place=str(path), remedy=remedy) from error
    return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opaque(image: Image.Image) -> Image.Image:
    """What Pillow would convert otherwise: it cuts greys off at 255, and drops transparency from before any colour."""
    if image.mode.startswith("I"):
        greys = np.asarray(image).astype(np.int64)
        if greys.min() < 0 or greys.max() > 65535:
            raise ValueError("greys of more than 16 bits")
        return Image.fromarray(((greys + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which nobody knows the range")
    if image.getbands()[-1] == "A" or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _size(path: Path) -> int:
    """Its bytes; 0 where it is gone, which reading it will say."""
    return path.stat().st_size if path.is_file() else 0


def _folders(folder: Path) -> list[str]:
    return [name for name in visible(folder) if (folder / name).is_dir()]


def visible(folder: Path) -> list[str]:
    """The names in a folder, sorted; hidden ones are not."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
