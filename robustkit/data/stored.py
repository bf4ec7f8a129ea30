"""Images in a file: sets that do not fit in memory."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import IO, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from robustkit.core.errors import DataError, UserError
from robustkit.core.reading import open_file

LONGEST_HEADER = 10_000
"""Bytes of an array's header, as numpy has it; it would read 4 GB before it counts them."""


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
            with open_file(self.path) as file:
                shape, fortran, dtype = array_header(file)
                start, end = file.tell(), file.seek(0, os.SEEK_END)
        except UserError as error:
            raise DataError(error.fault, place=str(self.path), remedy=remedy) from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot be read ({str(error)[:300]})", place=str(self.path), remedy=remedy) from error
        if dtype != np.uint8 or len(shape) != 4 or fortran or shape[0] != len(self.labels) or min(shape) < 1:
            found = f"{shape} {dtype}"
            raise DataError(f"must be ({len(self.labels)}, C, H, W) uint8, got {found}", place=str(self.path))
        if end != start + math.prod(shape):
            fault = f"cannot be read (it has {end:,} bytes, {shape} asks for {start + math.prod(shape):,})"
            raise DataError(fault, place=str(self.path), remedy=remedy)
        object.__setattr__(self, "shape", shape[1:])
        object.__setattr__(self, "_start", start)

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


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran order, and type of the .npy array that begins here; `stream` is after its header.

    A type that would have to be unpickled is told as `object`.

    Raises:
        ValueError: no array begins here.
    """
    began = stream.tell()
    beginning = io.BytesIO(stream.read(LONGEST_HEADER))
    if not beginning.getvalue().startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("no array begins here")  # numpy would show what does
    version = np.lib.format.read_magic(beginning)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(beginning)
    stream.seek(began + beginning.tell())
    return shape, fortran, dtype
