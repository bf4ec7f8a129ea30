"""Two processes and one run folder: the second is refused in one line, whatever it is, and nothing is harmed."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from robustkit import lock, resume, run
from robustkit.cli.main import main
from robustkit.core.errors import UserError
from robustkit.core.loop import Failure
from robustkit.core.recipe import Suite, save_recipe
from robustkit.core.world import World
from robustkit.display import Silent
from robustkit.evaluation import Attacked, Clean
from robustkit.folder import new_folder
from robustkit.lock import InUseError, holder, locked, locked_by_first
from robustkit.runs import evaluate_run
from robustkit.testing import tiny_recipe

RECIPE = tiny_recipe(evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-3", steps=3))),))
WORLD = World(samples=0, training=0, classes=0, image_shape=(0, 0, 0))
HOLD = """
import sys, time
from pathlib import Path
from robustkit.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""
COUNT = """
import sys, time
from pathlib import Path
from robustkit.lock import InUseError, locked
folder, times = Path(sys.argv[1]), int(sys.argv[2])
while times:
    try:
        with locked(folder, print):
            found = int((folder / "count").read_text())
            time.sleep(0.001)
            (folder / "count").write_text(str(found + 1))
            times -= 1
    except InUseError:
        pass
"""


@pytest.fixture(scope="module", autouse=True)
def pictures_are_not_drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustkit.reporting.figures.draw", lambda folder, parts: [])
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures_are_not_drawn: None) -> Path:
    return run(RECIPE, out=tmp_path_factory.mktemp("finished") / "run", device="cpu").folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(RECIPE, out=tmp_path_factory.mktemp("stopped") / "run", device="cpu", max_steps=3).folder


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """By another process, which is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([*words, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and captured.err.splitlines()[-1] == line
    return line


def test_whoever_would_write_is_refused(
    finished: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part, begun = tmp_path / "whole", tmp_path / "part", tmp_path / "begun"
    shutil.copytree(finished, whole)
    shutil.copytree(stopped, part)
    (begun / ".begun").mkdir(parents=True)  # another run is only just beginning there
    save_recipe(RECIPE, tmp_path / "recipe.json")
    for folder, *commands in (
        (whole, "eval RUN --again", "audit RUN --limit 4", "eval RUN --curves steps --limit 4"),
        (whole, "report RUN --figure strength --images 4"),
        (part, "resume RUN"),
        (begun, f"run {tmp_path / 'recipe.json'} --out RUN"),
    ):
        with held(folder) as process:
            before = contents(folder)
            for command in commands:
                line = refused(command.replace("RUN", str(folder)).split(), capsys)
                assert line == (
                    f"error: {folder}: is in use by process {process.pid} on {platform.node()}; "
                    "wait until it has ended, or stop it"
                )
            assert contents(folder) == before


def test_reading_needs_no_lock(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    with held(folder):
        out = str(tmp_path / "page.html")
        both = [str(folder), str(finished)]
        commands = (["show", str(folder)], ["compare", *both], ["report", *both, "--out", out])
        for words in (*commands, ["export", str(folder), "--to", "safetensors", "--out", str(tmp_path / "model")]):
            assert main(words) == 0, capsys.readouterr().err


def test_a_quick_look_is_free_and_leaves_nothing(stopped: Path, finished: Path, tmp_path: Path) -> None:
    """Provisional results are kept nowhere; notes for going on are made where nobody else is at work."""
    for number, (source, options) in enumerate(((finished, {"limit": 4, "again": True}), (stopped, {}))):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        with held(folder) as process:
            before, said = contents(folder), Told()
            outcome = evaluate_run(folder, device="cpu", display=said, **options)
            assert outcome.results["last"]["clean"]["n"] == options.get("limit", 16)
            assert contents(folder) == before
        assert f"in use by process {process.pid}" in said.lines[1]


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_killed_process_leaves_no_lock(finished: Path, stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    with held(folder):
        pass
    assert (folder / ".lock").is_file() and holder(folder) == ""
    assert resume(folder, device="cpu").stopped == ""
    assert not (folder / ".lock").exists()
    last = [path / "checkpoints" / "last.safetensors" for path in (folder, finished)]
    assert last[0].read_bytes() == last[1].read_bytes()


class Watch(Silent):
    """Asks, in the midst of a run, who is at it."""

    def __init__(self, fail: BaseException | None = None) -> None:
        self.seen: set[str] = set()
        self._fail = fail

    def begin(self, recipe: Any, folder: Path, parts: Any) -> None:
        self.folder = folder

    def step(self, progress: Any, totals: Any) -> None:
        self.seen.add(holder(self.folder))
        if self._fail is not None:
            raise self._fail


def test_held_from_the_beginning_to_the_end_and_no_longer(tmp_path: Path) -> None:
    """However it ends; and the same process goes on with it."""
    folder, us = tmp_path / "run", f"process {os.getpid()} on {platform.node()}"
    for fail in (Failure("broken"), KeyboardInterrupt(), OSError(errno.EIO, "broken")):
        watch = Watch(fail)
        with pytest.raises((Failure, KeyboardInterrupt, OSError)):
            if folder.exists():
                resume(folder, device="cpu", display=watch)
            else:
                run(attrs.evolve(RECIPE, control=RECIPE), out=folder, device="cpu", display=watch)
        assert watch.seen == {us} and not (folder / ".lock").exists()
    watch = Watch()
    assert resume(folder, device="cpu", display=watch).stopped == ""
    assert watch.seen == {us} and watch.folder == folder / "control"
    assert not list(folder.rglob(".lock"))


def test_one_at_a_time(tmp_path: Path) -> None:
    """Processes that add to a number in a file, each its own way in between, lose nothing."""
    (tmp_path / "count").write_text("0")
    words = [sys.executable, "-c", COUNT, str(tmp_path), "40"]
    processes = [subprocess.Popen(words) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120"
    assert not (tmp_path / ".lock").exists()


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(None, "x.py", WORLD, print) as one, new_folder(None, "x.py", WORLD, print) as other:
        assert [one, other] == [Path("runs", "x-1"), Path("runs", "x-2")]


def test_a_run_made_while_we_waited_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder was that of a run only just beginning when we looked first."""

    @contextmanager
    def slowly(folder: Path, say: Any) -> Iterator[None]:
        monkeypatch.undo()
        shutil.rmtree(folder)
        run(RECIPE, out=folder, device="cpu", max_steps=1)
        yield

    monkeypatch.setattr("robustkit.folder.locked", slowly)
    with pytest.raises(UserError, match="not empty"):
        run(RECIPE, out=tmp_path / "run", device="cpu")
    assert resume(tmp_path / "run", device="cpu").stopped == ""


