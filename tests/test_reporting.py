"""What people see: numbers, tables, progress, figures."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from robustkit import Model, Recipe, Suite, Validation, override
from robustkit.attacks import PGD
from robustkit.core.batch import Progress
from robustkit.core.parts import Parts, Totals
from robustkit.datasets import Synthetic
from robustkit.display import Silent
from robustkit.epsilons import ECAS
from robustkit.evaluation import Attacked, Clean
from robustkit.evaluation.evaluate import News
from robustkit.losses import Align, CrossEntropy
from robustkit.opening import load_parts, make_world
from robustkit.reporting import formats
from robustkit.reporting.composition import phases, rows
from robustkit.reporting.figures import draw, radii
from robustkit.reporting.tables import columns, print_results
from robustkit.reporting.terminal import Bar, TerminalDisplay, run_display
from robustkit.runs import Outcome, run
from robustkit.schedules import Constant
from robustkit.targets import Momentum, Universal
from robustkit.threats import L2, Linf


def recipe(*, channels: int = 1, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "data": Synthetic(train=40, test=12, classes=4, size=8, channels=channels),
        "model": Model(backbone="convnet_small"),
        "threat": Linf(epsilon=8 / 255),
        "attack": PGD(steps=1),
        "loss": CrossEntropy(),
        "schedule": Constant(),
        "epochs": 1,
        "batch_size": 16,
        "validation": Validation(images=8, train_images=8, attack=PGD(steps=1)),
        "evaluation": (Suite(measures=(Clean(), Attacked(steps=1))),),
    }
    return Recipe(**settings | changes)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def console(width: int = 100, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False, **options)


# Numbers


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epsilon", 8 / 255, "0.03137 = 8/255"),
        ("epsilon", 0.031, "0.031 ~ 7.905/255"),
        ("epsilon", 0.5, "0.5"),
        ("radius", 4 / 255, "0.01569 = 4/255"),
        ("lr", 0.2, "0.2"),  # 51/255, but no radius
        ("values", [3 / 255, 4 / 255], "3/255, 4/255"),
        ("at", [99.0, 104.0], "99, 104"),
        ("root", None, "none"),
        ("nesterov", True, "true"),
        ("name", "", '""'),
        ("epochs", 110, "110"),
    ],
)
def test_settings_as_people_read_them(name: str, value: Any, expected: str) -> None:
    assert formats.setting(name, value) == expected


def test_durations_and_shares() -> None:
    assert [formats.duration(s) for s in (0.42, 42, 545, 11230)] == ["0.4 s", "42 s", "9:05 min", "3:07 h"]
    assert formats.percent(0.8312) == "83.1" and formats.in_255ths(0.0282) == "7.19/255"


def test_sparkline() -> None:
    assert formats.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(formats.sparkline(range(1000), width=30)) == 30
    assert formats.sparkline([1, 1]) == "▅▅"
    assert formats.sparkline([0, 1], ascii_only=True).isascii()


def test_course() -> None:
    """Lines of whole tens, each with the numbers of its first and last value; all on one scale."""
    cycle = [number % 10 for number in range(110)]
    lines = formats.course(cycle, width=79)
    assert [line.split()[0] for line in lines] == ["1-70", "71-110"] and all(len(line) <= 79 for line in lines)
    marks = [line.split()[1] for line in lines]
    assert marks[0] == formats.sparkline(range(10)) * 7 and marks[1] == marks[0][:40]
    assert [line.index("▁") for line in lines] == [8, 8]
    assert formats.course([0, 1], width=20, ascii_only=True) == ["1-2 _#"]
    assert formats.course([], width=20) == []
    assert formats.course([0] * 10 + [7] * 5, width=14)[1].split()[1] == "█" * 5


# Tables


def entry(accuracy: float, n: int = 360, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "n": n, "ci95": [accuracy - 0.05, accuracy + 0.05], "seconds": 1.25, **more}


RESULTS = {
    "zz": entry(0.5),
    "autoattack": entry(0.6, 64, breakdown={"apgd-ce": 0.7, "square": 0.6}, notes=["Mind"]),
    "clean": entry(0.9),
    "l2/pgd-20": entry(0.4),
    "pgd-20": entry(0.7),
}


def test_measures_are_in_order_and_say_how_many_images() -> None:
    out = console()
    print_results(out, columns("robust", {"last": RESULTS}))
    lines = text_of(out).splitlines()
    names = [line.split()[0] for line in lines if "(" in line and "%" not in line]
    assert names == ["clean", "pgd-20", "autoattack", "zz", "l2/pgd-20"]
    assert any("64 of 360" in line and "60.0   (55.0-65.0)" in line and "1.2" in line for line in lines)
    assert "accuracy after apgd-ce 70.0, square 60.0" in text_of(out) and "Mind" in text_of(out)


def test_best_is_not_repeated_where_it_is_the_last() -> None:
    shown = columns("robust", {"last": RESULTS, "best": dict(RESULTS)})
    assert [column.checkpoint for column in shown] == ["last = best"]
    out = console()
    print_results(out, shown)
    assert "the best checkpoint is the last one" in text_of(out)
    other = columns("robust", {"last": RESULTS, "best": RESULTS | {"clean": entry(0.91)}})
    assert [column.checkpoint for column in other] == ["last", "best"]


@pytest.mark.parametrize("width", [150, 100, 80, 60])
def test_one_table_whatever_the_width(width: int) -> None:
    out = console(width)
    two = {"last": RESULTS, "best": RESULTS | {"clean": entry(0.91)}}
    print_results(out, [*columns("robust", two), *columns("control", two)])
    text = text_of(out)
    assert text.count("Measure") == 1 and max(map(len, text.splitlines())) <= width
    assert text.count("(85.0-95.0)") == 2  # no interval is broken in two


def test_no_results_yet() -> None:
    out = console()
    print_results(out, [])
    assert text_of(out) == "No results yet.\n"


# Composition


def test_rows_tell_defaults_from_overrides() -> None:
    before = recipe()
    changed = list(rows(override(before, ["threat.epsilon=4/255", "epsilon=ecas"]), before))
    found = {row.name: row for row in changed if row.depth == 0}
    threat, schedule = found["threat"], found["epsilon"]
    assert (threat.value, threat.origin) == ("linf", "default")
    assert (schedule.value, schedule.origin, schedule.note) == ("ecas", "override", "override, recipe says fixed")
    assert found["batch_size"].note == "default 128" and found["accumulate"].origin == "default"
    (radius,) = (row for row in changed if row.name == "epsilon" and row.depth == 1)
    assert (radius.value, radius.note) == ("0.01569 = 4/255", "override, recipe says 0.03137 = 8/255")


def test_phases_add_up() -> None:
    made = recipe(epochs=10, target=Momentum(inner=Universal()), loss=Align(), epsilon=ECAS())
    (only,) = phases(made)
    assert (only.first, only.last) == (1, 10)
    assert only.total.units == sum(part.units for part in only.parts.values())


# Progress


@pytest.fixture
def parts() -> Parts:
    made = recipe(epochs=3)
    return load_parts(made, make_world(made, "cpu"))


def totals(parts: Parts) -> Totals:
    made = parts.new_totals()
    made.sums |= {
        "images": torch.tensor(16.0),
        "objective": torch.tensor(24.0),
        "term a": torch.tensor(16.0),
        "term b": torch.tensor(8.0),
        "epsilon": torch.tensor(16 * 8 / 255),
    }
    return made


REPORT = {
    "epoch": 1,
    "train": {"objective": 1.5},
    "lr": 0.1,
    "seconds": 12.0,
    "validation": {"natural": 0.5, "robust": 0.25},
    "training": {"natural": 0.75, "robust": 0.5},
}


def test_log_gets_plain_lines_at_once_and_then_seldom(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    out = console()
    display = TerminalDisplay(out)
    display.begin(parts.recipe, Path("runs/x-1"), parts)
    assert "runs/x-1" in text_of(out) and "epoch 1/3" in text_of(out)
    for step in range(6):
        clock[0] += 4
        display.step(Progress.at(step, 3, 2), totals(parts))
    lines = [line for line in text_of(out).splitlines() if "loss 1.500" in line]
    assert len(lines) == 2  # after 4 s and 16 s
    assert "epoch 1/3  step 1/2  17 %" in lines[0] and "left" in lines[0]
    assert "4 images/s" in lines[0] and "a 1.000" in lines[0] and "epsilon 8/255" in lines[0]
    parts.best = {"epoch": 1}
    display.epoch(REPORT)
    assert "50.0 % 25.0 %" in text_of(out) and "75.0 % 50.0 %" in text_of(out) and "best" in text_of(out)
    display.epoch({key: REPORT[key] for key in ("train", "lr", "seconds")} | {"epoch": 2})  # nothing was held out
    display.measuring("last", "pgd-20", News(0, 16, 0, 0))
    display.measuring("last", "pgd-20", News(8, 16, 8, 6))
    display.measuring("last", "pgd-20", News(16, 16, 16, 12))
    display.measuring("last", "autoattack", News(0, 500, 0, 0))
    clock[0] += 11
    display.measuring("last", "autoattack", News(0, 500, 250, 100, "apgd-ce"))
    clock[0] += 11
    display.measuring("last", "autoattack", News(250, 500, 500, 150, "apgd-t"))
    display.end()
    text = text_of(out)
    assert text.count("measuring last: pgd-20") == 2 and "accuracy 75.0 % on 16 images" in text
    assert "0 %  11 s  accuracy at most 40.0 % on 250 images, after apgd-ce" in text
    assert "50 %  22 s left  accuracy at most 30.0 % on 500 images, after apgd-t" in text
    assert "\x1b" not in text


def test_terminal_gets_a_bar(parts: Parts) -> None:
    out = console(80, force_terminal=True)
    display = TerminalDisplay(out)
    display.begin(parts.recipe, Path("runs/x-1"), parts)
    display.step(Progress.at(0, 3, 2), totals(parts))
    time.sleep(0.6)  # it is redrawn four times a second
    display.epoch(REPORT)
    display.measuring("best", "clean", News(0, 16, 0, 0))
    display.measuring("best", "clean", News(8, 16, 8, 4))
    display.end()
    display.end()
    text = text_of(out)
    assert "━" in text and "images/s" in text and "measuring best: clean" in text


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_bar_never_wraps(width: int) -> None:
    out = console(width)
    details = "412 images/s  loss 1.832  cross-entropy 1.20  alignment 0.63  epsilon 7.2/255"
    out.print(Bar("epoch 3/110  step 45/383", 800, 42130, "7:45 h left", details))
    assert len(text_of(out).splitlines()) == 2


def test_looks_at_the_loss_are_rare(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(Totals, "means", lambda self: looks.append(1) or {"objective": 1.0, "epsilon": 0.1})
    display = TerminalDisplay(console(80, force_terminal=True))
    display.begin(parts.recipe, Path("x"), parts)
    for step in range(6):
        display.step(Progress.at(step, 3, 2), parts.totals)
    display.end()
    assert len(looks) == 1


def test_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(run_display(quiet=True), Silent) and isinstance(run_display(), TerminalDisplay)
    monkeypatch.setenv("RANK", "1")
    assert isinstance(run_display(), Silent)


def test_no_color_is_honoured() -> None:
    code = "from robustkit.reporting import consoles, tables\nconsoles.results().print('x', style='red')"
    environment = {"NO_COLOR": "1", "FORCE_COLOR": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "x\n", done


# Figures


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return int(width), int(height)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"curves", "epsilon", "examples"}),
        ({"channels": 3, "epochs": 2, "threat": L2(epsilon=0.5)}, {"curves", "epsilon", "examples"}),
        ({"attack": None, "validation": Validation(images=0)}, {"curves", "examples"}),
        ({"validation": Validation(images=8, train_images=0, attack=None)}, {"curves", "epsilon", "examples"}),
        (
            {
                "target": Momentum(inner=Universal()),
                "loss": Align(),
                "epsilon": ECAS(h_low=0.5, h_high=1.3),
                "epochs": 3,
            },
            {"curves", "epsilon", "examples"},
        ),
        ({"data": Synthetic(train=40, test=2, classes=2, size=8, channels=2)}, {"curves", "epsilon", "examples"}),
    ],
    ids=["one epoch, grey", "colour, L2", "no attack, nothing held out", "natural validation", "universal", "2 images"],
)
def test_figures_of_a_run(changes: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    run(recipe(**changes), out=tmp_path / "run", device="cpu")
    found = {path.stem: size(path) for path in (tmp_path / "run" / "figures").iterdir()}
    assert set(found) == expected
    assert all(200 < width < 2000 and 150 < height < 2000 for width, height in found.values())


def test_figures_leave_the_model_and_matplotlib_as_they_were(parts: Parts, tmp_path: Path) -> None:
    from matplotlib import rcParams
    from matplotlib._pylab_helpers import Gcf

    before, mode = dict(rcParams), parts.final.training
    weights = {name: tensor.clone() for name, tensor in parts.final.state_dict().items()}
    assert [path.name for path in draw(tmp_path, parts)] == ["examples.png"]  # there are no metrics yet
    assert dict(rcParams) == before and parts.final.training == mode
    assert all(torch.equal(tensor, weights[name]) for name, tensor in parts.final.state_dict().items())
    assert Gcf.get_all_fig_managers() == []


def test_many_different_radii_are_binned(tmp_path: Path) -> None:
    reports = [
        {"epoch": epoch, "train": {"epsilon": 0.02}, "radii": {"unit": 0.25 / 255, "counts": [epoch] * 129}}
        for epoch in (1, 2)
    ]
    axes = radii(json.loads(json.dumps(reports))).axes[0]
    assert 10 < len(axes.get_yticks()) <= 24


# What `run` returns


def test_an_outcome_shows_itself(tmp_path: Path) -> None:
    """As a table on a terminal and in a notebook, where what it is called cannot add markup."""
    accuracy = {"accuracy": 0.5, "n": 100, "ci95": [0.4038, 0.5962], "seconds": 1.0}
    outcome = Outcome(Path("<b>[red]run"), "time", {"last": {"clean": accuracy}}, {"last": {"clean": accuracy}})
    shown = console(width=140)
    shown.print(outcome)
    assert "50.0   (40.4-59.6)" in text_of(shown) and "control, last" in text_of(shown)
    html = outcome._repr_html_()
    assert "50.0   (40.4-59.6)" in html and "stopped: time" in html
    assert "&lt;b&gt;[red]run" in html.replace("\n", "") and "<b>" not in html
    assert "No results" not in html and Outcome(tmp_path, "", {})._repr_html_().startswith("<pre")
