"""Images that are fetched ahead of their time are the same images, and what goes wrong is told where they are used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustkit import evolve, resume, run
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.errors import DataError
from robustkit.core.recipe import Recipe, save_recipe
from robustkit.data import Ahead, InMemory, make_batch
from robustkit.datasets import ImageFolder, Synthetic, WithSynthetic, image_folder, with_synthetic
from robustkit.opening import load_parts, make_world
from robustkit.testing import tiny_recipe


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", stub)


class Noting:
    """Images that note who asked for which rows, and wait for permission to give them."""

    def __init__(self, count: int = 20) -> None:
        draws = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(256, (count, 1, 4, 4), generator=draws, dtype=torch.uint8)
        self.labels, self.shape = torch.zeros(count, dtype=torch.int64), (1, 4, 4)
        self.asked: list[tuple[int, list[int]]] = []
        self.may = threading.Event()
        self.may.set()

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, index: Tensor) -> Tensor:
        self.asked.append((threading.get_ident(), index.tolist()))
        assert self.may.wait(10)
        if (index >= len(self)).any():
            raise DataError("no such picture", place="there")
        return self.pixels[index]


def test_what_was_expected_is_fetched_once_and_early() -> None:
    images = Noting()
    ahead = Ahead(images)
    pieces = [torch.tensor([3, 1, 3]), torch.tensor([0, 19])]
    ahead.expect(pieces)
    deadline = time.monotonic() + 10
    while len(images.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [rows for _, rows in images.asked] == [[3, 1, 3], [0, 19]]  # nobody has fetched yet
    for piece in pieces:
        assert torch.equal(ahead.fetch(piece), images.pixels[piece])
    assert len(images.asked) == 2
    assert torch.equal(ahead.fetch(pieces[0]), images.pixels[pieces[0]]) and len(images.asked) == 3
    assert (len(ahead), ahead.shape) == (20, (1, 4, 4)) and ahead.labels is images.labels


def test_other_rows_may_be_asked_for_in_between() -> None:
    images = Noting()
    ahead = Ahead(images)
    images.may.clear()
    ahead.expect([torch.tensor([5, 6])])
    threading.Timer(0.05, images.may.set).start()
    other = torch.tensor([6, 5])  # the same rows in another order are other rows
    assert torch.equal(ahead.fetch(other), images.pixels[other])
    assert torch.equal(ahead.fetch(torch.tensor([5, 6])), images.pixels[[5, 6]])
    threads = {thread for thread, _ in images.asked}
    assert len(threads) == 1 and threading.get_ident() not in threads  # images need not stand two at once


def test_an_error_belongs_to_the_fetch_of_its_rows() -> None:
    ahead = Ahead(Noting())
    bad, good = torch.tensor([99]), torch.tensor([1])
    ahead.expect([bad, good])
    assert ahead.fetch(good).shape == (1, 1, 4, 4)
    with pytest.raises(DataError, match="there: no such picture"):
        ahead.fetch(bad)
    assert ahead.fetch(good).shape == (1, 1, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pixels_wait_where_a_gpu_takes_them_from() -> None:
    images = Noting()
    ahead, rows = Ahead(images, pin=True), torch.tensor([4, 2])
    ahead.expect([rows])
    pixels = ahead.fetch(rows)
    assert pixels.is_pinned() and torch.equal(pixels, images.pixels[rows])
    plain = make_batch(images, rows, device=torch.device("cuda"))
    pinned = make_batch(ahead, rows, device=torch.device("cuda"))
    assert all(torch.equal(a, b) and a.is_cuda for a, b in zip(plain, pinned, strict=True))


# In training


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoint.read(folder / "checkpoints" / "last.safetensors")[0]


def equal(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def streamed(tmp_path: Path) -> Recipe:
    """A recipe whose images are in a file."""
    draws = np.random.default_rng(0)
    image = draws.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", image=image, label=draws.integers(0, 4, 50))
    inner = Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip-rotate")
    return tiny_recipe(data=WithSynthetic(inner=inner, file="made.npz", root=str(tmp_path), original=0.5), epochs=3)


def test_training_is_the_same_as_from_memory(streamed: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces, short of one step, and with validation between epochs."""
    recipe = evolve(streamed, accumulate=2)
    expected: list[int] = []
    expect = Ahead.expect

    def noted(self: Ahead, pieces: Any) -> None:
        expect(self, held := list(pieces))
        expected.append(len(held))

    monkeypatch.setattr(Ahead, "expect", noted)
    run(recipe, out=tmp_path / "ahead", device="cpu", preflight=False)
    assert expected == [2] * 14  # all of 15 steps but the first
    run(recipe, out=tmp_path / "stopped", device="cpu", max_steps=4, preflight=False)
    resume(tmp_path / "stopped", device="cpu")
    assert equal(tmp_path / "ahead", tmp_path / "stopped")

    read = with_synthetic.read_npz
    monkeypatch.setattr(with_synthetic, "read_npz", lambda *arguments: held_in_memory(read(*arguments)))
    monkeypatch.setattr(with_synthetic, "Joined", joined_in_memory)
    assert isinstance(load_parts(recipe, make_world(recipe, "cpu")).train, InMemory)
    run(recipe, out=tmp_path / "memory", device="cpu", preflight=False)
    assert equal(tmp_path / "ahead", tmp_path / "memory")


