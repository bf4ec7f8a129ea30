"""Manners in the terminal: nothing heavy for words alone, no debris in logs, the nearest for what is mistyped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robustkit.cli import completion
from robustkit.cli.main import COMMANDS, main
from robustkit.core.registry import FOLDERS
from robustkit.evaluation.suites import suites_of
from robustkit.reporting.paper import FIGURES

HEAVY = ("torch", "timm", "torchvision", "matplotlib", "accelerate", "sklearn", "numpy", "scipy")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def test_words_alone_load_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
from robustkit.cli.main import COMMANDS, main
done = [main(words) for words in (["--help"], ["--version"], ["list"], ["list", "attack", "--json"])]
done += [main([command, "--help"]) for command in COMMANDS]
assert set(done) == {{0}}, done
mistakes = [["rn"], ["--versoin"], ["list", "atack"], ["list", "--jsn"], ["run"], ["run", "x.py", "--max-tim", "5"]]
mistakes += [["run", "x.py", "--max-steps", "no"], ["report", "x", "--figure", "strenght"]]
mistakes += [["compare", "x", "--row", "y"]]
mistakes += [["new", "targt", "x"], ["new", "target", "No Name"], ["new", "target", "momentum"], []]
done = [main(words) for words in mistakes]
assert set(done) == {{2}}, done
assert main(["new", "target", "tidy", "--into", {str(tmp_path)!r}]) == 0
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shwo", "x"], "unknown command 'shwo', did you mean 'show'"),
        (["run", "x.py", "--max-tim", "5m"], "unknown option '--max-tim', did you mean '--max-time'"),
        (["run", "x.py", "--sead=3"], "unknown option '--sead', did you mean '--seed'"),
        (["list", "--jsno"], "did you mean '--json'"),
        (["list", "attack", "pgd"], "unexpected argument 'pgd'"),
        (["--versoin"], "unknown option '--versoin', did you mean '--version'"),
        (["report", "x", "--figure", "strenght"], "did you mean 'strength'"),
        (["new", "los", "mine"], "unknown kind 'los'; did you mean 'loss'"),
        (["doctor", "--plugin", "robustkit-nosuch"], "is not installed"),
        (["--print-completion", "csh"], "bash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistyped(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ") and said in captured.err


def test_list_says_what_comes_from_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robustkit_nfgsm")
    assert main(["list", "attack"]) == 0
    out = capsys.readouterr().out
    origin = next(entry["origin"] for entry in entries(capsys) if entry["name"] == "n-fgsm")
    assert origin.startswith("robustkit-nfgsm ") and f"From plugins: {origin} (1)." in out
    assert main(["list", "threat"]) == 0
    assert "From plugins" not in capsys.readouterr().out


def entries(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    assert main(["list", "attack", "--json"]) == 0
    found: list[dict[str, str]] = json.loads(capsys.readouterr().out)
    return found


def test_narrow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", "epsilon"]) == 0
    out = capsys.readouterr().out
    described = [line for line in out.splitlines() if line.startswith("  ")]
    assert described and all(len(line) <= 40 for line in described)
    assert "epsilon cyclic-batch (robustkit " in out


RECIPE = '''"""Small."""

from robustkit import Model, Recipe, Suite, Validation
from robustkit.datasets import Synthetic
from robustkit.evaluation import Clean
from robustkit.losses import CrossEntropy
from robustkit.schedules import Constant
from robustkit.threats import Linf

recipe = Recipe(
    data=Synthetic(train=40, test=8, classes=4, size=8, channels=1),
    model=Model(backbone="convnet_small"),
    threat=Linf(),
    attack=None,
    loss=CrossEntropy(),
    schedule=Constant(),
    epochs=1,
    batch_size=16,
    validation=Validation(images=8, train_images=0),
    evaluation=(Suite(measures=(Clean(),)),),
)
'''


@pytest.mark.parametrize("terminal", ["xterm-256color", pytest.param("dumb", marks=pytest.mark.slow)])
def test_a_log_holds_text(terminal: str, tmp_path: Path) -> None:
    """Files and pipes get no colours, no control characters and no bars, whatever TERM says."""
    (tmp_path / "small.py").write_text(RECIPE)
    environment = os.environ | {"TERM": terminal, "COLUMNS": "40", "OMP_NUM_THREADS": "1"}
    command = f"{sys.executable} -m robustkit run small.py --device cpu"
    words = ["bash", "-c", f"{command} > out.txt 2> err.txt"]
    if terminal == "dumb":  # a terminal that can do nothing
        if shutil.which("script") is None:
            pytest.skip("no program `script`, which makes a terminal")
        words = ["script", "-qec", command, "err.txt"]
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    text = (tmp_path / "err.txt").read_text()
    assert "epoch 1/1" in text
    for line in text.splitlines():
        assert not CONTROL.search(line), repr(line)


def test_bars_of_downloads_stay_out_of_logs() -> None:
    """torchvision and the hubs draw theirs by tqdm."""
    pytest.importorskip("tqdm")
    code = "from robustkit.cli.main import main; main(['--version'])\nimport tqdm\nlist(tqdm.tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_no_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal that shows colours."""
    from robustkit.reporting import consoles

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for value, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        console = consoles.results()
        with console.capture() as capture:
            console.print("told", style="red")
        assert ("\x1b[31m" in capture.get()) == coloured


# Completion


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_scripts(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (*COMMANDS, "max-time", "print-completion", *FIGURES, *FOLDERS):
        assert word in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "recipes").mkdir()
    for name in ("mine.py", "mine.json", "notes.txt"):
        (tmp_path / "recipes" / name).write_text("")
    tried = {
        "re": {"report", "resume"},
        "run --max-t": {"--max-time"},
        "run recipes/": {"recipes/mine.py", "recipes/mine.json"},
        "report x --figure s": {"strength", "sweep"},
        "list b": {"backbone"},
        "new t": {"threat", "target"},
        "compare x --paper ldat-table5": {"ldat-table5"},
        "eval x --suite d": {"detection"},
    }
    lines = ["source ./completion", "name=$(complete -p robustkit | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    for words in tried:
        lines += [f"COMP_WORDS=(robustkit {words})", "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))", "COMPREPLY=()"]
        lines += ["$name", 'echo "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(tried.values())


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_completion_in_fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "fish"]) == 0
    (tmp_path / "completion.fish").write_text(capsys.readouterr().out)
    script = 'source completion.fish; complete -C "robustkit "; complete -C "robustkit eval --cur"'
    done = subprocess.run(["fish", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    for name, command in COMMANDS.items():
        assert found[name] == (command.__doc__ or "").partition("\n")[0]
    assert "--curves" in found


def test_completed_names_exist() -> None:
    for (command, argument), names in completion.NAMES.items():
        if argument == "suite":
            assert all(suites_of(name) for name in names)
        assert command in COMMANDS and names


def test_completion_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "pip install 'robustkit[completion]'" in capsys.readouterr().err
