"""Small files that anybody may have written: opened without waiting, read up to a limit, parsed without surprises.

Folders of runs and exported models are handed around. All JSON in them is read here; what it says is checked by who
asked for it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal

from robustkit.core.errors import UserError

LARGEST = 8 << 20
"""Bytes of a file of JSON, or of a checkpoint's header: tens of times what we write, and parsed in a second."""

DEEPEST = 100
"""Lists and objects within each other."""


def open_file(path: Path) -> IO[bytes]:
    """A regular file, or a link to one, for reading. Pipes, devices and folders are refused at once.

    Raises:
        UserError: it is no file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError("is no file", place=str(path), remedy="remove it, or put back the file that belongs there")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # a socket
            raise UserError("is no file", place=str(path)) from error
        raise UserError(f"cannot be read: {getattr(error, 'strerror', error)}", place=str(path)) from error
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, at_most: int = LARGEST, *, errors: Literal["strict", "replace"] = "strict") -> str:
    """The text (UTF-8) of a file.

    Raises:
        UserError: it is no file, larger than `at_most` bytes, or (with "strict") no text.
    """
    with open_file(path) as file:
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise UserError(f"is larger than {at_most >> 20} MiB: not one of ours", place=str(path))
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"is no text: {error}", place=str(path)) from error


def read_json(path: Path, remedy: str = "") -> Any:
    """The data in a JSON file.

    Raises:
        UserError: as `read_text`; or it is not JSON, is nested too deeply, or has a key twice.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", place=str(path), remedy=remedy) from error


def read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file.

    Raises:
        UserError: as `read_json`; or it is no object.
    """
    if not os.path.lexists(path):
        return {}
    data = read_json(path, remedy)
    if not isinstance(data, dict):
        raise UserError("not an object", place=str(path), remedy=remedy)
    return data


def parse_json(text: str) -> Any:
    """The data that JSON text holds.

    Raises:
        ValueError: it is not JSON, is too long, is nested deeper than `DEEPEST`, or an object has a key twice.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST >> 20} MiB")
    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    level: Iterable[Any] = [data]
    for _ in range(DEEPEST):
        level = [item for part in level if isinstance(part, (dict, list)) for item in _items(part)]
        if not level:
            return data
    raise ValueError("it is nested too deeply")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it says {key[:60]!r} twice")
    return data


def _items(part: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part
