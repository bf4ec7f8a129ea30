"""Registries: names announced by entry points, claimed by classes; built-ins exactly like plugins."""

import sys
import tomllib
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from typing import Any

import attrs
import pytest

from robustkit.core import registry as module
from robustkit.core.errors import RegistryError
from robustkit.core.registry import FOLDERS, Registry, entries, hint, registry

KINDS = {f"robustkit.{folder}": kind for kind, folder in FOLDERS.items()}


def announced() -> list[tuple[str, str, str]]:
    """(group, name, value) of every strategy in pyproject.toml."""
    path = Path(module.__file__).resolve().parents[2] / "pyproject.toml"
    groups = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["entry-points"]
    return [(group, name, value) for group, points in groups.items() for name, value in points.items()]


def installed() -> list[tuple[str, str, str]]:
    points = distribution("robustkit").entry_points
    return [(point.group, point.name, point.value) for point in points if point.group.startswith("robustkit.")]


@pytest.mark.parametrize(("group", "name", "value"), sorted({*announced(), *installed()}))
def test_each_entry_point_announces_the_name_its_class_registers(group: str, name: str, value: str) -> None:
    cls = EntryPoint(name, value, group).load()
    assert group in KINDS, f"no kind has the group {group}"
    names = registry(KINDS[group])
    assert names.name_of(cls) == name
    assert names.get(name) is cls
    assert name == name.lower() and "_" not in name and " " not in name
    assert attrs.has(cls)
    owners = [kind for kind in FOLDERS if registry(kind).name_of(cls) is not None]
    assert owners == [KINDS[group]]  # a class of two kinds would have two names in JSON
    assert "name" not in {field.name for field in attrs.fields(cls)}  # JSON holds the registered name there


def test_every_registered_built_in_is_announced() -> None:
    known = {(KINDS[group], name) for group, name, _ in announced()}
    for kind in FOLDERS:
        names = registry(kind)
        for name in names.names():
            if names.get(name).__module__.startswith("robustkit."):
                assert (kind, name) in known, f"{kind} '{name}' is missing in pyproject.toml"


def test_every_kind_has_a_group_and_a_folder() -> None:
    assert {kind for kind in FOLDERS} == {KINDS[group] for group, _, _ in announced()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_descriptions_are_read_without_importing(kind: str) -> None:
    found = list(entries(kind))
    assert [entry.name for entry in found] == sorted(entry.name for entry in found)
    for entry in found:
        assert entry.kind == kind and entry.origin
        cls = registry(kind).get(entry.name)
        assert cls.__doc__ is not None
        assert entry.description == cls.__doc__.strip().partition("\n")[0].rstrip(".")
        assert entry.description


def point(name: str, value: str, origin: str = "other 1.0") -> EntryPoint:
    return EntryPoint(name, value, "robustkit.attacks")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry of attacks of its own, and the means to announce entry points for it."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(module, "_points", lambda kind: tuple(points))

    def announce(name: str, value: str) -> None:
        points.append(EntryPoint(name, value, "robustkit.attacks"))

    return Registry("attack"), announce


def test_a_duplicate_names_the_owner(fresh: Any) -> None:
    names, _ = fresh

    @names.register("mine")
    class First:
        pass

    with pytest.raises(RegistryError, match=r"'mine' belongs to .*First already"):

        @names.register("mine")
        class Second:
            pass

    assert names.get("mine") is First and names.name_of(First) == "mine"


def test_a_class_may_be_defined_again(fresh: Any) -> None:
    """Recipe files are executed more than once."""
    names, _ = fresh

    def define() -> type:
        @names.register("mine")
        class Mine:
            pass

        return Mine

    first, second = define(), define()
    assert first is not second and names.get("mine") is second
    assert names.name_of(second) == "mine"


def test_unknown_names_come_with_near_misses() -> None:
    for kind, wrong, right in (
        ("attack", "pdg", "pgd"),
        ("target", "uninversal", "universal"),
        ("epsilon", "cyclic-batches", "cyclic-batch"),
        ("threat", "l-inf", "linf"),
    ):
        with pytest.raises(RegistryError, match=f"unknown {kind} '{wrong}'; did you mean .*'{right}'"):
            registry(kind).get(wrong)
    with pytest.raises(RegistryError, match=r"known: .*linf"):
        registry("threat").get("zzzzzzzz")
    with pytest.raises(RegistryError, match="did you mean 'attack'"):
        registry("attak")


def test_a_broken_plugin_fails_for_its_own_name_alone(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, announce = fresh
    (tmp_path / "broken_plugin_a.py").write_text("raise ValueError('no luck')\n")
    (tmp_path / "good_plugin_a.py").write_text("class Good:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    announce("broken", "broken_plugin_a:Attack")
    announce("missing", "no_such_module_anywhere:Attack")
    announce("forgetful", "good_plugin_a:Good")
    with pytest.raises(RegistryError, match="ValueError: no luck") as caught:
        names.get("broken")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(RegistryError, match="no_such_module_anywhere"):
        names.get("missing")
    with pytest.raises(RegistryError, match="forgetful"):
        names.get("forgetful")  # it imports, but claims no such name
    assert names.names() == ["broken", "forgetful", "missing"]
    sys.modules.pop("good_plugin_a", None)


def test_two_packages_with_one_name_are_refused(fresh: Any) -> None:
    names, announce = fresh
    announce("twin", "a:A")
    announce("twin", "b:B")
    with pytest.raises(RegistryError, match="claimed by"):
        names.get("twin")


def test_hint() -> None:
    assert hint("stesp", ["steps", "start"]) == "did you mean 'steps'?" or "steps" in hint("stesp", ["steps", "start"])
    assert hint("zzz", ["a", "b"]) == "known: a, b" and hint("zzz", []) == "none is known"
