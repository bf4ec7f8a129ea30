"""Checkpoints: tensors and JSON in one safetensors file, written atomically. Loading one never executes code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from robustkit.core.errors import CheckpointError, DamagedError, UserError
from robustkit.core.reading import LARGEST, open_file, parse_json

_KEY = "robustkit"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Their names in safetensors."""


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes `path` (.safetensors) so that a kill at any moment leaves the old file or the new one.

    `facts` is JSON data; it travels inside the file, with a checksum of the tensors (`sha256`) and in a line of its own
    one of itself, and a readable copy lies beside it. With `keep_previous` the file that was there before remains, as
    `previous(path)`. The folder of the folder must be there: one that is gone is not made anew.

    Raises:
        OSError: the disk is full, or refuses in another way. What was there before is as it was.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    facts = facts | {"sha256": _checksum(held)}
    text = json.dumps(facts, sort_keys=True)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    _write(partial, _pieces(held, f"{text}\n{_sha256(text)}"))
    if keep_previous and path.is_file():
        _remain(path, previous(path))
    replace(partial, path)
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, sort_keys=True) + "\n")


def previous(path: Path) -> Path:
    """Where the checkpoint before that in `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read(path: Path, **wanted: type) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts of a checkpoint.

    Args:
        wanted: facts that must be there, and their types.

    Raises:
        DamagedError: it is missing, truncated, damaged, or not one of ours. The line says whether the one before is
            whole; it never takes its place unasked.
        CheckpointError: it is too large for this machine, or lacks a fact that is wanted.
    """
    try:
        return _read(path, wanted)
    except DamagedError as error:
        raise DamagedError(error.fault, place=error.place, remedy=_remedy(path)) from error


def facts_of(path: Path, **wanted: type) -> dict[str, Any]:
    """The facts alone, without reading the tensors.

    Raises:
        DamagedError, CheckpointError: as `read`, the tensors' checksum aside.
    """
    try:
        return _facts_of(path, wanted)
    except DamagedError as error:
        raise DamagedError(error.fault, place=error.place, remedy=_remedy(path)) from error


def _read(path: Path, wanted: dict[str, type]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _facts_of(path, wanted)  # before safetensors, which believes a header of any size, sees it
    size, memory = path.stat().st_size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        fault = f"holds {size / 1e9:,.0f} GB, more than the {memory / 1e9:,.0f} GB of this machine's memory"
        raise CheckpointError(fault, place=str(path))
    try:
        with safe_open(path, framework="pt") as file:  # by now perhaps another file: its own facts count
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, no dict
        found = _checksum(tensors)
    except Exception as error:  # safetensors and torch raise whatever they like
        raise DamagedError(f"truncated or damaged: {' '.join(str(error).split())}", place=str(path)) from error
    facts = _facts(metadata, path, wanted)
    if facts.get("sha256") != found:
        raise DamagedError("damaged: its contents do not match its checksum", place=str(path))
    return tensors, facts


def _remedy(path: Path) -> str:
    """What to do where the checkpoint is not whole."""
    before = previous(path)
    try:
        _, facts = _read(before, {"step": int})
        return (
            f"the one before it, {before.name} of step {facts['step']}, is whole: "
            f"robustkit resume {path.parent.parent} goes on from there"
        )
    except CheckpointError:
        return "take another checkpoint of the run, or start the run anew"


def _facts_of(path: Path, wanted: dict[str, type]) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise DamagedError("no such checkpoint", place=str(path))
    try:
        with open_file(path) as file:  # one look at one file: another may take its place in the meantime
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST:
                raise ValueError(f"its header would have {length:,} bytes")
            header = parse_json(file.read(length).decode())
    except (ValueError, OSError) as error:
        raise DamagedError(f"truncated or damaged: {' '.join(str(error).split())}", place=str(path)) from error
    except UserError as error:
        raise DamagedError(error.fault, place=str(path)) from error
    return _facts(header.get("__metadata__") if isinstance(header, dict) else None, path, wanted)


def _facts(metadata: Any, path: Path, wanted: dict[str, type]) -> dict[str, Any]:
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise DamagedError("not a robustkit checkpoint", place=str(path))
    text, _, checksum = metadata[_KEY].partition("\n")  # the first files had none
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise DamagedError(f"truncated or damaged: {error}", place=str(path)) from error
    if not isinstance(facts, dict) or checksum not in ("", _sha256(text)):
        raise DamagedError("damaged: its facts do not match their checksum", place=str(path))
    for name, kind in wanted.items():
        if type(facts.get(name)) is not kind or (kind is int and facts[name] < 0):
            raise CheckpointError(f"does not say its {name}", place=str(path))
    return facts


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    _write(partial, [text.encode()])
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


def _pieces(tensors: dict[str, Tensor], text: str) -> list[bytes | memoryview]:
    """A safetensors file: its header, and the memory of each tensor.

    The library would make it in memory first, in two copies, which takes longer than writing it. Layout: the length of
    the header (8 bytes, little-endian), the header (JSON), the tensors; the widest numbers first, so that all of them
    stand where their width divides the place.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {_KEY: text}}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        if tensor.dtype not in _TYPES:
            raise TypeError(f"a checkpoint cannot hold {tensor.dtype}: '{name}'")
        end += tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    line = json.dumps(header, separators=(",", ":")).encode()
    line += b" " * (-len(line) % 8)
    return [len(line).to_bytes(8, "little") + line, *(_bytes(tensors[name]) for name in names)]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(partial: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A file that the disk has no room for leaves the room that it took."""
    try:
        with naming(partial):
            partial.unlink(missing_ok=True)  # a link would be followed
            with partial.open("wb") as file:
                file.writelines(pieces)
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


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # damaged text may hold anything
