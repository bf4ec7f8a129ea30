"""robustkit in a notebook: docs/tutorial.ipynb runs in a real kernel, and cells show what they should."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustkit import compare, evolve, load_recipe
from robustkit.core.errors import RecipeError
from robustkit.display import Silent
from robustkit.folder import not_known_here
from robustkit.opening import recipe_of
from robustkit.reporting import consoles, notebook
from robustkit.reporting.terminal import Bar

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
SHORT = {"epochs": 1, "images": 1}
"""Settings of the tutorial, for a test."""
ACCURACY = re.compile(r"\d+\.\d +\(\d+\.\d-\d+\.\d\)")
"""A share in per cent with its interval."""
MOST_LINES = 150

FURTHER = {
    "before": """
import json, os, signal, threading
from matplotlib import rcParams
from robustkit.display import Silent

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, dict(rcParams), sorted(thread.name for thread in threading.enumerate())

def press_stop(when):
    # What the stop button sends, once the first epoch is over.
    while not when.is_file() or not when.read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

known, long = state(), evolve(ordinary, epochs=500, evaluation=())
""",
    "stopped": """
button = threading.Thread(target=press_stop, args=(runs / "long" / "metrics.jsonl",))
button.start()
stopped = robustkit.run(long, out=runs / "long")
button.join()
stopped
""",
    "as before": "print(stopped.stopped, state() == known)",
    "gone on": """
steps = json.loads((runs / "long" / "checkpoints" / "last.json").read_text())["step"]
print(robustkit.resume(stopped.folder, max_steps=steps + 5, display=Silent()).stopped)
print(json.loads((runs / "long" / "checkpoints" / "last.json").read_text())["step"] - steps)
""",
    "audited": """
from robustkit.evaluation.audit import CHECKS

