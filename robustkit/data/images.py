"""Labelled pictures, addressed by row. Kept as uint8, a quarter of the memory of float32."""

from __future__ import annotations

from typing import Protocol

import attrs
import torch
from torch import Tensor

from robustkit.core.errors import DataError
from robustkit.core.order import Mixture

CHUNK = 4096
"""Images that are moved to a device at once."""


class Images(Protocol):
    """N pictures of C x H x W pixels with their labels."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor) -> Tensor:
        """The pictures in rows `index` (B,), int64 on the CPU: (B, C, H, W) uint8 0..255, on whichever device."""


@attrs.frozen(eq=False)
class InMemory:
    """Images held as one tensor: `pixels` (N, C, H, W) uint8 on any device, `labels` (N,) int64 on the CPU.

    Raises:
        DataError: the tensors are not so.
    """

    pixels: Tensor
    labels: Tensor

    def __attrs_post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise DataError(
                f"pixels must be (N, C, H, W) uint8, got {tuple(self.pixels.shape)} {self.pixels.dtype}",
                remedy="scale them to whole numbers 0..255",
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise DataError(
                f"labels must be ({len(self.pixels)},) int64, got {tuple(self.labels.shape)} {self.labels.dtype}",
                remedy="give one class number for each image",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, index: Tensor) -> Tensor:
        return self.pixels[index.to(self.pixels.device, non_blocking=True)]

    def to(self, device: torch.device | str) -> InMemory:
        """The same images with their pixels on `device`; batches are then cut out there."""
        return InMemory(self.pixels.to(device), self.labels)


@attrs.frozen(eq=False)
class Joined:
    """The images of `first`, and after them those of `second`, of the same shape."""

    first: Images
    second: Images
    labels: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "labels", torch.cat([self.first.labels, self.second.labels]))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.first.shape

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: Tensor) -> Tensor:
        later = index >= len(self.first)
        pixels = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        pixels[~later] = self.first.fetch(index[~later]).cpu()
        pixels[later] = self.second.fetch(index[later] - len(self.first)).cpu()
        return pixels


def resident(images: Images, device: torch.device) -> InMemory:
    """The same images with all their pixels on `device`, fetched piece by piece; batches are then cut out there."""
    if isinstance(images, InMemory):
        return images.to(device)
    pixels = torch.empty(len(images), *images.shape, dtype=torch.uint8, device=device)
    for rows in torch.split(torch.arange(len(images)), CHUNK):
        pixels[int(rows[0]) : int(rows[-1]) + 1] = images.fetch(rows)
    return InMemory(pixels, images.labels)


@attrs.frozen(eq=False)
class Data:
    """Training and test images, and the K names of the classes. `copy` says in which form published data were found.

    `mixture`: which of the training images are synthetic, and how many of them a batch has; None: there are none.

    Raises:
        DataError: a label is out of range, the two parts differ in image shape, are empty, or are not uint8; or a
            mixture has images of one source only.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    copy: str = "the original files"
    mixture: Mixture | None = None

    @property
    def own(self) -> int:
        """So many training images, the first ones, are the data set's own."""
        return len(self.train) if self.mixture is None else self.mixture.own

    def __attrs_post_init__(self) -> None:
        for part, images in (("train", self.train), ("test", self.test)):
            if len(images) == 0:
                raise DataError("there are no images", place=f"data.{part}", remedy="give at least one")
            wrong = ((images.labels < 0) | (images.labels >= len(self.classes))).nonzero()
            if len(wrong):
                row = int(wrong[0])
                raise DataError(
                    f"label {int(images.labels[row])} of image {row} is not one of 0..{len(self.classes) - 1}",
                    place=f"data.{part}",
                    remedy=f"mend the label, or name more than {len(self.classes)} classes",
                )
            sample = images.fetch(torch.zeros(1, dtype=torch.int64))
            if sample.dtype != torch.uint8:
                raise DataError(
                    f"images are {sample.dtype}, not uint8", place=f"data.{part}", remedy="scale them to 0..255"
                )
        if self.mixture is not None and not 0 < self.mixture.own < len(self.train):
            raise DataError(
                f"{self.mixture.own} of {len(self.train)} images are the data set's own: nothing to mix",
                place="data.train",
                remedy="leave out the mixture",
            )
        if self.train.shape != self.test.shape:
            raise DataError(
                f"training images are {describe(self.train.shape)}, test images {describe(self.test.shape)}",
                place="data",
                remedy="bring all images to one size",
            )


def first_per_class(data: Data, count: int | None) -> Data:
    """The first `count` training images of each class (None: all of them); the test images as they are.

    Raises:
        DataError: a class has fewer.
    """
    if count is None:
        return data
    labels = data.train.labels
    fewest = int(labels.bincount(minlength=len(data.classes)).min())
    if fewest < count:
        raise DataError(f"a class has only {fewest} training images", place="data.per_class", remedy=f"1..{fewest}")
    rows = torch.cat([(labels == number).nonzero().squeeze(1)[:count] for number in range(len(data.classes))])
    return attrs.evolve(data, train=InMemory(data.train.fetch(rows), labels[rows]))


def describe(shape: tuple[int, ...]) -> str:
    """(3, 32, 32) -> '3x32x32'."""
    return "x".join(map(str, shape))
