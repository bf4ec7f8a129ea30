"""Are plugins in order? What a package announces is imported, made and held against the contract of its kind."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from typing import Any

import attrs
from packaging.requirements import Requirement

from robustkit.core.errors import UserError
from robustkit.core.registry import FOLDERS, hint, registry
from robustkit.doctor.finding import Finding, told
from robustkit.doctor.libraries import fits

KINDS = {f"robustkit.{folder}": kind for kind, folder in FOLDERS.items()}
"""Entry-point group -> kind."""


def packages() -> list[str]:
    """Installed packages, robustkit apart, that announce something to it."""
    return sorted({found.name for found in _installed() if _points(found) and found.name != "robustkit"})


def examine(package: str) -> Iterator[Finding]:
    """The package itself, then each strategy that it announces.

    Raises:
        UserError: no such package is installed, or it announces nothing.
    """
    found = next((one for one in _installed() if _plain(one.name) == _plain(package)), None)
    if found is None:
        raise UserError("is not installed", place=package, remedy=hint(package, packages()))
    points = _points(found)
    if not points:
        remedy = 'announce each strategy in pyproject.toml, e.g. [project.entry-points."robustkit.attacks"]'
        raise UserError("announces no strategy", place=package, remedy=remedy)
    needs = [Requirement(text) for text in found.requires or ()]
    unfit = [fits(need) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    unfit = [finding for finding in unfit if finding.verdict != "ok"]
    for finding in unfit:
        yield Finding(f"{found.name} needs {finding.subject}", finding.verdict, finding.found, finding.remedy)
    if not any(_plain(need.name) == "robustkit" for need in needs):
        remedy = 'write dependencies = ["robustkit"] in its pyproject.toml'
        yield Finding(found.name, "warning", f"{found.version}, which does not say that it needs robustkit", remedy)
    elif not unfit:
        yield Finding(found.name, "ok", found.version)
    for point in points:
        yield _held(point, found.name)


def _installed() -> Iterator[Distribution]:
    """In the order in which imports find them. What a broken installation left behind has no name."""
    return (found for found in distributions() if found.metadata["Name"])


def _points(found: Distribution) -> list[EntryPoint]:
    """What it announces, in the order of groups and names, each once."""
    return sorted({point for point in found.entry_points if point.group.split(".")[0] == "robustkit"})


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _held(point: EntryPoint, package: str) -> Finding:
    """What is wrong with one strategy, or that nothing is."""
    kind = KINDS.get(point.group)
    if kind is None:
        return Finding(
            f"{package}: {point.name}", "problem", f"there is no group '{point.group}'", hint(point.group, KINDS)
        )
    subject = f"{package}: {kind} '{point.name}'"

    def problem(found: str, remedy: str) -> Finding:
        return Finding(subject, "problem", found, remedy)

    with _quiet():
        try:
            cls: Any = point.load()
        except (Exception, SystemExit) as error:
            return problem(f"{point.value} cannot be imported: {_where(error, package)}", "mend the module")
        try:
            claimed = registry(kind).get(point.name)
        except UserError as error:
            remedy = error.remedy if "claimed by" in error.fault else ""
            register = f'put @registry("{kind}").register("{point.name}") above its @spec'
            return problem(error.fault if remedy else f"{point.value} does not register it", remedy or register)
        if claimed is not cls:
            return problem(f"{point.value} is not what registers '{point.name}'", "announce the class that does")
        if not attrs.has(cls):
            return problem(f"{cls.__name__} is no spec", "put @spec below its @registry(...).register(...)")
        missing = [field.name for field in attrs.fields(cls) if field.default is attrs.NOTHING]
        if missing:
            found = f"loads; it has no default for {', '.join(missing)}, so its contract is not checked here"
            return Finding(subject, "warning", found, "call robustkit.testing.check on one in its tests")
        return _checked(cls, kind, subject, package)


def _checked(cls: Any, kind: str, subject: str, package: str) -> Finding:
    from robustkit.testing import PROTOCOLS, check

    see = f"see core.strategy.{PROTOCOLS[kind].__name__}, and what `robustkit new {kind} NAME` writes"
    try:
        check(cls())
    except AssertionError as error:
        fault, _, remedy = str(error).partition("; ")
        if not fault:  # an `assert` of its own
            return Finding(subject, "problem", f"contract: fails an assertion: {_where(error, package)}", see)
        return Finding(subject, "problem", f"contract: {' '.join(fault.split())}", remedy or see)
    except (Exception, SystemExit) as error:
        return Finding(subject, "problem", f"contract: it raises {_where(error, package)}", see)
    return Finding(subject, "ok", "loads, and keeps its contract")


def _where(error: BaseException, package: str) -> str:
    """'TypeError: ... (schedule.py:12)': the last line outside of robustkit's own checks and of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    module = package.replace("-", "_")
    own = [frame for frame in frames if module in Path(frame.filename).parts or Path(frame.filename).stem == module]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{told(error)} ({Path(error.filename).name}:{error.lineno})"
    return f"{told(error)} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else told(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a plugin prints goes to standard error, and its warnings nowhere: the findings are read by programs, too."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
