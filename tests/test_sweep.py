"""Sweeps: what is planned and refused, that trials are ordinary runs, and that workers share and inherit them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file

from robustkit import compare, load_recipe, override, run
from robustkit.cli.main import main
from robustkit.display import Silent
from robustkit.lock import locked
from robustkit.sweep import Search, Sweep, Trial, make_sweep, open_sweep, with_sweeps, work, workers
from robustkit.sweep.axes import Axis, axes_of, is_word, values_of

RECIPE = '''"""Small enough for a test."""

from robustkit import Model, Recipe, Suite, Validation
from robustkit.attacks import PGD
from robustkit.datasets import Synthetic
from robustkit.evaluation import Attacked, Clean
from robustkit.losses import CrossEntropy
from robustkit.schedules import Constant
from robustkit.threats import Linf

parts = dict(
    data=Synthetic(train=48, test=12, classes=4, size=8, channels=1),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=8 / 255),
    loss=CrossEntropy(),
    schedule=Constant(),
    epochs=2,
    batch_size=16,
    validation=Validation(images=16, train_images=0, attack=PGD(steps=1)),
    evaluation=(Suite(measures=(Clean(), Attacked(steps=2))),),
)
recipe = Recipe(**parts, attack=PGD(steps=1), control=Recipe(**parts, attack=None))
recipes = {"natural": Recipe(**parts, attack=None)}
'''
GRID = ["optimizer.lr=0.05,0.1", "seed=1,2"]


@pytest.fixture(scope="module", autouse=True)
def pictures_are_not_drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustkit.reporting.figures.draw", lambda folder, parts: [])
        yield


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a recipe, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(RECIPE)
    return "small.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished grid, for reading."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.py").write_text(RECIPE)
    words = [str(folder / "small.py"), *GRID, "--out", str(folder / "grid"), "--device", "cpu", "--quiet"]
    assert main(["sweep", *words]) == 0
    return folder / "grid"


def said(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """What the command says in one line where it refuses; nothing is made."""
    capsys.readouterr()
    before = sorted(Path().rglob("*"))
    assert main(["sweep", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


def facts(folder: Path) -> Any:
    return json.loads((folder / "recipe.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last.safetensors")


# What is planned


def test_words_become_axes() -> None:
    words = ["a.b=1,2", "epochs=3", "at=(1,2),(3,4)", "x=[1,[2,3]],'4,5'", "lr=1e-3..1/2:log", "n=1..8", "where=../a"]
    assert axes_of(words) == (
        Axis("a.b", ("1", "2")),
        Axis("epochs", ("3",)),
        Axis("at", ("(1,2)", "(3,4)")),
        Axis("x", ("[1,[2,3]]", "'4,5'")),
        Axis("lr", ("1e-3", "1/2"), "log"),
        Axis("n", ("1", "8"), "linear"),
        Axis("where", ("../a",)),
    )
    assert [is_word(text) for text in ("seed=1", "a.0.b=", "runs/x/seed=1", "a.py:b", "./seed=1")] == [
        True,
        True,
        *[False] * 3,
    ]


def test_a_grid_is_every_combination_of_values_and_recipes(recipe: str) -> None:
    sweep = make_sweep([recipe, "small.py:natural"], ["epochs=1", "optimizer.lr=1/20,0.1", "seed=1,2,3"])
    assert sweep.folder == Path("runs/small-sweep-1")
    expected = list(itertools.product(["small", "small-natural"], ["1/20", "0.1"], ["1", "2", "3"]))
    trials = sweep.trials()
    assert [tuple(sweep.values(trial).values()) for trial in trials] == expected
    assert trials[0].name == "small,optimizer.lr=1_20,seed=1"
    assert [trial.number for trial in trials] == list(range(1, 13))
    for trial, (_, lr, seed) in zip(trials, expected, strict=True):
        made = sweep.recipe(trial)
        assert (made.epochs, made.optimizer.lr, made.seed) == (1, eval(lr), int(seed))
        assert made.control is None and (made.attack is None) == trial.name.startswith("small-natural")
    assert open_sweep(sweep.folder) == sweep
    assert make_sweep([recipe], ["seed=1,2"]).folder == Path("runs/small-sweep-2")


def test_mistakes_are_found_before_anything_is_made(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, texts in {
        "optimizer.lr=0.1,-1": ("trial optimizer.lr=-1", "optimizer.lr", "got -1"),
        "seed=1,x": ("trial seed=x", "seed"),
        "optimzer.lr=1,2": ("optimizer",),
        "seed=1,,2": ("seed=1,,2", "empty"),
        "seed=1,2,1": ("'1' stands there twice",),
        "optimizer.lr=0.1,1/10": ("optimizer.lr=1_10: is the same recipe as optimizer.lr=0.1",),
        "optimizer.lr=0.1..0.2": ("optimizer.lr=0.1..0.2", "--search"),
        "epochs=3": ("nothing to vary",),
        "attack=pgd,none loss=cross-entropy,trades": ("trial attack=none,loss=trades",),
        "seed=1,2 --prune": ("--prune",),
        "seed=1,2 --trials 3": ("--search",),
    }.items():
        line = said(capsys, [recipe, *words.split()])
        assert all(text in line for text in texts), line
    assert "no such recipe" in said(capsys, ["smal.py", "seed=1,2"])
    assert "a recipe is missing" in said(capsys, ["seed=1,2"])


def test_a_folder_holds_one_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep([recipe], ["seed=1,2"], out="here")
    assert make_sweep([recipe], ["seed=1,2"], out="here") == sweep
    assert "another plan" in said(capsys, [recipe, "seed=1,3", "--out", "here"])
    assert "whose plan is made" in said(capsys, ["here", "seed=1,3"])
    Path("full").mkdir()
    Path("full", "file").touch()
    assert "full" in said(capsys, [recipe, "seed=1,2", "--out", "full"])
    Path(recipe).write_text(RECIPE.replace("epochs=2", "epochs=3"))
    assert "another plan" in said(capsys, [recipe, "seed=1,2", "--out", "here"])
    assert open_sweep("here").recipe(sweep.trials()[0]).epochs == 2  # what was planned, not what the file says now
    assert main(["resume", "here"]) == 2
    assert "robustkit sweep here" in capsys.readouterr().err


# What a worker does


def test_each_trial_is_an_ordinary_run(finished: Path, tmp_path: Path) -> None:
    folder = finished / "optimizer.lr=0.1,seed=2"
    base = attrs.evolve(load_recipe(finished.parent / "small.py"), control=None)
    run(override(base, ["optimizer.lr=0.1", "seed=2"]), out=tmp_path / "alone", device="cpu")
    assert facts(folder) == facts(tmp_path / "alone")
    ours, theirs = weights(folder), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in finished.iterdir() if path.is_dir()} == {
        ".trials",
        *(f"optimizer.lr={lr},seed={seed}" for lr in ("0.05", "0.1") for seed in (1, 2)),
    }
    assert (finished / "sweep-optimizer.lr.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_sweep_shows_its_table_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime for path in finished.glob("*/**/*")}
    assert main(["sweep", str(finished), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime for path in finished.glob("*/**/*")} == times
    assert [trial["values"] for trial in data["trials"]] == [
        {"optimizer.lr": lr, "seed": seed} for lr in ("0.05", "0.1") for seed in ("1", "2")
    ]
    for trial in data["trials"]:
        lines = Path(trial["folder"], "metrics.jsonl").read_text().splitlines()
        assert trial["held_out"] == max(json.loads(line)["validation"]["robust"] for line in lines)
        assert trial["epochs"] == 2 and trial["ended"] == "done"
    shares = [trial["results"]["last"]["clean"]["accuracy"] for trial in data["trials"][:2]]
    (spread,) = (
        entry
        for entry in data["comparison"]["seeds"]
        if entry["measure"] == "clean" and entry["checkpoint"] == "last" and "lr=0.05" in entry["runs"][0]
    )
    assert spread["mean"] == pytest.approx(statistics.mean(shares)) and spread["n"] == 2
    assert main(["sweep", str(finished), "--quiet"]) == 0
    table = capsys.readouterr().out
    assert f"{100 * statistics.mean(shares):.1f} ± {100 * statistics.stdev(shares):.2f}" in table
    assert "Differences" in table and "resolved" in table


def test_a_trial_that_fails_leaves_the_others_alone(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [recipe, "optimizer.lr=1e30,0.1", "epochs=1", "--out", "here", "--device", "cpu"]
    assert main(["sweep", *words, "--quiet"]) == 1
    captured = capsys.readouterr()
    failed, done = open_sweep("here").trials()
    assert (failed.ended, done.ended) == ("failed", "done")
    shown = " ".join(captured.out.split())  # a long line is broken where the table ends
    assert "not a finite number" in failed.line and failed.line in shown and "--retry" in captured.err
    open_sweep("here").write(attrs.evolve(failed, line="of before"))
    assert main(["sweep", *words, "--quiet"]) == 1 and open_sweep("here").trials()[0].line == "of before"
    assert main(["sweep", "here", "--device", "cpu", "--quiet", "--retry"]) == 1
    assert open_sweep("here").trials()[0].line == failed.line


def test_a_worker_takes_up_what_another_left(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial is left alone while its worker lives; killed, it goes on elsewhere to the very same weights."""
    monkeypatch.setattr("robustkit.sweep.worker.LOOK_EVERY", 0.1)
    sweep = make_sweep([str(finished.parent / "small.py")], GRID, out=tmp_path / "sweep")
    first, *others = sweep.trials()
    for trial in others:
        sweep.write(attrs.evolve(trial, ended="done"))
    run(sweep.recipe(first), out=sweep.path(first), device="cpu", max_steps=1)
    holding = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); time.sleep(99)"
    )
    lock = str(sweep.folder / ".trials" / "0001.lock")
    worker = subprocess.Popen([sys.executable, "-c", holding, lock], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None and worker.stdout.readline()
        assert work(sweep, device="cpu", max_time=0.5) == "time"
        assert not sweep.again(first).ended
    finally:
        worker.kill()
        worker.wait()
        assert worker.stdout is not None
        worker.stdout.close()
    assert work(sweep, device="cpu", max_time=60) == ""
    assert sweep.again(first).ended == "done"
    ours, theirs = weights(sweep.path(first)), weights(finished / first.name)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("seen", [True, False])
def test_a_trial_that_somebody_else_works_on_is_left_alone(
    seen: bool, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `robustkit resume` or `eval`, seen before or only when its run is to go on: it has not failed."""
    monkeypatch.setattr("robustkit.sweep.worker.LOOK_EVERY", 0.1)
    sweep = make_sweep([str(finished.parent / "small.py")], GRID, out=tmp_path / "sweep")
    first, second, *others = sweep.trials()
    for trial in others:
        sweep.write(attrs.evolve(trial, ended="done"))
    run(sweep.recipe(first), out=sweep.path(first), device="cpu", max_steps=1)
    if not seen:
        monkeypatch.setattr("robustkit.sweep.worker.holder", lambda folder: "")

    class Stop(Silent):
        def say(self, text: str) -> None:
            if "waiting for them" in text or "is in use by" in text:
                signal.raise_signal(signal.SIGTERM)

    with locked(sweep.path(first), print):
        assert work(sweep, device="cpu", max_time=60, display=Stop) == "time"
        assert (sweep.again(first).ended, sweep.again(second).ended) == ("", "done" if seen else "")
    assert work(sweep, device="cpu", max_time=60) == ""
    assert sweep.again(first).ended == "done"


def test_out_of_time(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [recipe, "seed=1,2", "epochs=2000", "validation.images=0", "--out", "here", "--device", "cpu"]
    began = time.monotonic()
    assert main(["sweep", *words, "--max-time", "1s"]) == 75
    assert time.monotonic() - began < 20
    assert "go on with: robustkit sweep here" in capsys.readouterr().err
    assert [trial.ended for trial in open_sweep("here").trials()] == ["", ""]
    assert (Path("here") / "seed=1" / "checkpoints" / "last.safetensors").is_file()


# Several workers of one command


def test_cores_are_divided_and_gpus_taken_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str, *arguments: Any) -> list[str | None]:
        return [variables.get(name) for variables in workers.environments(*arguments)]

    for count, cores, threads in ((2, 16, "8"), (3, 16, "5"), (4, 2, "1")):
        assert of("OMP_NUM_THREADS", count, cores) == [threads] * count
    assert of("ROBUSTKIT_WORKER", 3, 1) == ["1", "2", "3"]
    assert of("CUDA_VISIBLE_DEVICES", 5, 8, ["0", "GPU-a"]) == ["0", "GPU-a", "0", "GPU-a", "0"]
    assert of("CUDA_VISIBLE_DEVICES", 2, 8, ["0", "1", "2"]) == ["0", "1"]
    assert of("CUDA_VISIBLE_DEVICES", 2, 8, ["3"]) == of("CUDA_VISIBLE_DEVICES", 2, 8) == [None, None]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [workers.gpus_for(device) for device in (None, "cuda", "cpu", "cuda:1")] == [["0", "1"], ["0", "1"], [], []]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-a,-1,2")  # what stands behind -1 is not seen
    assert workers.gpus_for(None) == ["5", "GPU-a"]


def test_the_most_serious_exit_code_and_what_it_means() -> None:
    for codes, code, ending in [
        ([0, 0], 0, ""),
        ([75, 75], 75, "time"),
        ([75, 0], 75, ""),  # one was stopped, the other found all done
        ([130, 75], 130, "interrupt"),
        ([130, 1], 1, "interrupt"),
        ([2, 1, 0], 1, ""),
        ([75, 2], 2, "time"),
        ([1, 1], 1, "lost"),
    ]:
        assert (workers.most_serious(codes), workers.ending(codes)) == (code, ending), codes


def attended(*programs: str, come: tuple[int, ...] = ()) -> tuple[list[int], list[str]]:
    """Exit codes in the order of the programs, and what is said of them. Each says READY, there or first."""
    children = {}
    for number, program in enumerate(programs, start=1):
        told = program if "READY" in program else f"READY; {program}"
        code = f"import os, signal, sys, time; {told.replace('READY', 'print(flush=True)')}"
        children[number] = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        for child in children.values():
            assert child.stdout is not None and child.stdout.readline()
            child.stdout.close()
        said: list[str] = []
        codes = workers.attend(children, list(come), said.append)
        return codes, said
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def test_one_that_dies_is_named_and_takes_nobody_along() -> None:
    codes, said = attended("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(0.5)", "time.sleep(1); sys.exit(7)")
    assert codes == [1, 0, 1]
    assert [line.partition(";")[0] for line in said] == [
        "worker 1 of 3 was killed by SIGKILL: out of memory, or by hand",
        "worker 3 of 3 ended with exit code 7",
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_all_of_them(number: int, code: int) -> None:
    """Whether they listen already or not yet; nobody is complained of.

    READY comes last: Python may swallow the KeyboardInterrupt of a signal that hits it in the middle of an import.
    """
    listening = f"import threading; signal.signal({int(number)}, lambda *_: sys.exit({code})); READY; time.sleep(60)"
    deaf = f"signal.signal({int(number)}, signal.SIG_DFL); READY; time.sleep(60)"
    assert attended(deaf, listening, come=(number,)) == ([code, code], [])


def test_lines_of_workers_have_their_number() -> None:
    import io

    stream = io.StringIO()
    numbered = workers.Numbered(stream, "[2] ")
    for text in ("half a ", "line\nand another\n", "", "\n", "begun"):
        assert numbered.write(text) == len(text)
    assert stream.getvalue() == "[2] half a line\n[2] and another\n[2] \n" and not numbered.isatty()


def begun(sweep: Sweep) -> None:
    """One step of each trial is done, and no figures are to be drawn."""
    for trial in sweep.trials():
        run(sweep.recipe(trial), out=sweep.path(trial), device="cpu", max_steps=1)
        (sweep.path(trial) / "figures").mkdir()
        (sweep.path(trial) / "figures" / "examples.png").touch()


def test_two_workers_make_the_sweep_of_one(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # those of the one
    words = [str(finished.parent / "small.py"), GRID[0], "seed=1"]
    sweep = make_sweep(words[:1], words[1:], out="a=b")  # a name that could be a setting
    begun(sweep)
    assert main(["sweep", *words, "--out", "a=b", "--device", "cpu", "--workers", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    data, (first, *lines, figure, last) = json.loads(out), err.splitlines()
    assert [trial["ended"] for trial in data["trials"]] == ["done"] * 2 and data["stopped"] == ""
    assert first == "a=b: 2 trials, 2 workers" and last.startswith("Every run is in")
    assert {line[:4] for line in lines} <= {"[1] ", "[2] "} and sum("] Trial " in line for line in lines) == 2
    assert figure.startswith("Figure ") and (sweep.folder / "sweep-optimizer.lr.png").is_file()
    for trial in sweep.trials():
        ours, theirs = weights(sweep.path(trial)), weights(finished / f"{trial.name},seed=1")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def endless(recipe: str) -> Iterator[subprocess.Popen[str]]:
    """`robustkit sweep here --workers 2`, both of them training; each trial takes for ever."""
    sweep = make_sweep([recipe], ["seed=1,2,3", "epochs=100000", "validation.images=0"], out="here")
    command = [sys.executable, "-m", "robustkit", "sweep", "here", "--workers", "2", "--device", "cpu"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while sum((sweep.path(trial) / "metrics.jsonl").is_file() for trial in sweep.trials()) < 2:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        yield process
    finally:
        process.kill()  # its workers follow
        process.communicate(timeout=60)


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in text.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_a_command_with_workers(endless: subprocess.Popen[str], number: int, code: int) -> None:
    endless.send_signal(number)
    _, err = endless.communicate(timeout=60)
    assert endless.returncode == code and "Traceback" not in err
    assert err.splitlines()[-1].endswith("; go on with: robustkit sweep here")
    for seed in (1, 2):
        assert Path("here", f"seed={seed}", "checkpoints", "last.safetensors").is_file()
    assert [trial.ended for trial in open_sweep("here").trials()] == ["", "", ""]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc for processes")
def test_a_worker_that_is_killed_leaves_its_trial_to_the_others(endless: subprocess.Popen[str]) -> None:
    """To the next command, as the other worker is busy for ever."""
    first, _ = children(endless)
    os.kill(first, signal.SIGKILL)
    assert endless.stderr is not None
    lines = iter(endless.stderr.readline, "")
    assert next(line for line in lines if "worker" in line and "killed" in line).startswith("worker 1 of 2 was killed")
    sweep = open_sweep("here")
    taken = [lock is None for lock in map(sweep.claim, (1, 2, 3))]
    assert sum(taken) == 1  # by the other one, which goes on
    endless.send_signal(signal.SIGTERM)
    endless.communicate(timeout=60)
    assert endless.returncode == 1


@pytest.mark.slow
def test_workers_stop_in_order_when_their_parent_is_killed(endless: subprocess.Popen[str]) -> None:
    endless.kill()
    _, err = endless.communicate(timeout=60)  # once nobody holds the pipe
    assert err.count("Stopping after this step") == 2 and "Traceback" not in err
    sweep = open_sweep("here")
    assert all(lock is not None for lock in map(sweep.claim, (1, 2, 3)))
    assert [trial.ended for trial in sweep.trials()] == ["", "", ""]


# Search

SPACE = ["optimizer.lr=0.01..0.3:log", "batch_size=8..24", "attack=pgd,rs-fgsm", "epochs=1"]


def searched(recipe: str, words: list[str] = SPACE, **options: Any) -> Sweep:
    pytest.importorskip("optuna")
    settings: dict[str, Any] = {"method": "random", "trials": 4} | options
    return make_sweep([recipe], words, search=Search(**settings))


def end(sweep: Sweep, trial: Trial, *robust: float) -> None:
    """As if the trial had run: a value for each epoch."""
    sweep.path(trial).mkdir()
    rows = [{"epoch": epoch, "validation": {"robust": value}} for epoch, value in enumerate(robust, start=1)]
    (sweep.path(trial) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep.write(attrs.evolve(trial, ended="done"))


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_what_is_drawn_depends_on_what_was_seen_alone(recipe: str, method: str) -> None:
    sweeps = [searched(recipe, method=method, trials=14) for _ in range(2)]
    from robustkit.sweep.search import draw

    drawn: list[list[tuple[str, ...]]] = [[], []]
    for number in range(14):
        for sweep, words in zip(sweeps, drawn, strict=True):
            trial = draw(open_sweep(sweep.folder))  # a worker that was only just started
            words.append(trial.words)
            end(sweep, trial, number / 20)
            made = sweep.recipe(trial)
            assert 0.01 <= made.optimizer.lr <= 0.3 and made.batch_size in range(8, 25) and made.epochs == 1
            assert str(made.optimizer.lr) == values_of(sweep.axes, trial.words)["optimizer.lr"]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 14


def test_a_search_measures_its_best_trial_on_test_images_and_no_other(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    options = ["--search", "random", "--trials", "3", "--out", "here", "--device", "cpu", "--json", "--quiet"]
    assert main(["sweep", recipe, *SPACE, *options]) == 0
    data = json.loads(capsys.readouterr().out)
    held_out = [trial["held_out"] for trial in data["trials"]]
    assert held_out == sorted(held_out, reverse=True) and len(held_out) == 3
    assert [bool(trial["results"].get("last")) for trial in data["trials"]] == [True, False, False]
    assert {"clean", "pgd-20"} >= set(data["trials"][0]["results"]["last"]) > set()
    for trial in data["trials"]:
        assert facts(Path(trial["folder"]))["evaluation"] == []


def test_a_search_that_could_not_be_judged_is_refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    for words, text in {
        "seed=1,2": "seed: trials that differ in it",
        "threat.epsilon=0.01..0.1": "threat.epsilon: trials that differ in it",
        "optimizer.lr=0.3..0.1": "optimizer.lr=0.3..0.1: must go upwards",
        "optimizer.weight_decay=0..0.1:log": "begins above 0",
        "optimizer.lr=-1..0.1": "got -1",
        "model=1..2": "model",
        "batch_size=8.5..16": "batch_size",
        "epochs=1": "nothing to draw",
        "optimizer.lr=0.1,0.2 validation.images=0": "held-out images",
        "optimizer.lr=0.1,0.2 validation.attack=none": "held-out images",
    }.items():
        assert text in said(capsys, [recipe, *words.split(), "--search", "tpe", "--trials", "2"]), words
    words = [recipe, "small.py:natural", "optimizer.lr=0.1,0.2", "--search", "tpe", "--trials", "2"]
    assert "tunes one recipe" in said(capsys, words)


def test_optuna_is_asked_for_by_name(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "robustkit[sweep]" in said(capsys, [recipe, "optimizer.lr=0.1..0.2", "--search", "tpe", "--trials", "2"])
    assert len(make_sweep([recipe], ["seed=1,2"]).trials()) == 2  # grids need nothing


def test_a_trial_below_the_median_is_pruned(recipe: str) -> None:
    """Against the median of five trials' values at the same epoch: of the best so far."""
    sweep = searched(recipe, trials=9, prune=True)
    from robustkit.sweep.search import Pruned, Pruner, draw

    curves = [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6)]
    for curve in curves:
        end(sweep, draw(sweep), *curve)
    medians = [statistics.median(values) for values in zip(*curves, strict=True)]
    for values, pruned in {
        (medians[0] - 0.05,): True,
        (medians[0] + 0.05,): False,
        (medians[0] + 0.05, medians[1] - 0.01): True,
        (medians[1] + 0.01, 0.0): False,  # its best value counts
    }.items():
        trial = draw(sweep)
        end(sweep, trial, *values)
        sweep.write(trial)  # as of one that runs
        if pruned:
            with pytest.raises(Pruned):
                Pruner(sweep, trial).epoch({})
        else:
            Pruner(sweep, trial).epoch({})
        shutil.rmtree(sweep.path(trial))
        (sweep.folder / ".trials" / f"{trial.number:04}.json").unlink()


def test_a_pruned_trial_ends_there(recipe: str) -> None:
    sweep = searched(recipe, ["optimizer.lr=0.01..0.1", "epochs=3", "evaluation=()"], trials=6, prune=True)
    from robustkit.sweep.search import draw

    for _ in range(5):
        end(sweep, draw(sweep), 1.5)  # nothing real comes near
    assert work(sweep, device="cpu", max_time=60) == ""
    last = sweep.trials()[5]
    assert last.ended == "pruned" and len((sweep.path(last) / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_sweep_s_folder_stands_for_its_runs(finished: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sorted(str(path.parent) for path in finished.glob("*/results.json"))
    assert len(runs) > 2
    for paths in ([str(finished)], [str(finished / "sweep.json"), *runs], [*runs, str(finished)]):
        assert sorted(with_sweeps(paths)) == runs
    assert with_sweeps(["small.py", runs[1], runs[1]]) == ["small.py", runs[1], runs[1]]
    assert main(["compare", str(finished), "--json"]) == 0
    assert sorted(each["path"] for each in json.loads(capsys.readouterr().out)["compared"]) == runs
    assert main(["report", str(finished)]) == 0
    page = finished / "comparison.html"
    assert capsys.readouterr().out.strip() == str(page) and page.is_file()
    everything = sorted(map(str, finished.glob("[!.]*")))
    assert str(page) in everything and sorted(with_sweeps(everything)) == runs
    assert main(["report", *everything]) == 0
    assert sorted(item.path for item in compare(finished).items) == runs
    page.unlink()
    begun = make_sweep([recipe], ["seed=1,2"], out="begun")
    assert main(["report", str(begun.folder)]) == 2
    assert "none of the sweep's runs is measured yet" in capsys.readouterr().err
