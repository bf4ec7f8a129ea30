"""MNIST and its kin: read from files of their format, refused where damaged, and used in robustkit."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from robustkit_mnist import FashionMnist, Kmnist, Mnist

from robustkit import UserError, evolve, load_recipe, override, registry
from robustkit.core.errors import DataError
from robustkit.core.spec import digest, from_json, to_json
from robustkit.runs import run
from robustkit.smoke import smoke
from robustkit.testing import check, tiny_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))
SOURCES = {Mnist: "MNIST", FashionMnist: "FashionMNIST", Kmnist: "KMNIST"}
COUNTS = {"train": 70, "t10k": 20}


def idx(array: np.ndarray) -> bytes:
    """The format as its authors describe it: two zeros, type (8: bytes), number of axes, their lengths, the numbers."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def images_of(part: str) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(len(part))
    count = COUNTS[part]
    return draws.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)


def written(root: Path, source: str) -> Path:
    """The folder of one data set's four files."""
    folder = root / source / "raw"
    folder.mkdir(parents=True)
    for part in COUNTS:
        images, labels = images_of(part)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data of this machine are found."""
    for name in ("DATA", "MNIST", "FASHIONMNIST", "KMNIST"):
        monkeypatch.delenv(f"ROBUSTKIT_{name}_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cls", SOURCES)
def test_contract(cls: type) -> None:
    check(cls())


@pytest.mark.parametrize("cls", SOURCES)
def test_reads_what_was_written(cls: type, tmp_path: Path) -> None:
    written(tmp_path, SOURCES[cls])
    data = cls(root=str(tmp_path), download=False).load()
    assert (data.train.shape, len(data.classes)) == cls().facts == ((1, 28, 28), 10)
    for part, found in (("train", data.train), ("t10k", data.test)):
        images, labels = images_of(part)
        rows = torch.arange(len(found))
        assert torch.equal(found.fetch(rows), torch.from_numpy(images)[:, None])
        assert torch.equal(found.labels, torch.from_numpy(labels).long())
    assert len(set(data.classes)) == 10 and data.copy == "the original files"
    assert {Mnist: "7", FashionMnist: "Sneaker", Kmnist: "ya"}[cls] == data.classes[7]


def test_padded(tmp_path: Path) -> None:
    written(tmp_path, "MNIST")
    data = Mnist(root=str(tmp_path), size=32, download=False).load()
    assert data.train.shape == Mnist(size=32).facts[0] == (1, 32, 32)
    pixels = data.test.fetch(torch.arange(20))
    assert torch.equal(pixels[:, :, 2:30, 2:30], torch.from_numpy(images_of("t10k")[0])[:, None])
    pixels[:, :, 2:30, 2:30] = 0
    assert not pixels.any()
    with pytest.raises(UserError, match="size"):
        Mnist(size=30)  # type: ignore[arg-type]


def test_where_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = FashionMnist(download=False)
    with pytest.raises(DataError, match=r"Fashion-MNIST is not there .*ROBUSTKIT_FASHIONMNIST_DIR"):
        missing.load()
    written(tmp_path / "own", "FashionMNIST")
    monkeypatch.setenv("ROBUSTKIT_DATA_DIR", str(tmp_path / "own"))
    assert len(missing.load().test) == COUNTS["t10k"]
    monkeypatch.setenv("ROBUSTKIT_FASHIONMNIST_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError):
        missing.load()
    assert len(FashionMnist(root=str(tmp_path / "own"), download=False).load().train) == COUNTS["train"]
    (tmp_path / "pictures" / "train").mkdir(parents=True)  # some other data set's
    assert FashionMnist(root=str(tmp_path / "pictures")).sought.form() is None


@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[:-9], lambda content: b"\x00\x00\x0d\x03" + content[4:], lambda content: b""],
    ids=["truncated", "another type", "empty"],
)
def test_damaged_files_take_one_line(spoil: object, tmp_path: Path) -> None:
    path = written(tmp_path, "KMNIST") / "train-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match="is damaged") as caught:
        Kmnist(root=str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def test_a_label_out_of_range(tmp_path: Path) -> None:
    folder = written(tmp_path, "MNIST")
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.full(COUNTS["train"], 10, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"label 10 of image 0"):
        Mnist(root=str(tmp_path)).load()


def test_listed_with_its_origin() -> None:
    command = [sys.executable, "-m", "robustkit", "list", "dataset", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    for cls, name in ((Mnist, "mnist"), (FashionMnist, "fashion-mnist"), (Kmnist, "kmnist")):
        assert registry("dataset").get(name) is cls
        assert found[name]["origin"].startswith("robustkit-mnist") and "28x28" in found[name]["description"]


def test_where_files_lie_is_no_part_of_a_recipe() -> None:
    recipe = load_recipe(RECIPES[0])
    assert digest(override(recipe, ["data.root=/somewhere", "data.download=false"])) == digest(recipe)
    assert digest(override(recipe, ["data.size=28"])) != digest(recipe)


def test_trains_on_its_files(tmp_path: Path) -> None:
    written(tmp_path, "FashionMNIST")
    recipe = evolve(tiny_recipe(data=FashionMnist(root=str(tmp_path), download=False)), batch_size=16)
    outcome = run(recipe, out=tmp_path / "run", device="cpu", max_steps=2, preflight=False)
    assert outcome.stopped == "steps"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert type(recipe.data) in SOURCES
    assert from_json(type(recipe), json.loads(json.dumps(to_json(recipe)))) == recipe
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    for word in ("Run:", "Paper:", "Cost:", "Published:", "Measured:"):
        assert word in docstring
    units = sum(part.units for part in recipe.passes(_start(recipe.epochs)).values())
    assert f"{units} forward-units" in docstring
    if path.stem == "mnist":  # a small network
        small = evolve(smoke(recipe), attack=evolve(recipe.attack, steps=2))
        assert run(small, out=tmp_path / "run", device="cpu", max_steps=2).stopped == "steps"


def _start(epochs: int) -> object:
    from robustkit.core.batch import Progress

    return Progress.at(0, epochs, 460)


def test_the_number_of_recipes() -> None:
    assert len(RECIPES) == 2
