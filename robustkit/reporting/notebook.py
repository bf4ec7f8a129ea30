"""In a notebook: progress in the cell, for whoever calls from Python and names no display of his own.

Lines and bar are one output each, which is replaced; nothing but IPython is needed (rich's own way wants ipywidgets).
In a script nothing is shown unless a display is given.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from robustkit.core.errors import UserError, visible

if TYPE_CHECKING:
    from robustkit.display import RunDisplay
    from robustkit.evaluation.audit import Watch as AuditWatch
    from robustkit.evaluation.evaluate import Watch
    from robustkit.reporting.terminal import Bar
    from robustkit.runs import Outcome

EVERY = 0.5
"""Seconds between two states of a bar: each travels to the browser, and a kernel may be far from it."""
LINES = "max-height: 24em; overflow: auto; display: flex; flex-direction: column-reverse"
"""A box that scrolls, and stands at its last line."""


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel (Lab, VS Code, Colab, ...), and of several processes the first one."""
    ipython = sys.modules.get("IPython")  # whoever is in a kernel has it
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None and os.environ.get("RANK", "0") == "0"


def watcher() -> RunDisplay:
    """Who watches where nobody was named: in a notebook the cell, else nobody. Here that is decided, for all calls."""
    from robustkit.display import Silent

    if not in_notebook():
        return Silent()
    from robustkit.reporting import consoles
    from robustkit.reporting.terminal import TerminalDisplay

    cell = Cell()
    return TerminalDisplay(consoles.lines(cell), cell)


@contextmanager
def evaluating(watch: Watch | None) -> Iterator[Watch | None]:
    """The watch of an evaluation; where there is none, in a notebook, one that shows a bar in the cell."""
    if watch is not None or not in_notebook():
        yield watch
        return
    display = watcher()
    try:
        yield partial(display.measuring, "model")
    finally:
        display.end()


@contextmanager
def auditing(watch: AuditWatch | None) -> Iterator[AuditWatch | None]:
    """Likewise, of an audit."""
    if watch is not None or not in_notebook():
        yield watch
        return
    from robustkit.reporting.terminal import Bar

    cell = Cell()
    try:
        yield lambda name, number, total: cell.update(Bar(f"check {number + 1} of {total}: {name}", number, total))
    finally:
        cell.stop()


class Cell:
    """The output of a cell: lines that stay (it is the file they are written to), and below them a bar that moves."""

    def __init__(self) -> None:
        self._text = self._title = ""
        self._due = 0.0
        self._lines: Any = None  # IPython's handles of what is shown
        self._bar: Any = None

    def write(self, text: str) -> int:
        self._text += text
        shown = f'<div style="{LINES}"><pre style="white-space: pre; line-height: 1.2">{escape(self._text)}</pre></div>'
        self._lines = _shown(self._lines, shown, self._text)
        return len(text)

    def flush(self) -> None: ...

    def start(self) -> None: ...

    def update(self, bar: Bar) -> None:
        """Shows the bar: at once where it is another one, else now and then."""
        now = time.monotonic()
        if bar.title == self._title and now < self._due:
            return
        self._title, self._due = bar.title, now + EVERY
        self._bar = _shown(self._bar, bar.as_html(), bar.title)

    def stop(self) -> None:
        if self._bar is not None:
            _shown(self._bar, "", "")
        self._title = ""


def conclude(outcome: Outcome, say: Callable[[str], None]) -> None:
    """What the command does after a run: the page, or how to go on."""
    if not in_notebook():
        return
    if outcome.stopped in ("", "collapse"):
        with suppress(UserError, OSError):  # then there is no link to it; all that counts is done
            outcome.report()
    else:
        say(f"Stopped ({outcome.stopped}); go on with {_go_on(outcome)}")


def below(outcome: Outcome) -> str:
    """HTML: where everything lies, the page if it is written, and how to go on if there is more to do."""
    parts = [f"Everything is in {_code(str(outcome.folder))}"]
    page = outcome.folder / "report.html"
    if page.is_file():
        parts.append(f'<a href="{escape(_address(page))}" target="_blank">report</a>')
    if outcome.stopped not in ("", "collapse"):
        parts.append(f"go on with {_code(_go_on(outcome))}")
    return f"<div>{'; '.join(parts)}</div>"


def _shown(handle: Any, html: str, text: str) -> Any:
    """Shows it, in place of what the handle shows, if there is one; returns the handle."""
    from IPython import display

    bundle = {"text/html": html, "text/plain": text}
    if handle is None:
        show: Any = display.display  # IPython does not say its types
        return show(bundle, raw=True, display_id=True)
    handle.update(bundle, raw=True)
    return handle


def _address(path: Path) -> str:
    """As a link in a notebook: front ends find what lies below the notebook's folder, where kernels begin."""
    with suppress(ValueError):
        return quote(path.resolve().relative_to(Path.cwd().resolve()).as_posix())
    return path.resolve().as_uri()


def _go_on(outcome: Outcome) -> str:
    return f"robustkit.resume({str(outcome.folder)!r})"


def _code(text: str) -> str:
    return f"<code>{escape(visible(text))}</code>"
