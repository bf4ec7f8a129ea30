"""Python and the packages that robustkit needs: which versions, and whether they can be imported."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

import robustkit
from robustkit.doctor.finding import Finding, told

TESTED = ((3, 11), (3, 13))
"""The oldest and the newest Python that robustkit is tested with."""

IMPORTED = ("torch", "torchvision", "timm", "accelerate")
"""Packages with compiled parts, or with parts that must fit together: only an import shows whether they do."""


def versions() -> Iterator[Finding]:
    """Python, robustkit, and each package that it requires."""
    oldest, newest = (".".join(map(str, bound)) for bound in TESTED)
    inside = TESTED[0] <= sys.version_info[:2] <= TESTED[1]
    remedy = "" if inside else f"robustkit is tested with Python {oldest} to {newest}"
    yield Finding("Python", "ok" if inside else "warning", platform.python_version(), remedy)
    try:
        installed = version("robustkit")
    except PackageNotFoundError:
        remedy = "pip install -e . in its folder: strategies are found by what an installation announces"
        yield Finding("robustkit", "problem", f"{robustkit.__version__}, not installed", remedy)
        return
    if installed == robustkit.__version__:
        yield Finding("robustkit", "ok", installed)
    else:
        found = f"{robustkit.__version__} is imported, {installed} is installed"
        yield Finding("robustkit", "problem", found, "pip install -e . in its folder")
    for text in requires("robustkit") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield fits(requirement)


def fits(requirement: Requirement) -> Finding:
    """Whether a package is installed, in a version that will do."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "problem", "not installed", f"pip install '{requirement}'")
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, "ok", found)
    needed = f"{found}, needed is {requirement.specifier}"
    return Finding(requirement.name, "problem", needed, f"pip install '{requirement}'")


def imports() -> Iterator[Finding]:
    """A line for each that cannot be imported, or one that all can."""
    broken = False
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken = True
            remedy = "install builds of torch and torchvision that fit together, see pytorch.org/get-started"
            yield Finding(f"import {name}", "problem", told(error), remedy)
    if not broken:
        yield Finding("imports", "ok", ", ".join(IMPORTED))


def extras() -> Iterator[Finding]:
    """What can be installed besides, and whether it is."""
    try:
        names = metadata("robustkit").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return
    needed = [Requirement(text) for text in requires("robustkit") or ()]
    for extra in names:
        wanted = [r for r in needed if r.marker is not None and r.marker.evaluate({"extra": extra})]
        found = [fits(requirement) for requirement in wanted]
        missing = [finding.subject for finding in found if finding.found == "not installed"]
        if missing:
            remedy = f"pip install 'robustkit[{extra}]', if you want it"
            yield Finding(f"extra {extra}", "ok", f"not installed: {', '.join(missing)}", remedy)
            continue
        yield from (finding for finding in found if finding.verdict == "problem")
        listed = ", ".join(f"{finding.subject} {finding.found}" for finding in found)
        yield Finding(f"extra {extra}", "ok", listed)
