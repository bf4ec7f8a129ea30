"""`robustkit run --processes N` as a user starts it: one voice, exit codes, ranks that are killed, stuck or broken.

That several processes compute what one does is in test_processes.py, for every strategy; here runs change their number
of processes in the middle.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import driver
import pytest
from test_processes import DEADLINE, MOMENTUM, RECIPES, SMOOTH, WEIGHTS, distance, metrics, recipe, tensors

from robustkit import evolve, resume, run
from robustkit.attacks import PGD, Dynamic, Friendly
from robustkit.core.recipe import Recipe, save_recipe
from robustkit.datasets import Synthetic
from robustkit.optimizers import SGD
from robustkit.runs import evaluate_run
from robustkit.targets import Universal

RECIPE = recipe(epochs=8, optimizer=SGD(lr=0.01))  # of 3 steps each

FILE = """
import atexit, os, signal, time
from robustkit import UserError, load_recipe
from robustkit.core import loop

recipe = load_recipe({path!r})
train_step = loop.train_step


def troubled(parts, rows):
    if parts.step == 13 and parts.world.rank == {rank}:
        {trouble}
    train_step(parts, rows)


loop.train_step = troubled
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, no_figures: None) -> Path:
    """The run of one process that never stopped."""
    return run(RECIPE, out=tmp_path_factory.mktemp("one") / "run", device="cpu").folder


def file_of(folder: Path, recipe: Recipe = RECIPE, trouble: str = "pass", rank: int = 1) -> str:
    """A recipe file, with trouble in one process before the 14th step."""
    save_recipe(recipe, folder / "recipe.json")
    path = folder / "recipe.py"
    path.write_text(FILE.format(path=str(folder / "recipe.json"), trouble=trouble, rank=rank))
    return str(path)


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """`robustkit WORDS`, as from a shell that sets nothing of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "robustkit", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=kept | environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Its exit code, the lines on standard error, and standard output."""
    try:
        out, said = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, said.splitlines(), out


def errors(lines: list[str]) -> list[str]:
    """The lines that tell of a failure, of whatever kind."""
    return [line for line in lines if any(word in line.lower() for word in ("error", "traceback", "warn", "abort"))]


def same_run(folder: Path, one: Path) -> None:
    """Weights within the tolerances of test_processes.py; accuracies, and the outcome of every image, exactly."""
    mine, theirs = tensors(folder), tensors(one)
    assert mine.keys() == theirs.keys()
    for key in mine:
        if key.startswith(("model.", "optimizer.")) and mine[key].is_floating_point():
            limit = WEIGHTS if key.startswith("model.") else MOMENTUM
            assert distance(theirs[key], mine[key]) < limit, key
    for a, b in zip(metrics(folder), metrics(one), strict=True):
        for key in ("epoch", "step", "validation"):
            assert a[key] == b[key], key
    assert json.loads((folder / "outcomes.json").read_text()) == json.loads((one / "outcomes.json").read_text())


def test_a_rank_that_is_killed(tmp_path: Path, one: Path, no_figures: None) -> None:
    """One line, no other process is left, and one process goes on to the result of a run that was never stopped."""
    path = file_of(tmp_path, trouble="os.kill(os.getpid(), signal.SIGKILL)")
    began = time.monotonic()
    code, said, _ = ended(start("run", path, "--out", str(tmp_path / "run"), "--processes", "2", "--device", "cpu"))
    assert time.monotonic() - began < 60
    assert code == 1
    (line,) = errors(said)
    assert line.startswith("error: process 1 of 2 was killed by SIGKILL")
    assert said[-1] == line
    resume(tmp_path / "run", device="cpu")
    same_run(tmp_path / "run", one)


def test_from_one_to_two(tmp_path: Path, one: Path, no_figures: None) -> None:
    """And only the first process speaks; nothing goes wrong at the interpreters' exit."""
    folder = run(RECIPE, out=tmp_path / "run", device="cpu", max_steps=10).folder
    (folder / "figures").mkdir()  # so that none are drawn
    code, said, out = ended(start("resume", str(folder), "--processes", "2", "--device", "cpu", "--json"))
    assert code == 0, said
    assert errors(said) == []
    assert sum("Going on after step 10 of 24" in line for line in said) == 1
    assert json.loads(out)["stopped"] == ""
    same_run(folder, one)


def outcomes(folder: Path) -> Any:
    """Of every image under every measure, and the accuracies."""
    results = json.loads((folder / "results.json").read_text())
    accuracies = {name: {key: entry["accuracy"] for key, entry in found.items()} for name, found in results.items()}
    return accuracies, json.loads((folder / "outcomes.json").read_text())


