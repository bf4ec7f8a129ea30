"""A checkpoint is a safetensors file that any reader of these understands."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from robustkit.core import checkpoint

TYPES = list(checkpoint._TYPES)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{shape} {dtype}": torch.randint(0, 2, shape, generator=draw).to(dtype)
        for dtype in TYPES
        for shape in ((), (3,), (2, 0), (5, 3, 2))
    }
    tensors["turned"] = torch.randn(4, 6, generator=draw).t()
    tensors["channels last"] = torch.randn(2, 3, 4, 4, generator=draw).contiguous(memory_format=torch.channels_last)
    tensors["a part"] = torch.randn(10, generator=draw)[3:7]
    facts = {"step": 3, "name": 'ü "quoted"\n\U0001f600'}
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, tensors, facts)
    for read in (load_file(path), checkpoint.read(path)[0]):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor), name
    found = checkpoint.facts_of(path)
    assert {name: found[name] for name in facts} == facts
    with safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == ["robustkit"]


def test_no_tensors(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "last.safetensors", {}, {"step": 0})
    assert load_file(tmp_path / "last.safetensors") == {} == checkpoint.read(tmp_path / "last.safetensors")[0]


def test_numbers_stand_where_their_width_divides_the_place(tmp_path: Path) -> None:
    """So that a reader may map the file into memory."""
    tensors = {str(dtype): torch.zeros(3).to(dtype) for dtype in TYPES}
    pieces = list(checkpoint._pieces(tensors, "facts"))
    at = len(pieces[0])
    assert at % 8 == 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name, piece in zip(names, pieces[1:], strict=True):
        assert at % tensors[name].element_size() == 0
        at += len(piece)


def test_tensors_are_not_copied(tmp_path: Path) -> None:
    tensors = {str(number): torch.zeros(1 << 18) for number in range(8)}
    tracemalloc.start()
    try:
        checkpoint.write(tmp_path / "last.safetensors", tensors, {})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20  # of 8 MiB


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"a": torch.zeros(1)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"cannot hold torch\.complex64: 'wave'"):
        checkpoint.write(path, {"wave": torch.zeros(2, dtype=torch.complex64)}, {})
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))
