"""Names for strategies: one registry for each kind of part.

Built-in strategies and plugins arrive the same way: an entry point announces the name (so that listing imports
nothing), and `@registry.register(name)` on the class claims it when its module is imported. This module imports no
torch, so that `robustkit list` answers at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from robustkit.core.errors import RegistryError

Class = TypeVar("Class", bound=type)

FOLDERS = {
    "threat": "threats",
    "epsilon": "epsilons",
    "attack": "attacks",
    "objective": "objectives",
    "target": "targets",
    "head": "heads",
    "loss": "losses",
    "weights": "weights",
    "average": "averages",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "dataset": "datasets",
    "measure": "measures",
}
"""Kind -> the last word of its entry-point group, `robustkit.<word>`."""

_HOMES = {"averages": "weights", "measures": "evaluation"}
"""Kinds whose built-ins live in a package of another name."""


class Entry(NamedTuple):
    """What `robustkit list` says of one strategy."""

    kind: str
    name: str
    description: str
    origin: str


class Registry:
    """All strategies of one kind, by kebab-case name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}
        self._names: dict[type, str] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Class decorator that claims `name`.

        Raises:
            RegistryError: another class owns the name already.
        """

        def claim(cls: Class) -> Class:
            owner = self._classes.get(name)
            if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
                raise RegistryError(
                    f"the {self.kind} name '{name}' belongs to {_place(owner)} already",
                    place=_place(cls),
                    remedy="choose another name",
                )
            self._classes[name] = cls
            self._names[cls] = name
            return cls

        return claim

    def get(self, name: str) -> type:
        """The class registered as `name`.

        Raises:
            RegistryError: unknown (near misses are named), claimed by two packages, or its plugin fails to import.
        """
        if name not in self._classes:
            claims = [point for point in _points(self.kind) if point.name == name]
            if len({point.value for point in claims}) > 1:
                owners = " and ".join(sorted(_origin(point) for point in claims))
                raise RegistryError(
                    f"the {self.kind} '{name}' is claimed by {owners}", remedy="uninstall one of the packages"
                )
            for point in claims[:1]:
                try:
                    point.load()
                except Exception as error:
                    raise RegistryError(
                        f"{_origin(point)} failed to import: {type(error).__name__}: {error}",
                        place=f"{self.kind} '{name}'",
                        remedy="mend or uninstall the package",
                    ) from error
        if name not in self._classes:  # an installation older than this source has no entry point for new built-ins
            folder = FOLDERS[self.kind]
            importlib.import_module(f"robustkit.{_HOMES.get(folder, folder)}")
        if name not in self._classes:
            raise RegistryError(f"unknown {self.kind} '{name}'", remedy=hint(name, self.names()))
        return self._classes[name]

    def name_of(self, cls: type) -> str | None:
        """The name that `cls` is registered under, or None."""
        return self._names.get(cls)

    def is_announced(self, cls: type) -> bool:
        """Whether any Python with the same packages knows `cls`: it is built in, or a plugin's."""
        name = self.name_of(cls)
        return cls.__module__.startswith("robustkit.") or any(point.name == name for point in _points(self.kind))

    def names(self) -> list[str]:
        """Every name known: registered already, or announced by an installed package."""
        return sorted({*self._classes, *(point.name for point in _points(self.kind))})


@cache
def registry(kind: str) -> Registry:
    """The registry of one kind (a key of `FOLDERS`)."""
    if kind not in FOLDERS:
        raise RegistryError(f"unknown kind '{kind}'", remedy=hint(kind, FOLDERS))
    return Registry(kind)


def entries(kind: str) -> Iterator[Entry]:
    """What is announced for `kind`, without importing any of it: descriptions are read from the source text."""
    registry(kind)
    for point in sorted(_points(kind), key=lambda point: point.name):
        yield Entry(kind, point.name, _description(point), _origin(point))


def hint(name: str, known: Any) -> str:
    """'did you mean ...?' with near misses first, or all that is known."""
    known = [str(item) for item in known]
    return did_you_mean(near_misses(name, known)) or (f"known: {', '.join(known)}" if known else "none is known")


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `name` may be a slip for, the likeliest first."""
    return difflib.get_close_matches(name[:100], known, n=3, cutoff=0.6)


def did_you_mean(near: list[str]) -> str:
    """As a remedy; none where nothing is near."""
    return f"did you mean {' or '.join(repr(item) for item in near)}?" if near else ""


@cache
def _points(kind: str) -> tuple[EntryPoint, ...]:
    return tuple(dict.fromkeys(_announced().select(group=f"robustkit.{FOLDERS[kind]}")))


@cache
def _announced() -> Any:
    """What all installed packages announce, to whomever: reading it takes longer than all else of `robustkit list`."""
    return entry_points()


def _origin(point: EntryPoint) -> str:
    return _package(point.dist) if point.dist is not None else point.value


@cache
def _package(package: Distribution) -> str:
    metadata = package.metadata
    return f"{metadata['Name']} {metadata['Version']}"


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _description(point: EntryPoint) -> str:
    """First line of the class docstring, read from the file so that nothing is imported."""
    top, *rest = point.module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return ""
        base = Path(spec.origin)
        if rest:
            base = base.parent.joinpath(*rest)
            base = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        tree = ast.parse(base.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
    return ""
