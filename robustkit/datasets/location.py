"""Where data lie."""

from __future__ import annotations

import os
from pathlib import Path


def locate(root: str | None, variable: str | None = None) -> Path:
    """`root`, else what the environment says (`variable`, else ROBUSTKIT_DATA_DIR), else ./data. It need not exist."""
    named = os.environ.get(variable) if variable else None
    return Path(root or named or os.environ.get("ROBUSTKIT_DATA_DIR") or "data").expanduser()
