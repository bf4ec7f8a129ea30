"""A package of your own around one strategy that works: what `robustkit new` writes. This page loads no torch."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import keyword
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from robustkit.core.errors import UserError
from robustkit.core.registry import FOLDERS, registry
from robustkit.scaffold import texts

_STRATEGIES = Path(__file__).parent / "strategies"
_LONGEST = 40


def create(kind: str, name: str, into: Path) -> list[Path]:
    """Writes `into`/robustkit-<name>, a package that announces one strategy, and gives its files.

    Raises:
        UserError: there is no such kind, the name is invalid or taken, or the folder exists.
    """
    files = package(kind, name)
    root = into / f"robustkit-{name}"
    if root.exists():
        raise UserError("exists already", place=str(root), remedy="choose another name, or another --into")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return [root / path for path in files]


def package(kind: str, name: str) -> dict[str, str]:
    """The text of each file, by its path in the package.

    Raises:
        UserError: there is no such kind, or the name is invalid or taken.
    """
    known = registry(kind)
    if len(name) > _LONGEST or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        plain = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-")[:_LONGEST]
        remedy = "small letters, digits and '-' between them, a letter first"
        remedy += f", such as {plain.strip('-')}" if re.match("[a-z]", plain) else ""
        raise UserError("is no name for a strategy", place=repr(name), remedy=remedy)
    if name in known.names():
        raise UserError(f"there is a {kind} of that name", place=f"'{name}'", remedy="choose another name")
    module = f"robustkit_{name.replace('-', '_')}"
    if _is_installed(f"robustkit-{name}") or importlib.util.find_spec(module) is not None:
        fault = f"a package robustkit-{name} is installed"
        raise UserError(fault, place=f"'{name}'", remedy="choose another name")
    cls = "".join(word.capitalize() for word in name.split("-"))
    strategy = (_STRATEGIES / f"{kind}.py").read_text(encoding="utf-8")
    recipe = texts.recipe(kind, "NewStrategy")
    if cls in _names(strategy) | _names(recipe) | set(dir(builtins)) or keyword.iskeyword(cls):
        fault = f"its class would be called {cls}, a name that is in use there"
        raise UserError(fault, place=f"'{name}'", remedy="choose another name")
    files = {
        "pyproject.toml": texts.pyproject(kind, FOLDERS[kind]),
        "README.md": texts.readme(kind),
        "src/robustkit_new_strategy/__init__.py": strategy,
        "src/robustkit_new_strategy/py.typed": "",
        "recipes/new_strategy.py": recipe,
        "tests/test_new_strategy.py": texts.test(kind),
    }
    words = {"new-strategy": name, "new_strategy": name.replace("-", "_"), "New strategy": name, "NewStrategy": cls}

    def renamed(text: str) -> str:
        return re.sub("|".join(words), lambda found: words[found[0]], text)

    return {renamed(path): renamed(text) for path, text in files.items()}


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _names(source: str) -> set[str]:
    """All names that a module uses, its own class apart."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
    return found - {"NewStrategy"}
