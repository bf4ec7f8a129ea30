"""Files of ours with a few bytes changed: refused, or as they were. 500 of each kind; 10,000 with `-m slow`."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from corpus import in_time
from rich.console import Console

from robustkit.core import checkpoint
from robustkit.core.errors import CheckpointError, DataError, UserError
from robustkit.core.recipe import load_recipe
from robustkit.core.spec import digest
from robustkit.datasets.npz import read_npz
from robustkit.folder import read_results
from robustkit.opening import load_parts, make_world, recipe_of, restore
from robustkit.reporting.tables import columns, print_results

COUNTS = [pytest.param(500, id="500"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]


def mutated(whole: bytes, dice: random.Random) -> bytes:
    """One to three bytes changed, taken out, put in or swapped with others; or an end cut off."""
    data = bytearray(whole)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(data))
        match dice.randrange(6):
            case 0:
                data[place] ^= 1 << dice.randrange(8)
            case 1:
                data[place] = dice.randrange(256)
            case 2:
                data[place] = dice.choice(b'0123456789-+.eE"{}[],: naulse')
            case 3:
                del data[place : place + dice.choice((1, 1, 4, 64))]
            case 4:
                data[place:place] = dice.randbytes(dice.choice((1, 1, 4)))
            case 5:
                other = dice.randrange(len(data))
                data[place], data[other] = data[other], data[place]
        if len(data) < 2:
            break
    return bytes(data[: dice.randrange(len(data))] if dice.random() < 0.05 else data)


def tried(count: int, whole: bytes, path: Path, judge: Callable[[], str], begin: int = 0) -> Counter[str]:
    """What became of so many mutations, each written to `path`; half of them in the first `begin` bytes, if any."""
    dice, found = random.Random(0), Counter[str]()
    for number in range(count):
        head = begin if begin and number % 2 else len(whole)
        path.write_bytes(mutated(whole[:head], dice) + whole[head:])
        if path.read_bytes() == whole:
            continue
        with in_time():
            try:
                found[judge()] += 1
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error), error
                found["refused"] += 1
    print(f"{path.name}: {dict(found)}")
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints(count: int, spoilt: Path) -> None:
    """The header has most of the chances: it is a small part of the file."""
    path = spoilt / "checkpoints" / "last.safetensors"
    tensors, facts = checkpoint.read(path)
    whole = path.read_bytes()

    def judge() -> str:
        found, told = checkpoint.read(path)
        assert found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
        assert told == facts
        return "as it was"

    begin = 8 + int.from_bytes(whole[:8], "little")
    found = tried(count, whole, path, judge, begin)
    assert found["refused"] > 0.95 * count


@pytest.mark.parametrize("count", COUNTS)
def test_recipes(count: int, spoilt: Path) -> None:
    """What is another recipe has another digest, and the run's checkpoint is not taken for one of its own."""
    path, recipe = spoilt / "recipe.json", recipe_of(spoilt)
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    last = spoilt / "checkpoints" / "last.safetensors"

    def judge() -> str:
        found = load_recipe(path)
        if found == recipe:
            assert digest(found) == digest(recipe)
            return "as it was"
        assert digest(found) != digest(recipe)
        with pytest.raises(CheckpointError, match="belongs to another recipe"):
            restore(attrs.evolve(parts, recipe=found), last)
        return "another recipe"

    assert tried(count, path.read_bytes(), path, judge)["refused"] > 0.5 * count


@pytest.mark.parametrize("count", COUNTS)
def test_results(count: int, spoilt: Path) -> None:
    """Results have no checksum: people may write them. What is read can be shown, and is what the file says."""
    path = spoilt / "results.json"
    before = read_results(spoilt)

    def judge() -> str:
        found = read_results(spoilt)
        assert found == json.loads(path.read_text())
        print_results(Console(file=io.StringIO(), width=200), columns("model", found))
        return "as it was" if found == before else "other results"

    found = tried(count, path.read_bytes(), path, judge)
    assert found["refused"] > 0.3 * count


@pytest.mark.parametrize("count", COUNTS)
def test_npz(count: int, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    arrays: dict[str, Any] = {"image": dice.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), "label": np.arange(6)}
    path, cache = tmp_path / "made.npz", tmp_path / "cache"
    np.savez_compressed(path, **arrays)
    wanted = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)

    def judge() -> str:
        try:
            found = read_npz(path, cache)
        except DataError:
            assert not cache.is_dir() or not list(cache.iterdir())  # nothing half made
            raise
        assert torch.equal(found.labels, torch.arange(6)) and torch.equal(found.fetch(torch.arange(6)), wanted)
        shutil.rmtree(cache)
        return "as it was"

    assert tried(count, path.read_bytes(), path, judge)["refused"] > 0.8 * count
