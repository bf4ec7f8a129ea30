"""Where test images come from: tensors, a data set, a loader, or robustkit's own; read a slice at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from robustkit.core.errors import DataError
from robustkit.data.images import Images


class Source(Protocol):
    """N test images with their labels."""

    def __len__(self) -> int: ...

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) float32, meant to be in [0, 1], and y (B,) int64, of the rows (B,), on the CPU."""


class OwnImages:
    """Robustkit's images: 8-bit pixels, divided by 255."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._images.fetch(rows).float().div_(255), self._images.labels[rows]


class Tensors:
    """Images (N, C, H, W) floating point and labels (N,) integer, as they are."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        check_images(images)
        check_labels(labels, len(images))
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = self._images[rows.to(self._images.device)].detach().float()
        return x, self._labels[rows.to(self._labels.device)].long()


class Samples:
    """A data set of (image, label) pairs, read when needed: only the slice at hand is in memory."""

    def __init__(self, samples: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
            raise DataError(
                f"{type(samples).__name__} cannot be read by row number",
                place="images",
                remedy="give tensors, or a data set with __len__ and __getitem__",
            )
        if len(samples) == 0:
            raise DataError("there are no images", place="images", remedy="give at least one")
        self._samples, self._collate = samples, collate

    def __len__(self) -> int:
        return len(self._samples)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        try:
            x, y = self._collate([self._samples[row] for row in rows.tolist()])[:2]
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"samples are not pairs of an image tensor and a label: {str(error).splitlines()[0]}",
                place="images",
                remedy="e.g. torchvision's CIFAR10(..., transform=ToTensor())",
            ) from error
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise DataError("samples are not pairs of an image tensor and a label", place="images")
        check_images(x, rows)
        check_labels(y, len(x))
        return x.detach().float(), y.long()


def source_of(images: Any, labels: Any = None) -> Source:
    """A source from what users have.

    Args:
        images: (N, C, H, W) floating point in [0, 1] with `labels` (N,); or, without labels, a data set of pairs, a
            DataLoader over one (its data set is read in order: no shuffling, no dropped rest), or robustkit's Images.

    Raises:
        DataError: it is none of these, or empty.
    """
    if labels is not None:
        if not isinstance(images, Tensor):
            images = torch.as_tensor(images)
        return Tensors(images, labels if isinstance(labels, Tensor) else torch.as_tensor(labels))
    if isinstance(images, Tensor):
        raise DataError("labels are missing", place="labels", remedy="give one class number for each image")
    if isinstance(images, DataLoader):
        collate = images.collate_fn if images.batch_size is not None else default_collate
        return Samples(images.dataset, collate)
    if hasattr(images, "fetch") and hasattr(images, "labels"):
        return OwnImages(images)
    return Samples(images)


def check_images(images: Tensor, rows: Tensor | None = None) -> None:
    """Raises DataError where `images`, in rows (B,) of the test set, are not pictures in [0, 1]."""
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise DataError(
            f"must be (N, C, H, W) floating point, N >= 1, got {tuple(images.shape)} {images.dtype}",
            place="images",
            remedy="divide 8-bit pixels by 255",
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        flat = images.flatten(1)
        row = _first_row(~((flat >= 0) & (flat <= 1)).all(dim=1), rows)
        raise DataError(
            f"pixels must be in [0, 1], but range from {low:g} to {high:g} (first in image {row})",
            place="images",
            remedy="divide 8-bit pixels by 255, and put normalisation inside the model",
        )


def check_labels(labels: Tensor, count: int, classes: int | None = None, rows: Tensor | None = None) -> None:
    """Raises DataError where `labels`, in rows (B,) of the test set, are not `count` numbers below `classes`."""
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"must be ({count},) whole numbers, got {tuple(labels.shape)} {labels.dtype}",
            place="labels",
            remedy="give one class number for each image",
        )
    wrong = (labels < 0) | (labels >= (labels.max() + 1 if classes is None else classes))
    if wrong.any():
        row = _first_row(wrong, rows)
        label = int(labels[int(wrong.nonzero()[0])])
        known, remedy = "a class number", "classes count from 0"
        if classes is not None:
            known, remedy = f"one of 0..{classes - 1}", f"the model has {classes} logits: is it for these data?"
        raise DataError(
            f"label {label} of image {row} is not {known}",
            place="labels",
            remedy=remedy,
        )


def _first_row(flags: Tensor, rows: Tensor | None) -> int:
    at = int(flags.nonzero()[0])
    return at if rows is None else int(rows[at])
