"""What somebody might put where we expect a file of ours. Made anew for each test; nothing of it is kept."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np

SECONDS = 5
"""Every bad input is refused within so many of computing."""
HANGS = 60
"""After so many by the clock, on however busy a machine, it never will be."""


class Bomb:
    """Unpickling it makes the folder that it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def mark_of(path: Path) -> Path:
    """The folder that is there if something was executed."""
    return path.with_name(f"{path.name}.executed")


@contextmanager
def in_time() -> Iterator[None]:
    """Fails where it takes longer, and ends what hangs, be it in an `open` that waits."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before, began = signal.signal(signal.SIGALRM, late), time.process_time()
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert time.process_time() - began < SECONDS


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(path if target == "itself" else target)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: _written(path, content)


def _written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"a": 1')
        file.truncate(1 << 42)


def _header(length: int, text: bytes = b"{}") -> Callable[[Path], None]:
    """A safetensors file that says its header has `length` bytes."""
    return _bytes(struct.pack("<Q", length) + text)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.npy", b"")
        archive.writestr("/tmp/robustkit-escaped.npy", b"")


DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_METADATA = b'{"__metadata__": {"robustkit": "' + rb"{\"a\":" * 100_000 + b'"}}'

THINGS: dict[str, Callable[[Path], None]] = {
    "0 bytes": _bytes(b""),
    "noise": _bytes(np.random.default_rng(0).bytes(5000)),
    "zeros": _bytes(bytes(5000)),
    "pickle": lambda path: _written(path, pickle.dumps(Bomb(mark_of(path)))),
    "old pickle": lambda path: _written(path, pickle.dumps(Bomb(mark_of(path)), protocol=0)),
    "zip with paths": _zip,
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "link to itself": _link("itself"),
    "link to nothing": _link("nowhere/at/all"),
    "link to /dev/zero": _link("/dev/zero"),
    "link to /etc/passwd": _link("/etc/passwd"),
    "4 TB, sparse": _sparse,
    "deep JSON": _bytes(DEEP),
    "deep objects": _bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "101 deep": _bytes(b'{"a":' * 101 + b"1" + b"}" * 101),
    "9 MiB of JSON": _bytes(b"[" + b"[]," * ((9 << 20) // 3) + b"[]]"),
    "7 MiB of JSON": _bytes(b'{"a":[' + b"{}," * ((7 << 20) // 3) + b"{}]}"),
    "a number": _bytes(b"3"),
    "null": _bytes(b"null"),
    "a list": _bytes(b"[1, 2]"),
    "a text": _bytes(b'"last"'),
    "a number of 100,000 digits": _bytes(b'{"last": ' + b"9" * 100_000 + b"}"),
    "numbers for objects": _bytes(b'{"last": 1, "name": 2, "epoch": "x", "data": [], "model": {}}'),
    "a key twice": _bytes(b'{"last": {}, "last": {}}'),
    "NaN": _bytes(b'{"last": {"clean": {"accuracy": NaN, "n": 1, "ci95": [0, Infinity]}}}'),
    "half an object": _bytes(b'{"last": {"clean": {"accu'),
    "no UTF-8": _bytes(b'{"last": "\xff\xfe"}'),
    "halves of characters": _bytes(b'{"\\ud800": {"\\udfff": "\\ud800"}}'),
    "header of 2^60 bytes": _header(1 << 60),
    "header of 2^64 - 1 bytes": _header((1 << 64) - 1),
    "header of 0 bytes": _header(0),
    "header longer than the file": _header(1000),
    "header that is deep": _header(len(DEEP), DEEP),
    "header that is a list": _header(2, b"[]"),
    "header without metadata": _header(2, b"{}"),
    "metadata that are a number": _header(18, b'{"__metadata__": 3}'),
    "metadata that are deep": _header(len(DEEP_METADATA), DEEP_METADATA),
}
"""Name -> what puts it at a path."""


def put(thing: str, path: Path) -> Path:
    """That thing in place of what is there."""
    path.unlink(missing_ok=True)
    THINGS[thing](path)
    return path
