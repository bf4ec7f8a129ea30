"""Two places to write to: results go to standard output, all else to standard error."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.text import Text

from robustkit.core.errors import visible

PIPED_WIDTH = 140
"""Columns of what is not a terminal (COLUMNS overrules it): tables in files and logs need not fit a screen."""


def results() -> Console:
    """Standard output: tables and JSON."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error: progress and messages."""
    return _console(stderr=True)


class _Literal(Console):
    """Names may come from anybody's files: square brackets are text here, not markup, and no text steers a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(visible, text.split("\n"))), **options)


def _console(*, stderr: bool) -> Console:
    """Rich itself honours NO_COLOR, COLUMNS and dumb terminals."""
    console = _Literal(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console