def test_a_folder_that_may_not_be_written_can_be_read(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    before = contents(finished)
    monkeypatch.setattr(lock, "_open", read_only)
    with locked(finished, pytest.fail):
        assert contents(finished) == before and holder(finished) == ""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    monkeypatch.setattr(lock, "_told", set())
    said: list[str] = []
    for _ in range(3):
        with locked(tmp_path, said.append):
            assert holder(tmp_path) == ""
    (line,) = said
    assert f"{tmp_path}: cannot be locked ({os.strerror(number)})" in line


def test_without_unix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "_told", set())
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert holder(tmp_path) == "" and len(said) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "1", "host": 2}', "\x00" * 10])
def test_who_it_is_may_be_unknown(content: str, tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(InUseError, match="in use by another process"), locked(tmp_path, print):
            pass


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_stranger_s_lock_is_not_followed(kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "run" / ".lock"
    target.write_text("mine")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(target), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    assert holder(path.parent) == ""
    with locked(path.parent, print):
        pass
    assert target.read_text() == "mine"


def test_a_folder_that_moves_takes_its_lock_along(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with locked(here, print):
        here.rename(there)
        here.mkdir()
        with locked(here, print):
            assert holder(here) and holder(there)
        assert not holder(here)
        with held(here):
            pass
        assert (here / ".lock").exists()
    assert (here / ".lock").exists() and not holder(there)  # ours went with the folder: theirs is theirs


def test_every_process_hears_of_the_first_one_s_refusal(tmp_path: Path) -> None:
    class Second(World):  # type: ignore[misc]
        """Of two; the first has been refused."""

        def share(self, value: Any) -> Any:
            assert value is None and self.rank == 1
            return InUseError("is in use", place="run")

    second = Second(**attrs.asdict(WORLD, recurse=False) | {"rank": 1, "size": 2})
    with pytest.raises(InUseError, match="run: is in use"), locked_by_first(tmp_path, second, print):
        pass
    assert list(tmp_path.iterdir()) == []
