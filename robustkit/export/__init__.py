"""A run's model in a folder that can be handed on: as safetensors with a model card, or as RobustBench takes it.

Both say what is known of the model and nothing else: numbers that were not measured are not there, and what only its
authors can say is marked to be filled in.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from robustkit.core.errors import UserError
from robustkit.core.registry import hint
from robustkit.export.robustbench import write_robustbench
from robustkit.export.safetensors import write_safetensors
from robustkit.export.source import Source, sha256_of, source_of


@attrs.frozen
class Export:
    """What was written: the folder, and {file in it: its sha256}."""

    folder: Path
    form: str
    checkpoint: str
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "to": self.form, "checkpoint": self.checkpoint, "files": self.files}


FORMATS: dict[str, Callable[[Source, Path], None]] = {
    "safetensors": write_safetensors,
    "robustbench": write_robustbench,
}


def export(run: str | Path, to: str, *, checkpoint: str = "last", out: str | Path | None = None) -> Export:
    """Writes a run's model into a new folder (default: RUN/export/<to>-<checkpoint>).

    Args:
        to: "safetensors" (for `robustkit.load`, and any reader of safetensors) or "robustbench".
        checkpoint: "last" or "best".

    Raises:
        UserError: there is no such run or checkpoint, or the folder exists already.
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to '{to}'", place="to", remedy=hint(to, FORMATS))
    run = Path(run)
    source = source_of(run, checkpoint)
    folder = run / "export" / f"{to}-{checkpoint}" if out is None else Path(out)
    if folder.exists():
        raise UserError("exists already", place=str(folder), remedy="remove it, or choose another --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        partial.chmod(folder.parent.stat().st_mode & 0o777)  # a temporary folder is for its owner's eyes alone
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
        raise UserError(fault, place=str(folder), remedy="choose another --out") from error
    try:
        FORMATS[to](source, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Export(folder, to, checkpoint, {str(path.relative_to(folder)): sha256_of(path) for path in files})
