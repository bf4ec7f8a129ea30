"""Is all in order, here? Versions, devices, disk, data, processes, plugins: a finding each, and what to do.

Nothing here raises on what it finds, however broken it is; and nothing but `finding` is loaded with this page, so that
a torch that cannot be imported is a finding, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from robustkit.doctor.finding import Finding


def diagnose(runs: Path = Path("runs")) -> Iterator[Finding]:
    """Of this machine and this environment, one by one. `runs`: where runs are kept."""
    from robustkit.doctor import libraries

    yield from libraries.versions()
    found = list(libraries.imports())
    yield from found
    if any(finding.verdict == "problem" for finding in found):
        return  # all else needs them
    from robustkit.doctor import images, machine, plugins

    yield from machine.devices()
    yield from machine.processes()
    yield from machine.disk(runs)
    yield from images.data_sets()
    yield from libraries.extras()
    for package in plugins.packages():
        yield from plugins.examine(package)