def held_in_memory(images: Any) -> InMemory:
    return InMemory(images.fetch(torch.arange(len(images))), images.labels)


def joined_in_memory(first: InMemory, second: InMemory) -> InMemory:
    return InMemory(torch.cat([first.pixels, second.pixels]), torch.cat([first.labels, second.labels]))


def test_nothing_of_what_was_expected_is_left(streamed: Recipe) -> None:
    from robustkit.core.loop import train

    parts = load_parts(streamed, make_world(streamed, "cpu"))
    assert isinstance(parts.train, Ahead)

    class Silent:
        def step(self, *arguments: Any) -> None: ...
        def epoch(self, *arguments: Any) -> None: ...

    def never(*arguments: Any) -> bool:
        return False

    train(
        parts,
        display=Silent(),
        save=print,
        rewind=print,
        go_back=print,
        set_aside=print,
        record=print,
        should_stop=never,
        should_save=never,
    )
    assert parts.train._expected == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for name in ("ant", "bee"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / f"{number:02d}.png")
    return tmp_path / "pictures"


def test_a_large_folder_is_decoded_batch_by_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ImageFolder(root=str(folder), grey=True)
    held = spec.load()
    monkeypatch.setattr(image_folder, "HELD_BYTES", 2000)
    data = spec.load()
    assert isinstance(data.train, image_folder.Pictures) and isinstance(data.test, InMemory)
    assert isinstance(held.train, InMemory) and held.train.shape == data.train.shape == (1, 8, 8)
    assert torch.equal(held.train.labels, data.train.labels) and len(data.train) == 48
    for index in (torch.arange(48), torch.tensor([40, 3, 3]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(data.train.fetch(index), held.train.fetch(index))


def test_a_picture_that_breaks_while_training_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_folder, "HELD_BYTES", 2000)
    recipe = tiny_recipe(data=ImageFolder(root=str(folder), grey=True), batch_size=8)
    save_recipe(recipe, tmp_path / "recipe.json")
    load = ImageFolder.load

    def break_later(self: ImageFolder) -> Any:
        data = load(self)
        for name in ("ant/05.png", "ant/06.png", "bee/07.png"):  # at least one is not held out
            (folder / "train" / name).write_bytes(b"no picture")
        return data

    monkeypatch.setattr(ImageFolder, "load", break_later)
    words = ["run", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "run"), "--device", "cpu", "--no-preflight"]
    assert main([*words, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ".png: is no readable picture" in line and "replace or delete it" in line


INTERRUPTED = """
import sys, time
import torch
from robustkit import registry, run, setting, spec
from robustkit.data import Data, InMemory
from robustkit.testing import tiny_recipe


class Slow:
    def __init__(self, images):
        self.images, self.labels, self.shape = images, images.labels, images.shape

    def __len__(self):
        return len(self.images)

    def fetch(self, index):
        time.sleep(0.5 if len(index) == 16 else 0)
        print("fetched", len(index), flush=True)
        return self.images.fetch(index)


@registry("dataset").register("slow")
@spec
class SlowImages:
    augmentation = None
    facts = (1, 8, 8), 2

    def load(self):
        pixels = torch.arange(64 * 60, dtype=torch.int64).view(60, 1, 8, 8) % 256
        images = InMemory(pixels.to(torch.uint8), torch.arange(60) % 2)
        return Data(Slow(images), images, ("a", "b"))


try:
    run(tiny_recipe(data=SlowImages(), epochs=1000), out=sys.argv[1], device="cpu", preflight=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise SystemExit(130)
"""


def test_ctrl_c_ends_a_run_whose_images_are_slow(tmp_path: Path) -> None:
    """Once stops it after the step, twice at once; either way nothing hangs."""
    (tmp_path / "script.py").write_text(INTERRUPTED, encoding="utf-8")
    for times, code, said in ((1, 0, ""), (2, 130, "interrupted")):
        words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / f"run-{times}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            while "fetched 16" not in (line := process.stdout.readline()):
                assert line, process.communicate()[1]
            for _ in range(times):
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == code and said in out, err
