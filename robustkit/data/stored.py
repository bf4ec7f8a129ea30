"""Images in a file: sets that do not fit in memory."""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from robustkit.core.errors import DataError


@attrs.frozen(eq=False)
class Stored:
    """Images in a .npy file of (N, C, H, W) uint8, of which a batch reads the rows that it needs; `labels` (N,) int64.

    They are read, not mapped: what a process holds stays as small as a batch, and a file that is cut off or goes away
    while it is used is an error, not the end of the process. Each `fetch` opens the file for itself, so that threads
    and processes share nothing.

    Raises:
        DataError: the file is missing, truncated, or not such an array.
    """

    path: Path
    labels: Tensor
    shape: tuple[int, int, int] = attrs.field(init=False)
    _start: int = attrs.field(init=False)  # byte at which the first picture begins

    def __attrs_post_init__(self) -> None:
        remedy = "delete the file: it is made anew"
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot be read ({error})", place=str(self.path), remedy=remedy) from error
        if array.dtype != np.uint8 or array.ndim != 4 or not array.flags.c_contiguous or len(array) != len(self.labels):
            found = f"{array.shape} {array.dtype}"
            raise DataError(f"must be ({len(self.labels)}, C, H, W) uint8, got {found}", place=str(self.path))
        object.__setattr__(self, "shape", tuple(array.shape[1:]))
        object.__setattr__(self, "_start", array.offset)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: Tensor) -> Tensor:
        size = math.prod(self.shape)
        pictures = np.empty((len(index), size), np.uint8)
        rows = index.tolist()
        try:
            with open(self.path, "rb", buffering=0) as file:
                for place in sorted(range(len(rows)), key=rows.__getitem__):  # in the order of the disk
                    file.seek(self._start + rows[place] * size)
                    if file.readinto(pictures[place]) != size:
                        raise EOFError(f"it ends before image {rows[place]}")
        except (OSError, EOFError) as error:
            remedy = "put it back; a run goes on with robustkit resume"
            raise DataError(f"cannot be read any more ({error})", place=str(self.path), remedy=remedy) from error
        return torch.from_numpy(pictures.reshape(len(rows), *self.shape))
