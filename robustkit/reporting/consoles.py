"""Two places to write to: results go to standard output, all else to standard error."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from robustkit.core.errors import visible

PIPED_WIDTH = 140
"""Columns of what is not a terminal (COLUMNS overrules it): tables in files and logs need not fit a screen."""

NOTEBOOK_WIDTH = 120
"""Columns of tables in a notebook."""
_PRE = "white-space: pre; overflow-x: auto; line-height: 1.2; font-family: Menlo, 'DejaVu Sans Mono', monospace"
"""Lines that scroll rather than wrap, in a font whose rules meet."""


def results() -> Console:
    """Standard output: tables and JSON."""
    return _console(stderr=False)


def messages() -> Console:
    """Standard error: progress and messages."""
    return _console(stderr=True)


def as_html(show: Callable[[Console], None]) -> str:
    """What `show` prints, as a notebook shows it: text in a fixed width, styles in the tags, everything escaped."""
    console = _no_terminal(io.StringIO(), width=NOTEBOOK_WIDTH, record=True)
    show(console)
    return console.export_html(inline_styles=True, code_format=f'<pre style="{_PRE}">{{code}}</pre>')


def lines(file: Any) -> Console:
    """Whatever has `write` and `flush`: text without colours."""
    return _no_terminal(file, width=PIPED_WIDTH)


def moves(console: Console) -> bool:
    """Whether what it shows can be overwritten: on a terminal, but not where that is a notebook's `!command`."""
    return console.is_terminal and not console.is_dumb_terminal and "JPY_PARENT_PID" not in os.environ


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


def _no_terminal(file: Any, **options: Any) -> Console:
    """Whatever the environment says: a notebook's kernel asks for colours."""
    plain: dict[str, Any] = {"force_terminal": False, "force_jupyter": False, "color_system": None}
    return _Literal(file=file, markup=False, emoji=False, highlight=False, **plain, **options)
