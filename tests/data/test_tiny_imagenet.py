"""Tiny ImageNet as people have it: unpacked, or with its validation pictures sorted into folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustkit import evolve, load_recipe, override, run
from robustkit.core.errors import DataError
from robustkit.datasets import TinyImageNet
from robustkit.datasets.tiny_imagenet import VARIABLE
from robustkit.smoke import smoke

RECIPE = Path(__file__).parents[2] / "recipes" / "pgd_at_rn18.py"
NUMBERS = [f"n{1000 + 7 * k:08}" for k in range(200)]


def colour(k: int, part: int) -> tuple[int, int, int]:
    """Of every picture of class k: it says which class and part it belongs to."""
    return k, 255 - k, 50 * part


def write(path: Path, k: int, part: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((64, 64, 3), colour(k, part), np.uint8)
    image = Image.fromarray(pixels) if mode == "RGB" else Image.fromarray(pixels[..., 0])
    image.save(path.with_suffix(".png"))
    path.with_suffix(".png").rename(path)  # decoded by what is in it


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    lines = []
    for k, number in enumerate(NUMBERS):
        for part in (1, 2):
            write(folder / "train" / number / "images" / f"{number}_{part}.JPEG", k, part)
        (folder / "train" / number / f"{number}_boxes.txt").write_text("0 0 1 1")
        name = f"val_{(k * 37) % 200}.JPEG"  # not in the order of the classes
        write(folder / "val" / "images" / name, k, 3)
        lines.append(f"{name}\t{number}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
    (folder / "wnids.txt").write_text("\n".join(reversed(NUMBERS)) + "\n")
    words = [f"{number}\tthing {min(k, 197)}, also called so\n" for k, number in enumerate(NUMBERS[:-1])]
    (folder / "words.txt").write_text("n00000001\tentity\n" + "".join(words))
    write(folder / "test" / "images" / "test_0.JPEG", 0, 4)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "ROBUSTKIT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(unpacked: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(unpacked, tmp_path / "tiny-imagenet-200")
    return tmp_path / "tiny-imagenet-200"


def means(images: object) -> list[list[float]]:
    pixels = images.fetch(torch.arange(len(images)))  # type: ignore[attr-defined]
    assert pixels.shape[1:] == (3, 64, 64) and pixels.dtype == torch.uint8
    return pixels.float().mean(dim=(2, 3)).tolist()  # type: ignore[no-any-return]


def check(folder: Path) -> None:
    data = TinyImageNet(root=str(folder)).load()
    assert data.train.labels.tolist() == [k for k in range(200) for _ in range(2)]
    assert means(data.train) == [list(map(float, colour(k, part))) for k in range(200) for part in (1, 2)]
    assert data.test.labels.tolist() == list(range(200))
    assert means(data.test) == [list(map(float, colour(k, 3))) for k in range(200)]


def test_as_unpacked(unpacked: Path) -> None:
    for folder in (unpacked, unpacked.parent):
        check(folder)


def test_with_validation_sorted_into_folders(mine: Path) -> None:
    for inner in ("images", ""):  # both are in use
        for k, number in enumerate(NUMBERS):
            shutil.rmtree(mine / "val" / number, ignore_errors=True)
            write(mine / "val" / number / inner / "picture.JPEG", k, 3)
        shutil.rmtree(mine / "val" / "images", ignore_errors=True)
        check(mine)


def test_names(unpacked: Path, mine: Path) -> None:
    """The first word, but the number where two classes share it or none is given."""
    classes = TinyImageNet(root=str(unpacked), per_class=1).load().classes
    assert classes[:2] == ("thing 0", "thing 1") and classes[196] == "thing 196"
    assert classes[197:] == tuple(NUMBERS[197:])
    (mine / "words.txt").unlink()
    assert TinyImageNet(root=str(mine)).load().classes == tuple(NUMBERS)


def test_per_class(unpacked: Path) -> None:
    data = TinyImageNet(root=str(unpacked), per_class=1).load()
    assert len(data.train) == 200 and data.train.labels.tolist() == list(range(200)) and len(data.test) == 200


def test_grey_pictures_are_in_colour(mine: Path) -> None:
    write(mine / "train" / NUMBERS[5] / "images" / f"{NUMBERS[5]}_1.JPEG", 5, 1, mode="L")
    data = TinyImageNet(root=str(mine)).load()
    assert means(data.train)[10] == [5.0] * 3


def test_where_it_is_looked_for(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TinyImageNet().sought.form() is None
    monkeypatch.setenv("ROBUSTKIT_DATA_DIR", str(unpacked.parent))
    assert TinyImageNet().sought.form() == "the original files"
    monkeypatch.setenv("ROBUSTKIT_DATA_DIR", "nowhere")
    for folder in (unpacked, unpacked.parent):
        monkeypatch.setenv(VARIABLE, str(folder))
        assert TinyImageNet().sought.form() == "the original files" and TinyImageNet().sought.folder == unpacked


def test_what_is_said(mine: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            TinyImageNet(root=str(mine)).load()
        assert "\n" not in str(caught.value)

    with pytest.raises(DataError, match=r"not there .* in .*nowhere.*unpack http.*ROBUSTKIT_TINY_IMAGENET_DIR"):
        TinyImageNet(root="nowhere").load()
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="not there"):  # of another data set
        TinyImageNet(root=str(tmp_path / "train")).load()
    table = mine / "val" / "val_annotations.txt"
    text = table.read_text()
    for line in ("val_7.JPEG\tn99999999\t0\n", f"../{NUMBERS[0]}.JPEG\t{NUMBERS[0]}\t0\n", "nonsense\n"):
        table.write_text(text + line)
        refused(r"val_annotations\.txt: line 201 names no picture and class")
    table.write_text(text + f"val_777.JPEG\t{NUMBERS[0]}\t0\n")
    refused("no readable picture")
    table.write_text(text)
    shutil.rmtree(mine / "train" / NUMBERS[3])
    refused(f"{NUMBERS[3]}: a class without pictures")
    (mine / "wnids.txt").write_text("\n".join(NUMBERS[:2]))
    table.write_text("".join(line for line in text.splitlines(True) if line.split("\t")[1] in NUMBERS[:2]))
    refused("images of 2 classes are not Tiny ImageNet")


@pytest.mark.parametrize("backbone", ["resnet18_cifar_w16", "preact_resnet18"])
def test_networks_take_its_images(backbone: str, tmp_path: Path) -> None:
    recipe = smoke(override(load_recipe(RECIPE), ["data=tiny-imagenet", f"model.backbone={backbone}"]))
    assert recipe.data.facts == ((3, 64, 64), 200)
    recipe = evolve(recipe, evaluation=(), batch_size=4)
    run(recipe, out=tmp_path / "run", device="cpu", max_steps=1, rehearse=True, preflight=False)
