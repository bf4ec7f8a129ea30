"""Names are global to the process: what a test registers goes when it ends. Processes share the cores."""

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

os.environ.pop("COLUMNS", None)  # of whatever terminal the tests are started from
if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch counts the cores
    _share = max(1, (os.cpu_count() or 1) // int(_workers))
    os.environ["OMP_NUM_THREADS"] = str(min(_share, int(os.environ.get("OMP_NUM_THREADS", _share))))

from robustkit.core.registry import FOLDERS, registry

for _kind in FOLDERS:
    for _name in registry(_kind).names():
        registry(_kind).get(_name)  # all that is installed, so that a test cannot be the first to load it


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    held = {kind: (dict(registry(kind)._classes), dict(registry(kind)._names)) for kind in FOLDERS}
    yield
    for kind, (classes, names) in held.items():
        registry(kind)._classes.clear()
        registry(kind)._classes.update(classes)
        registry(kind)._names.clear()
        registry(kind)._names.update(names)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """For modules that train: drawing takes longer than training there."""
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "robustkit.reporting.figures", stub)
        yield
