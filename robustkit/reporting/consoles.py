"""Two places to write to: results go to standard output, all else to standard error."""

from __future__ import annotations

import os

from rich.console import Console

PIPED_WIDTH = 140
"""Columns of what is not a terminal (COLUMNS overrules it): tables in files and logs need not fit a screen."""


def results() -> Console:
    """Standard output: tables and JSON."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error: progress and messages."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """Rich itself honours NO_COLOR, COLUMNS and dumb terminals. Square brackets are text here, not markup."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console
