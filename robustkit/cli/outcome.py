"""What `run`, `resume`, `eval` and `audit` say and write at the end."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.cli.options import EXIT_FAILURE, EXIT_INTERRUPT, EXIT_TIME
from robustkit.core.errors import UserError, visible

if TYPE_CHECKING:
    from robustkit.display import RunDisplay
    from robustkit.runs import Outcome

STOPS = {
    "": ("", 0),
    "steps": ("Stopped after the steps that were asked for", 0),
    "time": ("Stopped: the time is over", EXIT_TIME),
    "interrupt": ("Interrupted", EXIT_INTERRUPT),
    "collapse": ("Training ended early: robustness collapsed (validation.on_collapse=stop)", EXIT_FAILURE),
}


def watched(arguments: argparse.Namespace, action: Callable[[RunDisplay], Outcome]) -> Outcome:
    """Does it under the eyes of a display; an interrupt on the spot says how to go on, too."""
    from robustkit.reporting.terminal import TerminalDisplay, run_display

    display = run_display(quiet=getattr(arguments, "quiet", False))
    try:
        return action(with_trackers(display, arguments))
    except KeyboardInterrupt:
        folder = display.folder if isinstance(display, TerminalDisplay) else None
        say(f"Interrupted{'' if folder is None else _go_on(folder)}")
        raise


def with_trackers(display: RunDisplay, arguments: argparse.Namespace) -> RunDisplay:
    """The display, and the trackers of --log-with, which `eval` does not have."""
    names = getattr(arguments, "log_with", [])
    if not names:
        return display
    from robustkit.reporting.trackers import watched_by

    return watched_by(display, names)


def report(outcome: Outcome, arguments: argparse.Namespace) -> int:
    """Results to standard output; to standard error where everything lies and how to go on. Returns the exit code."""
    words, code = STOPS[outcome.stopped]
    if not speaks():
        return code
    show_results(outcome, arguments)
    done = outcome.stopped in ("", "collapse")
    page = write_page(outcome.folder) if done else None
    if getattr(arguments, "quiet", False) and not words:
        return code
    if words and outcome.stopped != "collapse":
        say(f"{words}{_go_on(outcome.folder)}")
        return code
    if words:  # nothing is left to do, but this is not the end that was wanted
        say(words)
    figures = sorted(path.name for path in (outcome.folder / "figures").glob("*.png"))
    say(f"Everything is in  {outcome.folder}")
    say(f"Results           {outcome.folder / 'results.json'}")
    if figures:
        say(f"Figures           {outcome.folder / 'figures'} ({', '.join(figures)})")
    if page is not None:
        _say_where(page)
    folder = shlex.quote(str(outcome.folder))
    say(f"Go on with        robustkit eval {folder} --again, robustkit compare {folder} OTHER")
    return code


def write_page(folder: Path) -> Path | None:
    """Writes the run's report; where it cannot be written, a line says so: all that counts is done by now."""
    from robustkit.reporting.report import read_runs, write_report

    try:
        return write_report(read_runs([str(folder)]))
    except (UserError, OSError) as error:
        say(f"No report: {error}")
        return None


def renew_page(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes the run's report once more, as there is more to be told."""
    page = write_page(folder) if speaks() else None
    if page is not None and not getattr(arguments, "quiet", False):
        _say_where(page)


def _say_where(page: Path) -> None:
    say(f"Report            {page} (a page for a browser)")


def exit_code(outcome: Outcome) -> int:
    """75 out of time, 130 interrupted, 1 where robustness collapsed and that was to end training, else 0."""
    return STOPS[outcome.stopped][1]


def show_results(outcome: Outcome, arguments: argparse.Namespace) -> None:
    """The table, or the JSON, on standard output."""
    if not speaks():
        return
    if arguments.json:
        data = {"folder": str(outcome.folder), "stopped": outcome.stopped, "results": outcome.results}
        print(json.dumps(data | {"control": outcome.control}, indent=2))
        return
    from robustkit.reporting import consoles
    from robustkit.reporting.tables import print_results, with_control

    if shown := with_control(outcome.results, outcome.control):
        print_results(consoles.results(), shown)


def say(text: str) -> None:
    """A line on standard error."""
    if speaks():
        print(visible(text), file=sys.stderr)


def speaks() -> bool:
    """Of several processes the first one does."""
    return os.environ.get("RANK", "0") == "0"


def _go_on(folder: Path) -> str:
    return f"; go on with: robustkit resume {shlex.quote(str(folder))}"
