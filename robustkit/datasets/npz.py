"""Images published as one npz file, turned once into a file of which single images can be read.

An npz file is a zip archive: to see one image, all before it must be unpacked. Nothing in the file is unpickled, and
neither unpacking nor converting holds more than a piece of it.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from robustkit.core.checkpoint import replace
from robustkit.core.errors import DataError, UserError, visible
from robustkit.core.reading import open_file
from robustkit.data.stored import Stored, array_header

CHUNK = 8 << 20
"""Bytes that are converted at once."""
MOST = 1 << 26
"""Images in a file: their labels are held in memory."""
BOMB, RATIO = 256 << 20, 100
"""Images of so many bytes, packed to less than the hundredth part, are no pictures."""


def read_npz(path: Path, cache: Path | None = None) -> Stored:
    """The pictures of an npz file that holds `image` (N, H, W, C) uint8 and `label` (N,) whole numbers.

    Args:
        cache: folder for the converted copy, as large as the unpacked images (default: beside the file). Its name
            carries the checksum of the images, so that another file is never taken for this one.

    Raises:
        DataError: the file is no such archive or is damaged, or the copy cannot be written.
    """
    with _understood(path), open_file(path) as file, zipfile.ZipFile(file) as archive:
        images, labels = (_member(archive, name, path) for name in ("image", "label"))
        with archive.open(images) as pixels, archive.open(labels) as numbers:
            shape = _shape(pixels, images, path)
            known = _labels(numbers, shape[0], path)
            target = (cache or path.parent) / f"{path.stem}-{images.CRC:08x}.npy"
            if not target.exists():
                _convert(pixels, shape, target, path)
    return Stored(target, known)


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        held = ", ".join(visible(found.removesuffix(".npy")[:40]) for found in archive.namelist()[:8]) or "nothing"
        raise DataError(
            f"holds no '{name}', but {held}", place=str(path), remedy="expected are 'image' and 'label'"
        ) from None


def _shape(stream: IO[bytes], member: zipfile.ZipInfo, path: Path) -> tuple[int, ...]:
    """(N, H, W, C) of the pictures that follow in `stream`."""
    shape, fortran, dtype = array_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or min(shape) < 1 or fortran:
        order = " in Fortran order" if fortran else ""
        raise DataError(f"'image' must be (N, H, W, C) uint8, got {shape} {dtype}{order}", place=str(path))
    if member.file_size != stream.tell() + math.prod(shape):
        raise DataError(f"'image' is not as long as {shape} asks for", place=str(path), remedy="fetch the file again")
    if shape[0] > MOST:
        raise DataError(f"holds {shape[0]:,} images, more than {MOST:,}", place=str(path), remedy="split it")
    if member.file_size > max(BOMB, RATIO * member.compress_size):
        fault = f"'image' unpacks to {member.file_size / member.compress_size:,.0f} times its size: no pictures do"
        raise DataError(fault, place=str(path))
    return shape


def _labels(stream: IO[bytes], count: int, path: Path) -> torch.Tensor:
    """(N,) int64."""
    shape, _, dtype = array_header(stream)
    if dtype.kind not in "iu" or shape != (count,):
        raise DataError(f"'label' must be ({count},) whole numbers, got {shape} {dtype}", place=str(path))
    labels, rows = np.empty(count, np.int64), max(1, CHUNK // dtype.itemsize)
    for start in range(0, count, rows):
        part = labels[start : start + rows]
        data = stream.read(len(part) * dtype.itemsize)
        if len(data) != len(part) * dtype.itemsize:
            break
        part[:] = np.frombuffer(data, dtype)
    if len(data) != len(part) * dtype.itemsize or stream.read(1):
        raise DataError(f"'label' is not as long as {shape} asks for", place=str(path), remedy="fetch the file again")
    return torch.from_numpy(labels)


def _convert(stream: IO[bytes], shape: tuple[int, ...], target: Path, path: Path) -> None:
    """Writes the pictures that follow in `stream`, channels first; `target` is there when they all are."""
    count, height, width, channels = shape
    size = height * width * channels
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, channels, height, width)}
    with _writable(target, count * size):
        target.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(target.parent).free < count * size:
            raise OSError(errno.ENOSPC, "there is no room for them")
        file = partial.open("xb")
    try:
        with file:
            with _writable(target, count * size):
                np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, rows := max(1, CHUNK // size)):
                wanted = min(rows, count - start) * size
                data = stream.read(wanted)
                if len(data) != wanted:
                    raise DataError("ends too early", place=str(path), remedy="fetch the file again")
                pictures = np.frombuffer(data, np.uint8).reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
                with _writable(target, count * size):
                    file.write(np.ascontiguousarray(pictures).data)
            stream.read(1)  # the end: the archive's checksum is compared here
        with _writable(target, count * size):
            replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Whatever zipfile, zlib and numpy raise (there is no list) becomes one line."""
    try:
        yield
    except DataError:
        raise
    except UserError as error:
        raise DataError(error.fault, place=str(path)) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(
            f"is no npz file that can be read ({reason})", place=str(path), remedy="fetch it again"
        ) from error


@contextmanager
def _writable(target: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the converted images, {size / 1e9:.1f} GB ({error.strerror or error})",
            place=os.fspath(target.parent),
            remedy="make room, or set data.cache to a folder that can be written to",
        ) from error