def test_evaluation(tmp_path: Path, one: Path) -> None:
    """What is measured by two processes is what one measures, image by image, and one of them speaks."""
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    for name in ("results.json", "outcomes.json"):
        (folder / name).unlink()
    words = ("--processes", "2", "--device", "cpu", "--json")
    code, said, out = ended(start("eval", str(folder), *words))
    assert code == 0, said
    assert errors(said) == []
    assert json.loads(out)["results"].keys() == {"last", "best"}
    assert outcomes(folder) == outcomes(one)


@pytest.mark.slow
def test_evaluation_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """By a signal to two processes in the middle of AutoAttack; three go on with it to what one would have found."""
    made = run(evolve(RECIPE, evaluation=()), out=tmp_path / "run", device="cpu").folder
    for name in ("one", "three"):
        shutil.copytree(made, tmp_path / name)
    evaluate_run(tmp_path / "one", suite="standard", checkpoints=("last",), device="cpu")
    folder = tmp_path / "three"
    words = ("eval", str(folder), "--suite", "standard", "--checkpoint", "last", "--device", "cpu", "--processes")
    process = start(*words, "2")
    until = time.monotonic() + DEADLINE
    while not list((folder / "evaluation").glob("*autoattack*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, said, _ = ended(process)
    assert (code, errors(said)) == (75, [])
    assert said[-1] == "Stopped; the same command goes on where it was"
    assert outcomes(folder)[0]["last"].keys() == {"clean", "pgd-20", "cw"}
    code, said, _ = ended(start(*words, "3"))
    assert (code, errors(said)) == (0, [])
    assert outcomes(folder) == outcomes(tmp_path / "one")
    assert not list((folder / "evaluation").glob("*autoattack*"))


FUNCTION = """
import robustkit

def model():
    return robustkit.load({folder!r})
"""


@pytest.mark.slow
def test_evaluation_of_a_function_s_model(tmp_path: Path, one: Path) -> None:
    (tmp_path / "made.py").write_text(FUNCTION.format(folder=str(one)))
    data = ("data=synthetic", "data.train=70", "data.test=21", "data.classes=4", "data.size=8", "data.channels=1")
    found = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        words = ("eval", "made:model", *data, "--out", str(out), "--measures", "clean,pgd-20,cw", "--device", "cpu")
        code, said, _ = ended(start(*words, "--processes", processes, PYTHONPATH=str(tmp_path)))
        assert (code, errors(said)) == (0, [])
        found.append(outcomes(out))
    assert found[0] == found[1]


@pytest.mark.slow
def test_from_two_to_four(tmp_path: Path, one: Path) -> None:
    path, folder = file_of(tmp_path), tmp_path / "run"
    first = start("run", path, "--out", str(folder), "--processes", "2", "--device", "cpu", "--max-steps", "10")
    assert ended(first)[0] == 0
    environment = json.loads((folder / "environment.json").read_text())
    cores = len(os.sched_getaffinity(0))
    assert environment["processes"] == 2
    assert environment["threads"] == int(os.environ.get("OMP_NUM_THREADS", max(1, cores // 2)))
    assert ended(start("resume", str(folder), "--processes", "4", "--device", "cpu"))[0] == 0
    same_run(folder, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "rank", "code", "expected"),
    [
        ("raise ValueError('boom')", 1, 1, "error: process 1 of 3: ValueError: boom"),
        ("raise OSError(28, 'No space left on device', 'last')", 0, 1, "error: last: No space left on device"),
        ("raise UserError('not found', place='pictures')", 2, 2, "error: process 2 of 3: pictures: not found"),
        ("raise UserError('not found', place='pictures')", "parts.world.rank", 2, "error: pictures: not found"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 0, 1, "error: process 0 of 3 was killed by SIGKILL"),
        ("os.abort()", 2, 1, "error: process 2 of 3 was ended by SIGABRT"),
        ("os._exit(5)", 1, 5, "error: process 1 of 3 ended with exit code 5"),
        ("time.sleep(600)", 1, 1, "error: process 1 of 3 did not come to an exchange within 8 s"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 1, 1, "error: process 1 of 3 gives no sign of life"),
    ],
)
def test_trouble_in_one_process(
    trouble: str, rank: int, code: int, expected: str, tmp_path: Path, one: Path, no_figures: None
) -> None:
    path, folder = file_of(tmp_path, trouble=trouble, rank=rank), tmp_path / "run"
    words = ("run", path, "--out", str(folder), "--processes", "3", "--device", "cpu", "--quiet")
    found, said, _ = ended(start(*words, ROBUSTKIT_TIMEOUT="8"))
    lines = [line for line in said if line.startswith("error: ")]
    assert found == code, said
    assert len(lines) == 1
    assert lines[0].startswith(expected)
    resume(folder, device="cpu")
    same_run(folder, one)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals(number: int, code: int, tmp_path: Path) -> None:
    """To the process that was started; what it saved goes on."""
    path, folder = file_of(tmp_path, evolve(RECIPE, epochs=100_000)), tmp_path / "run"
    process = start("run", path, "--out", str(folder), "--processes", "2", "--device", "cpu")
    _until_an_epoch_is_done(folder)
    process.send_signal(number)
    found, said, _ = ended(process)
    assert found == code
    assert errors(said) == []
    assert said[-1].endswith(f"go on with: robustkit resume {folder}")
    more = ("resume", str(folder), "--processes", "2", "--device", "cpu", "--max-time", "2s")
    assert ended(start(*more))[0] == 75


@pytest.mark.slow
def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """Its processes stop as if time were up."""
    path, folder = file_of(tmp_path, evolve(RECIPE, epochs=100_000)), tmp_path / "run"
    process = start("run", path, "--out", str(folder), "--processes", "2", "--device", "cpu")
    _until_an_epoch_is_done(folder)
    process.kill()
    _, said, _ = ended(process)  # once nobody holds the pipe
    assert said[-1].endswith(f"go on with: robustkit resume {folder}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_the_slower_one_to_leave_is_told_to(number: str, code: int, tmp_path: Path) -> None:
    """As by srun --kill-on-bad-exit, and torchrun: SIGTERM to one that is done keeps its exit code."""
    path = file_of(tmp_path, trouble=f"atexit.register(time.sleep, 20); os.kill(os.getpid(), signal.{number})", rank=0)
    words = ("run", path, "--out", str(tmp_path / "run"), "--device", "cpu")
    where = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(driver.free_port()),
        "OMP_NUM_THREADS": "1",
    }
    first, second = (start(*words, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(2))
    assert ended(second)[0] == code
    first.send_signal(signal.SIGTERM)
    assert ended(first)[0] == code


def _until_an_epoch_is_done(folder: Path) -> None:
    until = time.monotonic() + DEADLINE
    while not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text()):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (("torch.distributed.run", "--nproc-per-node", "2"), 2),
        # On a CPU accelerate starts more than one with MPI only.
        (("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"), 1),
    ],
)
def test_other_launchers(launcher: tuple[str, ...], processes: int, tmp_path: Path, one: Path) -> None:
    path = file_of(tmp_path)
    command = [sys.executable, "-m", *launcher, "-m", "robustkit", "run", path, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == processes
    same_run(tmp_path / "run", one)


@pytest.mark.slow
def test_too_many_for_the_batch(tmp_path: Path) -> None:
    path = file_of(tmp_path, evolve(RECIPE, batch_size=3))
    code, said, _ = ended(start("run", path, "--out", str(tmp_path / "run"), "--processes", "4", "--device", "cpu"))
    assert code == 2
    assert said == [
        "error: batch_size: the smallest batch has 3 images for 4 processes; "
        "use at most 3 processes, or another batch_size"
    ]
    assert not (tmp_path / "run").exists()


UNEVEN = {  # for four processes
    "ten-classes-in-batches-of-eight": recipe(
        model=SMOOTH,
        data=Synthetic(train=70, test=21, classes=10, size=8, channels=1),
        batch_size=8,
        target=Universal(),
    ),
    "friendly-in-training-mode": recipe(
        model=SMOOTH, attack=Friendly(steps=3, tau=(0, 1), switch=(0.5,), mode="train")
    ),
    "dynamic-in-training-mode": recipe(
        model=SMOOTH, attack=Dynamic(steps=3, threshold=0.1, mode="train"), optimizer=SGD(lr=0.01)
    ),
    "five-images-for-four": recipe(model=SMOOTH, batch_size=5, attack=PGD(steps=1), epochs=1, optimizer=SGD(lr=0.001)),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", range(5))
def test_four_processes(group: int, tmp_path: Path, no_figures: None) -> None:
    """Every recipe of test_processes.py, and batches that leave processes with unequal work."""
    wanted = UNEVEN if group == 4 else dict(list(RECIPES.items())[group::4])
    wanted = {name: value for name, value in wanted.items() if name != "with-synthetic"}  # it needs a file
    (tmp_path / "recipes").mkdir()
    with driver.faulty_known():
        for name, value in wanted.items():
            save_recipe(value, tmp_path / "recipes" / f"{name}.json")
        with driver.started(4, tmp_path / "recipes", tmp_path / "four", tmp_path) as processes:
            for name, value in wanted.items():
                run(value, out=tmp_path / "one" / name, device="cpu")
            codes = [process.wait(timeout=DEADLINE) for process in processes]
    assert codes == [0] * 4, (tmp_path / "four" / "rank-0.txt").read_text()[-3000:]
    for name in wanted:
        same_run(tmp_path / "four" / name, tmp_path / "one" / name)
