"""--log-with: what a tracker is given is what the run's folder holds, once, however often the run was resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustkit.cli.main import main
from robustkit.folder import read_results

RECIPE = """
from robustkit import Suite, evolve
from robustkit.evaluation import Attacked, Clean
from robustkit.testing import tiny_recipe

natural = tiny_recipe(attack=None, epochs=2, batch_size=29, evaluation=(Suite(measures=(Clean(), Attacked(steps=1))),))
recipe = evolve(tiny_recipe(epochs=2, batch_size=29), evaluation=natural.evaluation, control=natural)
"""
"""Two steps an epoch."""


@pytest.fixture(scope="module", autouse=True)
def pictures_are_not_drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustkit.reporting.figures.draw", lambda folder, parts: [])
        yield


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(RECIPE)
    return "small.py"


class Fake:
    """A tracker that remembers; `refuses` holds the steps that it does not take the first time."""

    requires_logging_directory = False
    made: list[Fake] = []
    refuses: set[int] = set()

    def __init__(self, project: str, **settings: Any) -> None:
        self.project, self.settings = project, settings
        self.settings_of_recipe: dict[str, Any] | None = None
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        Fake.made.append(self)

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings_of_recipe = values

    def log(self, values: dict[str, float], step: int) -> None:
        if step in Fake.refuses:
            Fake.refuses.remove(step)
            raise ConnectionError("no network")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """Those made, under the names of a tracker that goes on with its run and of one that does not."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "refuses", set())
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"wandb": Fake, "aim": Fake, "mlflow": Fake})
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.WANDB, LoggerType.AIM])
    return Fake.made


def reports(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def trains(*words: str) -> None:
    assert main([*words, "--device", "cpu", "--quiet"]) == 0


def test_rows_come_once_and_in_order(recipe: str, fakes: list[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    logged = ["--log-with", "wandb", "--log-with", "aim"]
    trains("run", recipe, "control=none", "epochs=3", "--out", "here", "--max-steps", "3", *logged)
    trains("resume", "here", *logged)
    trains("resume", "here", *logged)
    rows = reports("here")
    expected = [(row["step"], row["train"]["objective"], row["validation"]["robust"]) for row in rows]
    results = {f"test/last/{key}": entry["accuracy"] for key, entry in read_results(Path("here"))["last"].items()}

    def given(tracker: Fake) -> list[tuple[int, float, float]]:
        rows = [(step, values) for step, values in tracker.rows if "epoch" in values]
        return [(step, values["train/objective"], values["validation/robust"]) for step, values in rows]

    one, other = fakes[0::2], fakes[1::2]
    assert [given(tracker) for tracker in one] == [expected[:1], expected[1:], []]
    assert [given(tracker) for tracker in other] == [expected[:1], expected, expected]  # a new run each time
    assert [len(tracker.rows) for tracker in one] == [1, 3, 0]
    assert results.items() <= one[1].rows[-1][1].items() and one[1].rows[-1][0] == rows[-1]["step"]
    assert len({tracker.settings["id"] for tracker in one}) == 1 and one[0].settings["name"] == "here"
    assert [tracker.settings_of_recipe is not None for tracker in one] == [True, False, False]
    assert one[0].settings_of_recipe is not None and one[0].settings_of_recipe["optimizer.lr"] == 0.1
    assert all(isinstance(value, (bool, int, float, str)) for value in one[0].settings_of_recipe.values())
    assert all(tracker.finished for tracker in fakes)


def test_a_tracker_that_fails_stops_nothing(recipe: str, fakes: list[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    Fake.refuses.add(2)
    words = ["run", recipe, "--out", "here", "--device", "cpu", "--log-with", "wandb"]
    assert main(words) == 0
    assert "ConnectionError: no network" in capsys.readouterr().err
    robust, control = fakes
    assert [step for step, values in robust.rows if "epoch" in values] == [row["step"] for row in reports("here")]
    assert control.settings["name"] == "here/control"
    assert [step for step, values in control.rows if "epoch" in values] == [2, 4]


def test_mistakes(
    recipe: str, fakes: list[Fake], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Fake) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(Fake, "start", refuse)
    for name, text in {
        "wanbd": "'wandb'",
        "mlflow": "pip install mlflow",
        "wandb": "RuntimeError: not logged in",
    }.items():
        assert main(["run", recipe, "--out", "here", "--device", "cpu", "--quiet", "--log-with", name]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and text in captured.err and len(captured.err.splitlines()) == 1
        assert not Path("here").exists()


def test_tensorboard(recipe: str) -> None:
    """The real one, read by its own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trains("run", recipe, "control=none", "--out", "here", "--max-steps", "3", "--log-with", "tensorboard")
    trains("resume", "here", "--log-with", "tensorboard")
    found = EventAccumulator("here/tensorboard").Reload()
    rows = reports("here")
    for name in ("objective", "epsilon"):
        events = found.Scalars(f"train/{name}")
        assert [event.step for event in events] == [row["step"] for row in rows]
        assert [event.value for event in events] == pytest.approx([row["train"][name] for row in rows])
    (clean,) = found.Scalars("test/last/clean")
    assert clean.value == pytest.approx(read_results(Path("here"))["last"]["clean"]["accuracy"])
