"""All strategies and backbones that a recipe can name, read from entry points and source text: nothing is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import robustkit
from robustkit.core.errors import RegistryError
from robustkit.core.registry import FOLDERS, Entry, entries, hint

KINDS = (*FOLDERS, "backbone")


def catalogue(kind: str | None = None) -> list[Entry]:
    """What is known of one kind, or of all.

    Raises:
        RegistryError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise RegistryError(f"unknown kind '{kind}'", remedy=hint(kind, KINDS))
    found: list[Entry] = []
    for known in KINDS if kind is None else (kind,):
        found += _backbones() if known == "backbone" else entries(known)
    return found


def _backbones() -> Iterator[Entry]:
    """robustkit's own networks: the functions that timm's `register_model` decorates."""
    spec = importlib.util.find_spec("robustkit.backbones")
    assert spec is not None and spec.submodule_search_locations
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(_is_registration(item) for item in node.decorator_list):
                description = (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
                yield Entry("backbone", node.name, description, f"robustkit {robustkit.__version__}")


def _is_registration(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == "register_model"
