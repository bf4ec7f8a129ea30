"""Which data sets are on this machine, and where each is looked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from robustkit.core.registry import registry
from robustkit.datasets.location import SHARED, Sought
from robustkit.doctor.finding import Finding


def data_sets() -> Iterator[Finding]:
    """A line for each that is looked for on the disk; the others come with a package, or are made up."""
    folder = os.environ.get(SHARED)
    if folder and not Sought().folder.is_dir():
        yield Finding(
            SHARED, "problem", f"{folder} is no folder", "set it to the folder that holds the data, or unset it"
        )
    for name in registry("dataset").names():
        try:
            dataset: Any = registry("dataset").get(name)()
            sought: Sought | None = getattr(dataset, "sought", None)
        except (Exception, SystemExit):
            continue  # a plugin that is broken, which is said of the plugin; or one with settings that must be given
        if sought is not None:
            yield _found(name, sought, downloads=getattr(dataset, "download", False))


def _found(name: str, sought: Sought, *, downloads: bool) -> Finding:
    subject, folder = f"data={name}", sought.folder
    form = sought.form()
    if form is not None:
        return Finding(subject, "ok", f"{form}, in {folder}")
    wanted = " and ".join(sought.files)
    if sought.variable and os.environ.get(sought.variable):
        other = " (or train/ and test/)" if sought.or_folder else ""
        remedy = f"set it to the folder that holds {wanted}{other}, or unset it"
        return Finding(subject, "problem", f"{sought.variable} names {folder}, where it is not", remedy)
    variable = sought.variable or SHARED
    remedy = "it is downloaded there when first used; or " if downloads else ""
    return Finding(subject, "warning", f"not in {folder}", f"{remedy}set {variable} to the folder that holds {wanted}")
