"""What `robustkit new` writes: valid, lint-clean packages that keep their contracts, install and pass their tests."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from robustkit import UserError, load_recipe
from robustkit.cli.main import main
from robustkit.core.registry import FOLDERS, registry
from robustkit.core.spec import walk
from robustkit.scaffold import create, package
from robustkit.testing import PROTOCOLS, kind_of

KINDS = tuple(FOLDERS)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of a written package, until the test ends."""

    def load(folder: Path, name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:
        if "own_" in name:
            del sys.modules[name]


def test_every_kind_of_contract_has_one() -> None:
    folder = Path(sys.modules["robustkit.scaffold"].__file__ or "").parent / "strategies"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(PROTOCOLS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_at_once(kind: str, tmp_path: Path, imported: Any) -> None:
    """Its own tests, all but the one that asks whether it is installed."""
    files = create(kind, f"own-{kind}", tmp_path)
    root = tmp_path / f"robustkit-own-{kind}"
    assert set(files) == {path for path in root.rglob("*") if path.is_file()}
    module = imported(root / "src", f"robustkit_own_{kind}")
    tests = imported(root / "tests", f"test_own_{kind}")
    tests.test_contract()
    tests.test_recipe_runs(tmp_path)
    if kind == "dataset":
        tests.test_images()
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert set(names) - {"test_images"} == {"test_contract", "test_announced", "test_recipe_runs"}

    cls = getattr(module, f"Own{kind.capitalize()}")
    assert kind_of(cls()) == kind and registry(kind).get(f"own-{kind}") is cls
    recipe = load_recipe(tests.RECIPE)
    assert any(type(part) is cls for _, part in walk(recipe))
    announced = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert announced == {f"robustkit.{FOLDERS[kind]}": {f"own-{kind}": f"robustkit_own_{kind}:Own{kind.capitalize()}"}}


def test_they_are_lint_clean_and_hold_no_trace_of_the_template(tmp_path: Path) -> None:
    for kind in KINDS:
        for path in create(kind, f"my-{kind}", tmp_path):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?i:new.?strategy)|KIND|FOLDER|USE|PAGE|\ba [aeiou]\w+ for", text), path
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--extend-select", "E,F,I,UP,B,SIM,RUF"]
    for words in (["check", *rules], ["format", "--check"]):
        done = subprocess.run([*ruff, *words, "--no-cache", "."], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("targt", "mine", "unknown kind 'targt'; did you mean 'target'?"),
        ("target", "My_Labels", "such as my-labels"),
        ("target", "SoftLabels", "such as soft-labels"),
        ("target", "-", "is no name"),
        ("target", "../outside", "such as outside"),
        ("target", "1st", "a letter first"),
        ("target", "a" * 41, "is no name"),
        ("target", "momentum", "there is a target of that name"),
        ("loss", "nfgsm", "a package robustkit-nfgsm is installed"),
        ("loss", "tensor", "called Tensor"),
        ("attack", "digits", "called Digits"),
        ("attack", "none", "called None"),
        ("attack", "exception", "called Exception"),
    ],
)
def test_refuses(kind: str, name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "nfgsm":
        pytest.importorskip("robustkit_nfgsm")
    assert main(["new", kind, name, "--into", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert said in captured.err and captured.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_refuses_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "robustkit-mine").mkdir()
    assert main(["new", "loss", "mine", "--into", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err and not list((tmp_path / "robustkit-mine").iterdir())
    assert main(["new", "loss", "mine", "--into", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_says_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "loss", "mine", "--into", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["package"] == str(tmp_path / "robustkit-mine")
    assert all(Path(path).is_file() for path in data["files"]) and len(data["files"]) == 6
    assert main(["new", "loss", "ours", "--into", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert str(tmp_path / "robustkit-ours" / "src" / "robustkit_ours" / "__init__.py") in captured.out.splitlines()
    assert "pip install -e" in captured.err


def test_a_class_may_be_called_as_the_module_is_not() -> None:
    with pytest.raises(UserError, match="a name that is in use there"):
        package("objective", "reference")
    assert "class Soft2Labels:" in package("objective", "soft2-labels")["src/robustkit_soft2_labels/__init__.py"]


@pytest.mark.slow
def test_they_install_and_pass_their_tests(tmp_path: Path) -> None:
    """As an outsider would: in an environment of their own, which sees this one's packages."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site / "ours.pth").write_text("\n".join(f"import site; site.addsitedir({path!r})" for path in ours) + "\n")
    roots = []
    for kind in KINDS:
        create(kind, f"own-{kind}", tmp_path)
        roots.append(tmp_path / f"robustkit-own-{kind}")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--prefix", str(tmp_path / "venv")]
    subprocess.run([python, *install, *(word for root in roots for word in ("-e", str(root)))], check=True)
    subprocess.run([python, "-m", "pytest", "-q", *(str(root / "tests") for root in roots)], check=True, cwd=tmp_path)