few_checks = {name: CHECKS[name] for name in ("determinism", "zero gradients")}
robustkit.audit(model, x, y, threat=threat, limit=20, checks=few_checks)
""",
    "mistaken": "number = 0\nevolve(recipe, epochs=number)",
}
"""Cells after the tutorial's, by name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook runs."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def cells(folder: Path) -> Iterator[dict[str, Any]]:
    """The code cells, executed in one kernel: the tutorial's, then `FURTHER`."""
    needed = "nbclient, nbformat and ipykernel run notebooks: pip install -e '.[dev]'"
    nbformat = pytest.importorskip("nbformat", reason=needed)
    nbclient = pytest.importorskip("nbclient", reason=needed)
    pytest.importorskip("ipykernel", reason=needed)
    book = nbformat.read(TUTORIAL, as_version=4)
    (settings,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    for name, value in SHORT.items():
        settings.source, found = re.subn(rf"^{name} = \d+", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        assert found == 1
    for name, source in FURTHER.items():
        cell = nbformat.v4.new_code_cell(source)
        cell["id"] = name.replace(" ", "-")
        cell.metadata["tags"] = ["raises-exception"] if name == "mistaken" else []
        book.cells.append(cell)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
            patch.setenv(name, str(folder / "jupyter"))
        patch.delenv("MPLBACKEND", raising=False)
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    yield {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def html_of(cell: Any) -> list[str]:
    """What a browser shows of a cell, output after output."""
    return [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


# The file


def test_the_tutorial_is_stored_without_outputs() -> None:
    book = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and book["metadata"]["kernelspec"]["name"] == "python3"
    for cell in book["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_the_tutorial_s_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"])
    links = re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text)
    assert len(links) >= 5 and all((TUTORIAL.parent / link).is_file() for link in links)


# What is shown


def test_every_cell_runs_and_shows_little(cells: dict[str, Any]) -> None:
    """Nothing on standard error, no terminal codes, no flood: a bar is one output, however often it moved."""
    for name, cell in cells.items():
        assert len(cell.outputs) <= 3, name
        for output in cell.outputs:
            texts = [output.get("text", ""), *output.get("data", {}).values(), *output.get("traceback", ())]
            assert output.get("name") != "stderr", texts
            assert (output.output_type == "error") == (name == "mistaken"), texts
            assert all("\x1b" not in text and text.count("\n") < MOST_LINES for text in texts), name


@pytest.mark.parametrize("name", ["run", "evolve", "resume"])
def test_a_run_shows_its_progress_and_its_results(name: str, cells: dict[str, Any], folder: Path) -> None:
    lines, bar, results = html_of(cells[name])
    assert "held out:" in lines and "1/1" in lines and bar == ""  # the bar is gone
    assert len(ACCURACY.findall(results)) >= 3 and "pgd-20" in results and "Everything is in" in results
    (link,) = re.findall(r'href="([^"]+report\.html)"', results)
    assert "<h2>Verdict</h2>" in (folder / link).read_text(encoding="utf-8")


def test_recipes_models_and_comparisons_show_themselves(cells: dict[str, Any]) -> None:
    (recipe,), (model,), (compared,) = (html_of(cells[name]) for name in ("recipe", "load", "compare"))
    assert "universal" in recipe and "default 0.03137 = 8/255" in recipe and "Learning rate by epoch" in recipe
    assert "convnet_small, 56,544 parameters" in model and "best, after epoch 1" in model
    assert "Settings that differ" in compared and "robust - natural" in compared and "resolved" in compared
    assert printed(cells["differences"]).count("points (") == 2


@pytest.mark.parametrize("name", ["verdict", "evaluate"])
def test_an_evaluation_shows_itself(name: str, cells: dict[str, Any]) -> None:
    bar, results = html_of(cells[name])
    assert bar == "" and ACCURACY.search(results) and "Linf 0.15" in results


def test_an_audit_shows_itself(cells: dict[str, Any]) -> None:
    bar, found = html_of(cells["audited"])
    assert bar == "" and "determinism" in found and "Verdict: " in found


def test_the_picture_is_drawn(cells: dict[str, Any]) -> None:
    (output,) = cells["picture"].outputs
    assert len(output.data["image/png"]) > 10_000


def test_a_mistake_is_one_line_that_names_the_cell_s(cells: dict[str, Any]) -> None:
    (output,) = cells["mistaken"].outputs
    assert output.traceback == ["SpecError: line 2: Recipe.epochs: must be at least 1, got 0"]


# What is done


def test_the_tutorial_trains_the_quickstart(cells: dict[str, Any], folder: Path) -> None:
    (run,) = (folder / "runs").glob("*/robust")
    quickstart, trained = load_recipe(ROOT / "recipes" / "quickstart.py"), recipe_of(run)
    shortened = evolve(quickstart, control=None, epochs=SHORT["epochs"], evaluation=trained.evaluation)
    assert trained == shortened


def test_the_stop_button_saves_and_leaves_nothing(cells: dict[str, Any]) -> None:
    """Signal handlers, threads and matplotlib's settings are as before; the run goes on where it was."""
    lines, bar, ended = html_of(cells["stopped"])
    assert "Stopping after this step" in lines and "go on with robustkit.resume(" in lines and bar == ""
    assert "robustkit.resume(" in ended and "report.html" not in ended
    assert printed(cells["as-before"]) == "interrupt True\n"
    assert html_of(cells["gone-on"]) == [] and printed(cells["gone-on"]) == "steps\n5\n"  # shown nothing, as asked


def test_a_strategy_of_a_cell_is_asked_for_elsewhere(cells: dict[str, Any], folder: Path) -> None:
    lines, *_ = html_of(cells["stop"])
    assert "The epsilon &#x27;warm-up&#x27; is defined in a notebook&#x27;s cell" in lines
    (run,) = (folder / "runs").glob("*/warm-up")
    with pytest.raises(RecipeError, match=r"unknown epsilon 'warm-up', .*a notebook's cell.*warm-up/recipe\.py"):
        recipe_of(run)
    (run / "recipe.py").write_text(cells["strategy"].source.partition("check(WarmUp())")[0], encoding="utf-8")
    assert type(recipe_of(run).epsilon).__name__ == "WarmUp"


def test_what_a_folder_says_of_unknown_strategies_is_not_trusted(tmp_path: Path) -> None:
    nothing = (None, 3, [1], [["epsilon"]], [["no such kind", "x", "m"]], [[[], 1, {}]])
    for noted in (*nothing, [["epsilon", "ecas", "m"]]):
        (tmp_path / "environment.json").write_text(json.dumps({"unannounced": noted}), encoding="utf-8")
        assert not_known_here(tmp_path) is None
    (tmp_path / "environment.json").write_text("no JSON", encoding="utf-8")
    assert not_known_here(tmp_path) is None


# Without a kernel


def test_a_script_is_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(notebook.watcher(), Silent)
    with notebook.evaluating(None) as evaluating, notebook.auditing(None) as auditing:
        assert evaluating is None and auditing is None


def test_a_bar_travels_seldom_and_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(notebook, "_shown", lambda handle, html, text: shown.append(html) or "handle")
    cell = notebook.Cell()
    for done in range(10):
        cell.update(Bar("measuring <last>: clean", done, 10, "1 s left"))
        clock[0] += 0.2
    cell.update(Bar("measuring last: pgd-20", 0, 10))
    assert len(shown) == 5  # at 0, 0.6, 1.2 and 1.8 s, and at once where it is another one
    assert "measuring &lt;last&gt;" in shown[0] and '<progress value="3" max="10">' in shown[1] and " 30 %" in shown[1]
    cell.write("<b>a line\n")
    assert "&lt;b&gt;a line" in shown[-1]
    cell.stop()
    assert shown[-1] == ""


def test_a_notebook_s_shell_command_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as kernels do
    assert consoles.moves(consoles.messages())
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not consoles.moves(consoles.messages())


def test_recipes_are_compared_without_runs() -> None:
    files = [ROOT / "recipes" / name for name in ("pgd_at_rn18.py", "trades_rn18.py")]
    found = compare(*files)
    assert found.differences == [] and "trades" in found._repr_html_() and "Settings that differ" in found._repr_html_()
    assert found.to_json()["differing"]["loss"] == ["cross-entropy", "trades"]
