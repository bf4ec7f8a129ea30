"""Files that are cut off, altered or gone: found, said, and never taken for what they were."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from robustkit import judging, load, resume, run, runs
from robustkit.attacks import PGD, Grouped
from robustkit.cli import main as cli
from robustkit.core import checkpoint
from robustkit.core.errors import CheckpointError, DamagedError, UserError
from robustkit.core.recipe import Recipe, Suite, save_recipe
from robustkit.display import Silent
from robustkit.epsilons import Curriculum
from robustkit.evaluation import Attacked, Clean
from robustkit.folder import read_metrics
from robustkit.limits import Limits
from robustkit.optimizers import SGD
from robustkit.runs import evaluate_run
from robustkit.testing import tiny_recipe

pytestmark = pytest.mark.usefixtures("no_figures")

RECIPE = tiny_recipe(evaluation=(Suite(measures=(Clean(), Attacked(key="pgd-3", steps=3))),))
CLOCKS = ("seconds", "images_per_second")


class Killed(Exception):
    pass


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to: four epochs of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(RECIPE, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after step 10; the checkpoint before that is of step 8."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(RECIPE, out=folder, device="cpu", max_steps=10)
    return folder


@pytest.fixture
def broken(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def last_of(folder: Path) -> Path:
    return folder / "checkpoints" / "last.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def vanish(path: Path) -> None:
    path.unlink()


def flip_in_the_facts(path: Path) -> None:
    """Its step becomes another one: the JSON is as good as before."""
    content = path.read_bytes()
    assert content.count(b'\\"step\\": 1') == 1
    path.write_bytes(content.replace(b'\\"step\\": 1', b'\\"step\\": 3'))


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return value


def assert_same(one: Path, other: Path, *names: str) -> None:
    for name in names or ("last", "best"):
        files = [folder / "checkpoints" / f"{name}.safetensors" for folder in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    assert [without_clocks(json.loads(line)) for line in lines[0]] == [
        without_clocks(json.loads(line)) for line in lines[1]
    ]
    for name in ("results.json", "outcomes.json"):
        found = [folder / name for folder in (one, other)]
        assert [path.is_file() for path in found] in ([True, True], [False, False])
        if found[0].is_file():
            assert len({json.dumps(without_clocks(json.loads(path.read_text()))) for path in found}) == 1


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# One file


def test_whatever_is_altered_is_found(tmp_path: Path) -> None:
    """One bit of each byte, tensors and facts alike; and a file that ends too early."""
    path, spoilt = tmp_path / "whole.safetensors", tmp_path / "spoilt.safetensors"
    tensors = {"model.a": torch.arange(6.0), "model.b": torch.tensor(3), "flag": torch.tensor([True])}
    checkpoint.write(path, tensors, {"step": 12, "recipe": {"lr": 0.1, "names": ["a", "b"]}, "best": {}})
    content = path.read_bytes()
    chooser = random.Random(0)
    for at in range(len(content)):
        bit = 1 << chooser.randrange(8)
        spoilt.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        with pytest.raises(DamagedError):
            checkpoint.read(spoilt)
            raise AssertionError(f"bit {bit} of byte {at}, {content[max(0, at - 9) : at + 9]!r}, may change unseen")
    for at in range(0, len(content), 7):
        spoilt.write_bytes(content[:at])
        with pytest.raises(DamagedError):
            checkpoint.read(spoilt)
    spoilt.write_bytes(content)
    assert checkpoint.read(spoilt)[1] == checkpoint.facts_of(path)


def test_checkpoints_of_before_facts_had_a_checksum_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "new.safetensors"
    checkpoint.write(path, {"a": torch.ones(2)}, {"step": 3})
    tensors, facts = checkpoint.read(path)
    save_file(tensors, tmp_path / "old.safetensors", metadata={"robustkit": json.dumps(facts, sort_keys=True)})
    assert (
        checkpoint.read(tmp_path / "old.safetensors")[1] == facts == checkpoint.facts_of(tmp_path / "old.safetensors")
    )


def test_a_file_cut_off_in_writing_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever call of the disk the writing ends, the newest whole one is there, and the next writing heals all."""
    path = tmp_path / "checkpoints" / "last.safetensors"
    for call in range(1, 40):
        shutil.rmtree(path.parent, ignore_errors=True)
        for step in (1, 2, 3):
            checkpoint.write(path, {"a": torch.full((3,), float(step))}, {"step": step}, keep_previous=True)
        left = [call]

        def ending(number: int, *arguments: Any, left: list[int] = left, do: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed(number)
            return do(number, *arguments, **options)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "link"), (os, "open"), (Path, "replace"), (Path, "unlink")):
                original = getattr(owner, name)

                def stand_in(*arguments: Any, original: Any = original, **options: Any) -> Any:
                    return ending(*arguments, do=original, **options)

                patch.setattr(owner, name, stand_in)
            try:
                checkpoint.write(path, {"a": torch.full((3,), 4.0)}, {"step": 4}, keep_previous=True)
                done = True
            except Killed:
                done = False
        steps = [checkpoint.read(file)[1]["step"] for file in (path, checkpoint.previous(path)) if file.is_file()]
        assert steps in ([3, 2], [3, 3], [4, 3]), (call, steps)
        checkpoint.write(path, {"a": torch.full((3,), 5.0)}, {"step": 5}, keep_previous=True)
        newest = [checkpoint.read(file)[1]["step"] for file in (path, checkpoint.previous(path))]
        assert newest == [5, steps[0]]
        assert not list(path.parent.glob("*.partial"))
        if done:
            assert call > 8
            return
    raise AssertionError("the writing never came to its end")


