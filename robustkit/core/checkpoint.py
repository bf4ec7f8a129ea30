"""Checkpoints: tensors and JSON in one safetensors file, written atomically. Loading one never executes code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustkit.core.errors import CheckpointError, DamagedError

_KEY = "robustkit"
_LONGEST = 100 << 20  # bytes of a header, as safetensors has it


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes `path` (.safetensors) so that a kill at any moment leaves the old file or the new one.

    `facts` is JSON data; it travels inside the file, and a readable copy lies beside it. With `keep_previous` the file
    that was there before remains, as `previous(path)`. The folder of the folder must be there: one that is gone is not
    made anew.

    Raises:
        OSError: the disk is full, or refuses in another way. What was there before is as it was.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    facts = facts | {"sha256": _checksum(held)}
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    text = json.dumps(facts, sort_keys=True)
    _write(partial, save(held, metadata={_KEY: f"{text}\n{_sha256(text)}"}))
    if keep_previous and path.is_file():
        _remain(path, previous(path))
    replace(partial, path)
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, sort_keys=True) + "\n")


def previous(path: Path) -> Path:
    """Where the checkpoint before that in `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts of a checkpoint.

    Raises:
        DamagedError: it is missing, truncated, damaged, or not one of ours. The line says whether the one before is
            whole; it never takes its place unasked.
    """
    try:
        return _read(path)
    except DamagedError as error:
        raise DamagedError(error.fault, place=error.place, remedy=_remedy(path)) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise DamagedError("no such checkpoint", place=str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise DamagedError("not a robustkit checkpoint", place=str(path))
            facts = _facts(metadata[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, no dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"truncated or damaged: {error}", place=str(path)) from error
    if facts.get("sha256") != _checksum(tensors):
        raise DamagedError("damaged: its contents do not match its checksum", place=str(path))
    return tensors, facts


def _remedy(path: Path) -> str:
    """What to do where the checkpoint is not whole."""
    before = previous(path)
    try:
        _, facts = _read(before)
        return (
            f"the one before it, {before.name} of step {facts['step']}, is whole: "
            f"robustkit resume {path.parent.parent} goes on from there"
        )
    except (CheckpointError, KeyError):
        return "take another checkpoint of the run, or start the run anew"


def _facts(text: str) -> dict[str, Any]:
    """The facts in a file's header: JSON, and in a line of its own a checksum, which the first files had not.

    Raises:
        ValueError: they are not what was written.
    """
    text, _, checksum = text.partition("\n")
    facts = json.loads(text)
    if not isinstance(facts, dict) or checksum not in ("", _sha256(text)):
        raise ValueError("its facts do not match their checksum")
    return facts


def facts_of(path: Path) -> dict[str, Any]:
    """The facts alone, without reading the tensors.

    Raises:
        DamagedError: as `read`, but of the header alone.
    """
    try:
        with path.open("rb") as file:  # one look at one file: another may take its place in the meantime
            length = int.from_bytes(file.read(8), "little")
            return _facts(json.loads(file.read(min(length, _LONGEST)))["__metadata__"][_KEY])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"not a checkpoint that can be read: {error}"
        raise DamagedError(fault, place=str(path), remedy=_remedy(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    _write(partial, text.encode())
    replace(partial, path)


def append_line(path: Path, text: str) -> None:
    """Adds a line; what a kill leaves of it has no end of line."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace(partial: Path, path: Path) -> None:
    """`partial` becomes `path`, on the disk and not merely in its cache."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(partial: Path, content: bytes) -> None:
    """A file that the disk has no room for leaves the room that it took."""
    try:
        with naming(partial):
            partial.write_bytes(content)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the disk's errors say which file it was: they do so when it is opened, but not when it is written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _remain(path: Path, name: Path) -> None:
    """The file in `path` is known as `name`, too, so that there is no moment without it."""
    spare = name.with_name(f"{name.name}.partial")
    spare.unlink(missing_ok=True)  # a kill may have left it
    try:
        os.link(path, spare)
        spare.replace(name)
        spare.unlink(missing_ok=True)  # where both were names of one file already, nothing was replaced
    except OSError:  # not every file system knows second names
        path.replace(name)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
