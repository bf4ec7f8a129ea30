"""A disk that is full, read-only or gone in mid-run: one line, nothing saved is harmed, and the run goes on after."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from robustkit import resume, run
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.errors import DataError, StorageError
from robustkit.core.recipe import Suite
from robustkit.datasets import image_folder
from robustkit.datasets.image_folder import ImageFolder
from robustkit.display import Silent
from robustkit.evaluation import Attacked, Clean
from robustkit.runs import evaluate_run
from robustkit.testing import tiny_recipe

pytestmark = pytest.mark.usefixtures("no_figures")

RECIPE = tiny_recipe(evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-3", steps=3))),))
CLOCKS = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(RECIPE, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(RECIPE, out=folder, device="cpu", max_steps=10)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leaves so many bytes."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return filler


def weights_of(folder: Path) -> dict[str, str]:
    files = (folder / "checkpoints").iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix != ".json"}


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return value


def assert_same(one: Path, other: Path) -> None:
    for name in ("last", "best"):
        files = [folder / "checkpoints" / f"{name}.safetensors" for folder in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for name in ("metrics.jsonl", "results.json", "outcomes.json"):
        texts = [(folder / name).read_text() for folder in (one, other)]
        lines = [text.splitlines() if name.endswith("l") else [text] for text in texts]
        assert [without_clocks(json.loads(line)) for line in lines[0]] == [
            without_clocks(json.loads(line)) for line in lines[1]
        ]


def one_line(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    capsys.readouterr()
    assert main([*words, "--quiet", "--device", "cpu"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err.strip()


@pytest.mark.parametrize("leave", [0, 4096, 24_000])
def test_a_full_disk_in_training(
    leave: int, disk: Path, stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full at once, full after a few small files, and full in the middle of a checkpoint."""
    folder = Path(shutil.copytree(stopped, disk / "run"))
    before = weights_of(folder)
    filler = fill(disk, leave)
    line = one_line(["resume", str(folder)], capsys)
    assert "No space left on device" in line and str(folder) in line
    found = re.search(r"free (\d+) MB there, then go on with: robustkit resume (.*)$", line)
    assert found and found[2] == str(folder)
    assert weights_of(folder) == before and not list(folder.rglob("*.safetensors.partial"))
    os.truncate(filler, max(0, filler.stat().st_size - int(found[1]) * 1_000_000))  # as much as the line asks for
    assert resume(folder, device="cpu").stopped == ""
    assert_same(whole, folder)


def test_a_full_disk_in_evaluation(
    disk: Path, stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(stopped, disk / "run"))
    resume(folder, device="cpu", max_steps=16)
    for name in ("evaluation", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("results.json", "outcomes.json"):
        (folder / name).unlink(missing_ok=True)
    filler = fill(disk)
    line = one_line(["eval", str(folder)], capsys)
    assert "No space left on device" in line and "give the same command again" in line
    filler.unlink()
    evaluate_run(folder, device="cpu")
    assert_same(whole, folder)


def test_files_may_not_be_so_large(
    stopped: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = weights_of(folder)
    with at_most(8192):
        line = one_line(["resume", str(folder)], capsys)
    assert "File too large" in line and line.endswith(f"go on with: robustkit resume {folder}")
    assert weights_of(folder) == before
    resume(folder, device="cpu")
    assert_same(whole, folder)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files of this process grow to so many bytes at most."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["resume", "eval", "run"])
def test_a_disk_that_may_not_be_written(
    command: str, disk: Path, stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(stopped if command == "resume" else whole, disk / "run"))
    remount = ["mount", "-o", "remount,size=2m"]
    subprocess.run([*remount[:2], f"{remount[2]},ro", disk], check=True)
    try:
        if command == "run":
            line = one_line(["run", str(stopped / "recipe.json"), "--out", str(disk / "new")], capsys, code=2)
            assert "cannot be written: Read-only file system; choose another --out" in line
            return
        line = one_line([command, str(folder), *(["--again"] if command == "eval" else [])], capsys)
    finally:
        subprocess.run([*remount[:2], f"{remount[2]},rw", disk], check=True)
    assert "Read-only file system" in line and "make it writable, then g" in line
    if command == "resume":
        resume(folder, device="cpu")
    assert_same(whole, folder)


class Once(Silent):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def step(self, progress: Any, totals: Any) -> None:
        if progress.step == self._step:
            self._action()


def test_a_run_that_is_moved_or_removed(tmp_path: Path, whole: Path) -> None:
    folder, moved = tmp_path / "run", tmp_path / "moved"
    with pytest.raises(StorageError, match="the run's folder is gone; where it was moved, go on with robustkit resume"):
        run(RECIPE, out=folder, device="cpu", display=Once(6, lambda: folder.rename(moved)))
    assert not folder.exists()  # a folder of checkpoints without a recipe would be of no use
    resume(moved, device="cpu")
    assert_same(whole, moved)


def test_checkpoints_that_are_removed_while_training_goes_on(tmp_path: Path, whole: Path) -> None:
    """All that is needed is in memory."""
    folder = tmp_path / "run"
    run(RECIPE, out=folder, device="cpu", display=Once(6, lambda: shutil.rmtree(folder / "checkpoints")))
    best = checkpoint.facts_of(folder / "checkpoints" / "last.safetensors")["best"]["epoch"]
    assert best > 1  # it was written again, after they were removed
    assert_same(whole, folder)


def test_pictures_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 35), ("test", 4)):
        for name in ("ant", "bee"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{number:02}.png")
    monkeypatch.setattr(image_folder, "HELD_BYTES", 0)  # so that each batch decodes its own
    recipe = tiny_recipe(data=ImageFolder(root=str(tmp_path / "data"), grey=True))
    run(recipe, out=tmp_path / "whole", device="cpu", preflight=False)

    def away() -> None:
        (tmp_path / "data").rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"\.png: is no readable picture .*put it back; a run goes on with"):
        run(recipe, out=tmp_path / "run", device="cpu", preflight=False, display=Once(6, away))
    with pytest.raises(DataError, match="no such folder"):
        resume(tmp_path / "run", device="cpu")
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    resume(tmp_path / "run", device="cpu")
    for name in ("last", "best"):
        files = [tmp_path / folder / "checkpoints" / f"{name}.safetensors" for folder in ("whole", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()
