"""Where data lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from robustkit.core.errors import DataError

SHARED = "ROBUSTKIT_DATA_DIR"
"""The variable that names a folder for all data sets that have none of their own."""


class Sought(NamedTuple):
    """What is looked for, and where: `files` in `root`, else where `variable` says.

    With `or_folder`, an image folder there will do, too. `inside`: in the folder of that name in there, where it is.
    """

    root: str | None = None
    variable: str | None = None
    files: tuple[str, ...] = ()
    or_folder: bool = True
    inside: str = ""

    @property
    def folder(self) -> Path:
        folder = locate(self.root, self.variable)
        return folder / self.inside if (folder / self.inside).is_dir() else folder

    def form(self) -> str | None:
        """In which form it is there, or None."""
        folder = self.folder
        if self.files and all((folder / file).exists() for file in self.files):
            return "the original files"
        return "an image folder" if self.or_folder and (folder / "train").is_dir() else None


def locate(root: str | None, variable: str | None = None) -> Path:
    """`root`, else what the environment says (`variable`, else ROBUSTKIT_DATA_DIR), else ./data. It need not exist.

    Raises:
        DataError: no folder can be called so.
    """
    named = os.environ.get(variable) if variable else None
    if "\0" in (root or ""):
        raise DataError("no folder can be called so", place=f"data.root={root!r}")
    return Path(root or named or os.environ.get(SHARED) or "data").expanduser()