def test_file_systems_without_second_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "last.safetensors"
    for step in (1, 2, 3):
        checkpoint.write(path, {"a": torch.ones(1)}, {"step": step}, keep_previous=True)
    assert [checkpoint.facts_of(file)["step"] for file in (path, checkpoint.previous(path))] == [3, 2]


# A run's last checkpoint


@pytest.mark.parametrize("spoil", [cut, flip, empty, vanish, flip_in_the_facts])
def test_the_one_before_is_used(spoil: Any, broken: Path, whole: Path) -> None:
    spoil(last_of(broken))
    spoilt = last_of(broken).read_bytes() if spoil is not vanish else None
    display = Listening()
    assert resume(broken, device="cpu", display=display).stopped == ""
    (said,) = [line for line in display.said if "last.safetensors" in line]
    assert "going on from the one before it, of step 8" in said
    damaged = broken / "checkpoints" / "last.safetensors.damaged"
    assert ("set aside: last.safetensors.damaged" in said) == damaged.is_file() == (spoilt is not None)
    assert spoilt is None or damaged.read_bytes() == spoilt
    assert_same(whole, broken)


def test_damaged_again_and_again(broken: Path, whole: Path) -> None:
    """Each one that was damaged stays."""
    for step in (11, 12):
        cut(last_of(broken))
        resume(broken, device="cpu", max_steps=step)
    flip(last_of(broken))
    resume(broken, device="cpu")
    assert len(list((broken / "checkpoints").glob("*.damaged*"))) == 3
    assert_same(whole, broken)


def test_a_finished_run_is_made_again(whole: Path, tmp_path: Path) -> None:
    """Its results are of weights that are gone: they are set aside and measured again."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    flip(last_of(folder))
    display = Listening()
    outcome = resume(folder, device="cpu", display=display)
    (said,) = [line for line in display.said if "last.safetensors" in line]
    assert "results.json.lost" in said and "outcomes.json.lost" in said and "step 12" in said
    assert outcome.stopped == "" and without_clocks(outcome.results["last"]["clean"]).keys() > {"accuracy", "n"}
    assert (folder / "results.json.lost").read_text() == (whole / "results.json").read_text()
    assert_same(whole, folder)


def test_none_is_whole(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(last_of(broken))
    flip(checkpoint.previous(last_of(broken)))
    before = contents(broken)
    assert cli.main(["resume", str(broken), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "no checkpoint is whole" in line and f"robustkit run {broken} --out" in line
    assert "last.safetensors: truncated" in line and "last.previous.safetensors: damaged" in line
    assert contents(broken) == before
    for path in (last_of(broken), checkpoint.previous(last_of(broken))):
        path.unlink()
    for name in ("last.json", "best.json"):
        (broken / "checkpoints" / name).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):  # and not: begun from the beginning
        resume(broken, device="cpu")


@pytest.mark.parametrize("command", ["eval", "audit", "export", "predict", "load", "evaluate_run"])
def test_no_other_one_is_judged_in_its_place(
    command: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(last_of(broken))
    before = contents(broken)
    words = {
        "eval": ["eval", str(broken), "--device", "cpu"],
        "audit": ["audit", str(broken), "--device", "cpu"],
        "export": ["export", str(broken), "--to", "safetensors", "--out", str(tmp_path / "out")],
        "predict": ["predict", str(broken), str(tmp_path / "picture.png"), "--checkpoint", "last"],
    }
    if command in words:
        assert cli.main(words[command]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
    else:
        with pytest.raises(CheckpointError) as error:
            load(broken) if command == "load" else evaluate_run(broken, device="cpu")
        line = str(error.value)
    assert "last.safetensors: damaged" in line
    assert f"last.previous.safetensors of step 8, is whole: robustkit resume {broken} goes on from there" in line
    assert contents(broken) == before and not (tmp_path / "out").exists()


def test_a_best_checkpoint_that_is_gone_is_missed(broken: Path) -> None:
    """It was passed over as if nothing had been held out."""
    (broken / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors: no such checkpoint"):
        evaluate_run(broken, device="cpu")


def cat() -> Recipe:
    """Goes back to the best weights of a stage to begin the next."""
    return tiny_recipe(
        epsilon=Curriculum(patience=1, train_accuracy=0.0, stages=2),
        attack=Grouped(inner=PGD(steps=2, mode="train")),
        optimizer=SGD(lr=0.3, momentum=0.9),
        epochs=8,
    )


def test_weights_kept_in_an_epoch_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just after weights were kept, and the checkpoint damaged in which training had gone back to others.

    The epoch that goes back comes again, and must go back to those that were kept before it.
    """
    run(cat(), out=tmp_path / "whole", device="cpu", preflight=False)
    write, went_back = checkpoint.write, []

    def watching(path: Path, tensors: Any, facts: Any, **options: Any) -> None:
        write(path, tensors, facts, **options)
        if path.stem == "last" and facts["best"].get("rewound") == facts["step"]:
            went_back.append(facts["step"])
        if path.stem == "kept" and went_back:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", watching)
        with pytest.raises(Killed):
            run(cat(), out=tmp_path / "parts", device="cpu", preflight=False)
    kept = tmp_path / "parts" / "checkpoints" / "kept.safetensors"
    assert (
        checkpoint.facts_of(kept)["step"]
        == went_back[0] + 4
        == checkpoint.facts_of(last_of(kept.parents[1]))["step"] + 4
    )
    cut(last_of(tmp_path / "parts"))
    resume(tmp_path / "parts", device="cpu")
    assert_same(tmp_path / "whole", tmp_path / "parts", "last", "best", "kept")


