"""From row numbers to a batch: one indexing, one copy, one division, one augmentation; no worker processes."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.core.batch import Batch
from robustkit.core.errors import DataError
from robustkit.core.rng import Generator, derive
from robustkit.data.augment import Augmentation, augment
from robustkit.data.images import Images


def make_batch(
    images: Images,
    index: Tensor,
    *,
    device: torch.device,
    augmentation: Augmentation | None = None,
    generator: Generator | None = None,
) -> Batch:
    """The images in rows `index` (B,), int64 on the CPU, as a batch on `device`.

    An augmentation needs a generator whose part are these B rows.

    Returns:
        x (B, C, H, W) float32 in [0, 1], y (B,) int64, index (B,) int64, all on `device`.
    """
    x = images.fetch(index).to(device, non_blocking=True).float().div_(255)
    if augmentation is not None:
        if generator is None:
            raise ValueError("an augmentation needs a generator")
        x = augment(x, augmentation, generator)
    y = images.labels[index].to(device, non_blocking=True)
    return Batch(x, y, index.to(device, non_blocking=True))


def validation_split(samples: int, count: int) -> tuple[Tensor, Tensor]:
    """Which of `samples` training images to train on, and which `count` to hold out.

    The permutation behind it depends on `samples` alone, so that all runs hold out the same images and a larger split
    contains a smaller one.

    Returns:
        (training rows, validation rows), each sorted, int64 on the CPU.

    Raises:
        DataError: nothing would be left to train on.
    """
    if not 0 <= count < samples:
        raise DataError(
            f"cannot hold out {count} of {samples} training images", place="validation", remedy=f"0..{samples - 1}"
        )
    permutation = torch.randperm(samples, generator=torch.Generator().manual_seed(derive(0, "validation", samples)))
    return permutation[count:].sort().values, permutation[:count].sort().values
