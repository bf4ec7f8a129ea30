"""The command line: what it prints, where, and with which exit code."""

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

import pytest
import torch
from safetensors.torch import save_file

from robustkit.cli.main import main
from robustkit.cli.options import seconds
from robustkit.reporting.terminal import TerminalDisplay

RECIPE = '''"""Small enough for a test."""

from robustkit import Model, Recipe, Suite, Validation
from robustkit.attacks import PGD
from robustkit.datasets import Synthetic
from robustkit.evaluation import Attacked, Clean
from robustkit.losses import CrossEntropy
from robustkit.schedules import OneCycle
from robustkit.threats import Linf

parts = dict(
    data=Synthetic(train=56, test=12, classes=4, size=8, channels=1),
    model=Model(backbone="convnet_small"),
    threat=Linf(epsilon=8 / 255),
    loss=CrossEntropy(),
    schedule=OneCycle(),
    epochs=2,
    batch_size=16,
    validation=Validation(images=8, train_images=8, attack=PGD(steps=1)),
    evaluation=(Suite(measures=(Clean(), Attacked(steps=2))),),
)
recipe = Recipe(**parts, attack=PGD(steps=2), control=Recipe(**parts, attack=None))
'''


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a recipe, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(RECIPE)
    return "small.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for reading."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.py").write_text(RECIPE)
    assert main(["run", str(folder / "small.py"), "--out", str(folder / "done"), "--quiet", "--device", "cpu"]) == 0
    return folder / "done"


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A finished run, for spoiling."""
    return Path(shutil.copytree(finished, tmp_path / "spoilt"))


def fails(capsys: pytest.CaptureFixture[str], words: list[str], *said: str, code: int = 2) -> None:
    """The command ends with `code` and one line on standard error that says all of `said`; nothing else is printed."""
    capsys.readouterr()
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for text in said:
        assert text in lines[0]


# Starting


def test_help_and_list_load_no_torch() -> None:
    code = (
        "import sys; from robustkit.cli.main import main\n"
        "codes = [main(['--help']), main(['run', '--help']), main(['list']), main(['list', 'backbone', '--json'])]\n"
        "assert codes == [0, 0, 0, 0], codes\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 2  # a fifth of it on an idle machine


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "resume",
        "sweep",
        "eval",
        "audit",
        "predict",
        "list",
        "show",
        "compare",
        "export",
        "bench",
        "new",
        "doctor",
    ],
)
def test_every_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2]
    assert 2 <= examples.count(f"robustkit {command} ") <= 4


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "robustkit", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("robustkit ")


def test_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("9m", 540), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605)]
)
def test_durations(text: str, expected: float) -> None:
    assert seconds(text) == expected


# Facts


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {"kind", "name", "description", "origin"} == set(entries[0])
    found = {(entry["kind"], entry["name"]): entry for entry in entries}
    assert "Projected" in found["attack", "pgd"]["description"]
    assert found["backbone", "wrn34_10"]["origin"].startswith("robustkit ")
    assert main(["list", "epsilon"]) == 0
    out = capsys.readouterr().out
    assert "ecas" in out and "pgd" not in out


def test_list_backbones_says_that_timm_has_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "backbone"]) == 0
    out = capsys.readouterr().out
    assert "convnet_small" in out and "timm" in out


def test_show_marks_what_differs(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", recipe, "threat.epsilon=4/255", "epsilon=cyclic", "control.epochs=3"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "0.01569 = 4/255" in out and "override, recipe says 0.03137 = 8/255" in out
    assert "override, recipe says fixed" in out
    assert "default 10" in lines["steps"]
    assert "override, recipe says 2" in out.partition("control ")[2]
    assert "Radius by epoch: 3/255 to 4/255" in out and "parameters" in out


@pytest.mark.parametrize(
    ("epsilon", "said"),
    [
        ("fixed", "Radius in every epoch: 8/255\nLearning rate"),
        ("linear", "Radius by epoch: 3/255 to 12/255\n 1-12 ▁▂▂▃▄▄▅▅▆▇▇█\n"),
        ("cyclic", "Radius by epoch: 3/255 to 12/255\n 1-12 ▁▂▃▃▄▅▆▆▇█▁▂\n"),
        ("cyclic-batch", f"Radius in the first steps: 3/255 to 12/255\n 1-60 {'▁▂▃▃▄▅▆▆▇█' * 6}\n"),
        ("ecas", "Radius by epoch: 3/255 to 12/255\n 1-12 ▁▂▃▃▄▅▆▆▇█▁▂\n"),
    ],
)
def test_show_draws_every_schedule(
    epsilon: str, said: str, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["show", recipe, f"epsilon={epsilon}", "epochs=12", "control=none"]) == 0
    assert said in capsys.readouterr().out


def test_show_counts_passes_by_phase(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", recipe, "target=one-off", "target.start=0.5", "loss=align", "epochs=10", "control=none", "--json"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert [phase["epochs"] for phase in data["passes"]] == [[1, 4], [5, 5], [6, 10]]
    assert data["passes"][0]["parts"]["attack"] == {
        "forward": 2,
        "input_backward": 2,
        "parameter_backward": 0,
        "units": 4,
    }
    assert all(p["step"]["units"] == sum(q["units"] for q in p["parts"].values()) for p in data["passes"])
    assert data["recipe"]["attack"]["name"] == "pgd" and len(data["digest"]) == 12 and data["parameters"] > 1000


def test_compare_recipes(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(RECIPE.replace("PGD(steps=2), control", "PGD(steps=3), control"))
    assert main(["compare", recipe, "other.py", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["differing"] == {"attack.steps": [2, 3]}
    assert data["compared"][0]["digest"] != data["compared"][1]["digest"]
    assert main(["compare", recipe, recipe]) == 0
    assert "equal" in capsys.readouterr().out


def test_compare_hides_settings_of_parts_that_others_lack(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("without.py").write_text(RECIPE.replace("PGD(steps=2), control=Recipe(**parts, attack=None)", "None"))
    assert main(["compare", recipe, "without.py"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.partition("──")[2].splitlines()[1:] if line.strip()]
    assert rows == [["attack", "pgd", "none"], ["control", "given", "none"]]


# Running


def test_run_prints_results_to_stdout_and_all_else_to_stderr(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert set(data) == {"folder", "stopped", "results", "control"}
    assert data["folder"] == "runs/small-1" and data["stopped"] == ""
    assert set(data["results"]["last"]) == {"clean", "pgd-20"} and set(data["control"]) >= {"last"}
    assert json.loads(Path("runs/small-1/results.json").read_text()) == data["results"]
    assert "epoch 1/2" in captured.err and "runs/small-1/results.json" in captured.err
    assert {path.name for path in Path("runs/small-1/figures").iterdir()} == {
        "curves.png",
        "epsilon.png",
        "examples.png",
    }
    assert {path.name for path in Path("runs/small-1/control/figures").iterdir()} == {"curves.png", "examples.png"}


def test_stop_and_go_on(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", recipe, "--seed", "5", "control=none", "--device", "cpu", "--out", "part"]
    assert main([*words, "--max-steps", "1", "epochs=1", "--precision", "bf16"]) == 0
    assert "robustkit resume part" in capsys.readouterr().err
    stored = json.loads(Path("part/recipe.json").read_text())
    assert (stored["seed"], stored["epochs"], stored["precision"]["attack"]) == (5, 1, "bf16")
    assert "precision.outer=bf16" in json.loads(Path("part/environment.json").read_text())["overrides"]

    assert main(["eval", "part"]) == 0  # training is not finished: what it finds must not be taken for the end's
    captured = capsys.readouterr()
    assert "Provisional" in captured.err and "clean" in captured.out and not Path("part/results.json").exists()

    assert main(["resume", "part", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "clean" in captured.out and "after step 1 of 3" in captured.err
    assert main(["resume", "part", "--quiet"]) == 0  # nothing left to do
    captured = capsys.readouterr()
    assert "pgd-20" in captured.out and captured.err == ""


def test_time_budget(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.cli.options.seconds", lambda text: 1e-6)
    assert main(["run", recipe, "--max-time", "1s", "--out", "late", "--device", "cpu"]) == 75
    captured = capsys.readouterr()
    assert captured.out == "" and "robustkit resume late" in captured.err


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    def step(self: TerminalDisplay, *_: Any) -> None:
        for _ in range(times):  # the second Ctrl-C does not wait for the end of the step
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TerminalDisplay, "step", step)
    assert main(["run", recipe, "--out", "cut short", "--device", "cpu"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and "robustkit resume 'cut short'" in captured.err
    assert Path("cut short/checkpoints/last.safetensors").is_file()


def test_smoke_leaves_nothing(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", recipe, "--smoke", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "Smoke run passed" in captured.err and "temporary" in captured.err and "control" in captured.out
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["small.py"]


def test_eval(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_folder / "results.json"
    before = json.loads(results.read_text())
    assert main(["eval", str(run_folder), "--limit", "5", "--measures", "clean", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["results"]["last"].keys() == {"clean"} and data["results"]["last"]["clean"]["n"] == 5
    assert json.loads(results.read_text()) == before

    results.unlink()
    assert main(["eval", str(run_folder), "--measures", "clean"]) == 0
    assert json.loads(results.read_text())["last"].keys() == {"clean"}
    assert main(["eval", str(run_folder)]) == 0
    found = json.loads(results.read_text())
    assert {c: {k: e["accuracy"] for k, e in r.items()} for c, r in found.items()} == {
        c: {k: e["accuracy"] for k, e in r.items()} for c, r in before.items()
    }
    capsys.readouterr()
    assert main(["eval", str(run_folder)]) == 0  # now there is nothing to measure
    captured = capsys.readouterr()
    assert "measuring" not in captured.err and "robust" in captured.out and "control" in captured.out
    assert main(["eval", str(run_folder), "--checkpoint", "last", "--again"]) == 0
    assert "measuring last: clean" in capsys.readouterr().err


def test_compare_runs(finished: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(finished), recipe]) == 0
    out = capsys.readouterr().out
    assert "equal" in out and "pgd-20" in out and "%" in out


def test_first_of_several_processes_speaks(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["resume", str(finished), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# Mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=univers", "loss=align"], ["target:", "unknown target 'univers'", "did you mean 'universal'"]),
        (["attack=pdg"], ["attack:", "unknown attack 'pdg'", "'pgd'"]),
        (["optimiser.lr=1"], ["no setting 'optimiser'", "did you mean 'optimizer'"]),
        (["attack.stepz=1"], ["PGD has no setting 'stepz'", "'attack.steps'"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "must be a number", "'fast'"]),
        (["attack.steps=2.5"], ["attack.steps", "must be a whole number"]),
        (["threat.epsilon=8"], ["epsilon", "at most 1", "8/255"]),
        (["attack.steps=-3"], ["steps", "at least 0", "-3"]),
        (["epochs=0"], ["epochs", "at least 1"]),
        (["epochs"], ["'epochs'", "path=value"]),
        (["target=natural"], ["target", "uses no target", "target=none"]),
        (["--seed", "x"], ["seed", "whole number"]),
        (["--max-steps", "0"], ["--max-steps", "at least 1"]),
        (["--max-time", "soon"], ["--max-time", "1h30m"]),
        (["--precision", "fp64"], ["--precision", "fp32"]),
        (["--device", "gpu"], ["device 'gpu'", "--device cpu"]),
        (["model.backbone=convnet_smal"], ["model.backbone", "convnet_small"]),
        (["model.backbone=vit_tiny_patch16_224"], ["model", "cannot take 1 x 8 x 8 images", "patch_size"]),
        (["batch_size=1000"], ["batch_size", "more than the 48 training images"]),
        (["validation.images=56"], ["validation", "cannot hold out 56 of 56"]),
        (["data=cifar10", "data.root=.", "data.download=false"], ["CIFAR-10 is not there", "data.root"]),
        (["--out", "small.py"], ["small.py", "exists already"]),
        (["--out", "small.py/run"], ["small.py/run", "cannot be written", "choose another --out"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_in_a_run(
    recipe: str, capsys: pytest.CaptureFixture[str], words: list[str], said: list[str], tmp_path: Path
) -> None:
    device = [] if "--device" in words else ["--device", "cpu"]
    fails(capsys, ["run", recipe, "--quiet", *device, *words], *said)
    assert not list(tmp_path.glob("runs/*"))  # nothing is left that would be in the way of the mended command


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (\n", ["broken.py:1", "syntax error", "never closed"]),
        ("x = 1\n", ["broken.py", "defines no `recipe`", "recipe = Recipe(...)"]),
        ("\nimport nosuch\n", ["broken.py:2", "ModuleNotFoundError", "nosuch"]),
        ("from robustkit.threats import Linf\n\nLinf(epsilon=8)\n", ["broken.py:3", "at most 1"]),
        ("from robustkit.threats import Linf\nLinf(epsilom=1)\n", ["broken.py:2", "'epsilom'", "'epsilon'"]),
    ],
    ids=["syntax", "no recipe", "import", "range", "setting"],
)
def test_broken_recipes(recipe: str, capsys: pytest.CaptureFixture[str], text: str, said: list[str]) -> None:
    Path("broken.py").write_text(text)
    fails(capsys, ["run", "broken.py"], *said)
    fails(capsys, ["show", "broken.py"], *said)
    fails(capsys, ["compare", recipe, "broken.py"], *said)


def test_missing_recipe_names_near_misses(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["run", "smal.py"], "smal.py: no such recipe", "did you mean 'small.py'")


@pytest.mark.parametrize("words", [["resume"], ["eval"], ["predict"], ["report"], ["show"], ["compare", "small.py"]])
def test_missing_run_names_near_misses(
    recipe: str, run_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    more = ["x.png"] if words == ["predict"] else []
    fails(capsys, [*words, f"{run_folder}x", *more], f"{run_folder}x: ", f"did you mean '{run_folder}'?")


def test_existing_run_is_never_overwritten(recipe: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["run", recipe, "--out", str(run_folder)], "exists already", f"robustkit resume {run_folder}")


def test_words_of_the_command_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, ["rn"], "unknown command 'rn'", "'run'")
    fails(capsys, ["--nope"], "--nope")
    fails(capsys, ["run"], "RECIPE", "robustkit run --help")
    fails(capsys, ["compare", "one.py"], "B")
    fails(capsys, ["list", "atack"], "unknown kind 'atack'", "'attack'")
    for command in ("resume", "eval"):
        fails(capsys, [command, str(tmp_path)], str(tmp_path), "is not a run folder")


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_spoilt_checkpoints(command: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = run_folder / "checkpoints" / "last.safetensors"
    (run_folder / "checkpoints" / "last.previous.safetensors").unlink()  # from which `resume` would go on
    content = last.read_bytes()
    words = [command, str(run_folder), "--device", "cpu", *(["--quiet"] if command == "resume" else [])]
    last.write_bytes(content[: len(content) // 2])
    fails(capsys, words, "last.safetensors", "truncated or damaged")
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fails(capsys, words, "last.safetensors", "checksum")
    save_file({"weight": torch.zeros(2)}, last)
    fails(capsys, words, "last.safetensors", "not a robustkit checkpoint")
    last.write_bytes(content)
    recipe = json.loads((run_folder / "recipe.json").read_text())
    recipe["optimizer"]["lr"] = 0.5
    (run_folder / "recipe.json").write_text(json.dumps(recipe))
    fails(capsys, words, "belongs to another recipe", "optimizer.lr=0.1 there, 0.5 here")


def test_unknown_measure(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["eval", str(finished), "--measures", "pgd20"], "no measure 'pgd20'", "'pgd-20'")


def test_failure_of_training(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", recipe, "optimizer.lr=1e30", "schedule=constant", "--quiet", "--device", "cpu", "--out", "run"]
    fails(capsys, words, "finite", "optimizer.lr", code=1)


def test_debug_shows_the_traceback(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "epochs=0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_disk_failures_take_one_line(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "runs/small-1/checkpoints/last.safetensors")

    monkeypatch.setattr("robustkit.core.checkpoint.write", full)
    words = ["run", recipe, "--quiet", "--device", "cpu"]
    fails(capsys, words, "runs/small-1/checkpoints/last.safetensors: No space left on device", code=1)


def test_our_own_bugs_keep_their_traceback(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.core.recipe.load_recipe", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["show", recipe])


def test_a_reader_that_leaves_early() -> None:
    command = f"{sys.executable} -m robustkit list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.stderr == ""
