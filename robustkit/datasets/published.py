"""Published data sets that torchvision reads: found on disk in either of two shapes, or fetched."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

from robustkit.core.errors import DataError
from robustkit.data.images import Data, describe
from robustkit.datasets.image_folder import read_image_folder
from robustkit.datasets.location import Sought

LARGEST = 256 << 20
"""Bytes of a file; SVHN's training images have 182 million."""


def load_published(
    title: str,
    read: Callable[[Path, bool], Data],
    sought: Sought,
    *,
    download: bool,
    facts: tuple[tuple[int, int, int], int],
) -> Data:
    """`read(folder, download)` where all of torchvision's files lie, else an image folder, else a download.

    Raises:
        DataError: the data are neither there nor to be had, are damaged, or are not what `facts` says.
    """
    folder, form, files = sought.folder, sought.form(), " and ".join(sought.files)
    looked = f"{files}{', or train/ and test/,' if sought.or_folder else ''} in {folder.resolve()}"
    elsewhere = f"set data.root or {sought.variable} to a folder that holds them"
    if form == "the original files":
        _refuse_large(folder, sought.files)
        data = _attempt(read, folder, False, f"{title} in {folder} is damaged", f"delete {files} there")
    elif form is not None:
        data = attrs.evolve(read_image_folder(folder), copy=form)
    elif download:
        data = _attempt(read, folder, True, f"{title} is not there (no {looked}) and cannot be downloaded", elsewhere)
    else:
        raise DataError(f"{title} is not there (no {looked})", remedy=f"{elsewhere}, or data.download=true")
    refuse_others(data, title, facts, folder)
    return data


def refuse_others(data: Data, title: str, facts: tuple[tuple[int, int, int], int], folder: Path) -> None:
    """Whatever else was found in `folder`.

    Raises:
        DataError: image shape or number of classes are not those of `facts`.
    """
    shape, classes = facts
    if (data.train.shape, len(data.classes)) != facts:
        raise DataError(
            f"{describe(data.train.shape)} images of {len(data.classes)} classes are not {title} "
            f"({describe(shape)}, {classes} classes)",
            place=str(folder),
            remedy="use data=image-folder for other pictures",
        )


def _refuse_large(folder: Path, files: tuple[str, ...]) -> None:
    """torchvision reads a file whole to compare its checksum, before anything in it is unpickled."""
    for found in (path for file in files for path in [folder / file, *(folder / file).glob("*")]):
        if found.is_file() and found.stat().st_size > LARGEST:
            remedy = "put back the published file"
            raise DataError(f"is larger than {LARGEST >> 20} MiB", place=str(found), remedy=remedy)


def _attempt(read: Callable[[Path, bool], Data], folder: Path, download: bool, fault: str, remedy: str) -> Data:
    """Whatever torchvision raises (there is no list) becomes one line; what it prints stays out of standard output."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return read(folder, download)
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{fault} ({reason})", remedy=remedy) from error
