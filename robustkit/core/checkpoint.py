"""Checkpoints: tensors and JSON in one safetensors file, written atomically. Loading one never executes code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustkit.core.errors import CheckpointError

_KEY = "robustkit"
_LONGEST = 100 << 20  # bytes of a header, as safetensors has it


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes `path` (.safetensors) so that a kill at any moment leaves the old file or the new one.

    `facts` is JSON data; it travels inside the file, and a readable copy lies beside it.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    facts = facts | {"sha256": _checksum(held)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(held, partial, metadata={_KEY: json.dumps(facts, sort_keys=True)})
    replace(partial, path)
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts of a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, damaged, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError("no such checkpoint", place=str(path))
    remedy = "take another checkpoint of the run, or start the run anew"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise CheckpointError("not a robustkit checkpoint", place=str(path))
            facts = json.loads(metadata[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a handle, no dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"truncated or damaged: {error}", place=str(path), remedy=remedy) from error
    if not isinstance(facts, dict) or facts.get("sha256") != _checksum(tensors):
        raise CheckpointError("damaged: its contents do not match its checksum", place=str(path), remedy=remedy)
    return tensors, facts


def facts_of(path: Path) -> dict[str, Any]:
    """The facts alone, without reading the tensors.

    Raises:
        CheckpointError: as `read`, checksum aside.
    """
    try:
        with path.open("rb") as file:  # one look at one file: another may take its place in the meantime
            length = int.from_bytes(file.read(8), "little")
            facts = json.loads(json.loads(file.read(min(length, _LONGEST)))["__metadata__"][_KEY])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"not a checkpoint that can be read: {error}", place=str(path)) from error
    if not isinstance(facts, dict):
        raise CheckpointError("not a robustkit checkpoint", place=str(path))
    return facts


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    replace(partial, path)


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


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