# The other files


def test_metrics_that_are_missing_are_said(broken: Path) -> None:
    path = broken / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    display = Listening()
    resume(broken, device="cpu", display=display)
    assert any("has 1 of 2 epochs" in line for line in display.said)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 3, 4]


@pytest.mark.parametrize("damage", [b'{"epoch": 2, "gra', b'{"epoch": 2}\n', b"\xff\x00\n", b"\n"])
def test_a_line_of_the_metrics_that_is_damaged_is_dropped(broken: Path, damage: bytes) -> None:
    """As a disk may leave it that had lost its power: it is said, and the run goes on to its end."""
    path = broken / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + damage)
    display = Listening()
    resume(broken, device="cpu", display=display)
    assert any("has 1 of 2 epochs" in line for line in display.said)
    assert [report["epoch"] for report in read_metrics(broken)] == [1, 3, 4]


def test_killed_between_outcomes_and_results(broken: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure is done when both have it: otherwise its outcomes would never be written."""
    for name in ("write_outcomes", "write_results"):

        def end(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(judging, name, end)
            with pytest.raises(Killed):
                resume(broken, device="cpu")
    resume(broken, device="cpu")
    assert_same(whole, broken)


def test_a_ledger_with_strange_bytes(broken: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(judging, "write_outcomes", end)
        with pytest.raises(Killed):
            resume(broken, device="cpu")
    (ledger,) = (broken / "evaluation").glob("*.jsonl")
    flip(ledger, 5)
    content = ledger.read_bytes()
    ledger.write_bytes(content[:9] + b"\xff\xfe" + content[11:])
    resume(broken, device="cpu")
    assert_same(whole, broken)


def test_figures_are_drawn_until_all_are_there(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    drawn: list[Path] = []
    figures = broken / "figures"
    figures.mkdir()
    (figures / "curves.png").write_bytes(b"")  # killed after the first, or `eval --curves` was here before
    monkeypatch.setattr(sys.modules["robustkit.reporting.figures"], "draw", lambda folder, parts: drawn.append(folder))
    resume(broken, device="cpu")
    assert drawn == [broken]
    (figures / "examples.png").write_bytes(b"")
    resume(broken, device="cpu")
    assert drawn == [broken]


# Beginnings


def test_killed_before_it_was_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """The same command finds its folder free; a folder with anything else in it is refused."""
    source = tmp_path / "recipe.json"
    save_recipe(RECIPE, source)
    for owner, name in ((runs, "write_facts"), (checkpoint, "write_text"), (checkpoint, "replace")):

        def end(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, end)
            with pytest.raises(Killed):
                run(RECIPE, out=tmp_path / "run", source=source, device="cpu")
        assert not (tmp_path / "run" / "recipe.json").exists()
    run(RECIPE, out=tmp_path / "run", source=source, device="cpu", max_steps=1)
    assert not (tmp_path / "run" / ".begun").exists()
    with pytest.raises(UserError, match="not empty"):
        run(RECIPE, out=tmp_path / "run", device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.py").write_text("")
    with pytest.raises(UserError, match="not empty"):
        run(RECIPE, out=tmp_path / "mine", device="cpu")
    resume(tmp_path / "run", device="cpu")
    assert_same(whole, tmp_path / "run")


def test_sigterm_before_and_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", lambda words: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["run", "nothing.py"]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(cli, "_dispatch", lambda words: 0)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["list"])))  # where no signal can be listened to
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    limits = Limits()

    def say(text: str) -> None:
        raise OSError(5, "Input/output error")

    with limits.listening(say):
        os.kill(os.getpid(), signal.SIGTERM)
    assert limits.asked == "time"
