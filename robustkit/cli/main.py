"""`robustkit COMMAND ...`: finds the command, runs it, and turns its failures into one line and an exit code.

0: done. 1: training or the machine failed, or audit or doctor found something wrong. 2: the user's mistake. 75: out of
the given time. 130: interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import robustkit
from robustkit import launch
from robustkit.cli import (
    audit,
    bench,
    compare,
    completion,
    doctor,
    evaluate,
    export,
    listing,
    new,
    predict,
    report,
    resume,
    run,
    show,
    sweep,
)
from robustkit.cli.options import EXIT_FAILURE, EXIT_INTERRUPT, EXIT_MISTAKE, EXIT_TIME, Parser
from robustkit.core.errors import UserError, visible
from robustkit.core.registry import hint

COMMANDS = {
    "run": run,
    "resume": resume,
    "sweep": sweep,
    "eval": evaluate,
    "audit": audit,
    "predict": predict,
    "list": listing,
    "show": show,
    "compare": compare,
    "report": report,
    "export": export,
    "bench": bench,
    "new": new,
    "doctor": doctor,
}

LONGEST = 2000
"""Characters of an error: a name in a damaged file may have millions."""

EXAMPLES = """\
  robustkit run recipes/quickstart.py
  robustkit show recipes/ecas_uiat_wrn34.py threat.epsilon=4/255
  robustkit list attack"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of downloads are no text for a log
    try:
        with _preemptible():
            code = _dispatch(words)
            if _several():
                from robustkit.core.processes import leave

                leave()
        return code
    except SystemExit as done:  # argparse: help, version, a wrong argument
        return done.code if isinstance(done.code, int) else EXIT_MISTAKE
    except KeyboardInterrupt:
        return _end(EXIT_INTERRUPT, "")
    except UserError as error:
        return _complain(error, EXIT_MISTAKE, debug)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  flushed at exit
        return _end(EXIT_FAILURE, "")
    except Exception as error:
        if not _is_the_machine(error):
            if not _several():
                raise  # our bug: the interpreter shows the traceback, and exits with 1
            traceback.print_exception(error)
            return _end(EXIT_FAILURE, f"{type(error).__name__}: {error}", error)
        return _complain(error, EXIT_FAILURE, debug)


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM before a run begins and after it has ended, too, means that the time is over.

    Of several processes one that is done keeps its exit code: launchers end the others when the first has left with
    another than 0 (srun --kill-on-bad-exit, torchrun), and 75 would become that of the signal.
    """

    def stop(*_: object) -> NoReturn:
        raise SystemExit(EXIT_TIME)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    after = signal.signal(signal.SIGTERM, stop)
    try:
        yield
        if _several():
            after = signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, after)


def _dispatch(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        command = COMMANDS[words[0]]
        parser = Parser(prog=f"robustkit {words[0]}", description=command.__doc__ or "", examples=command.EXAMPLES)
        command.add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        arguments = parser.parse(words[1:])
        processes = getattr(arguments, "processes", None)
        if processes is not None and launch.wanted(processes):
            return launch.launch(words, processes, arguments.device)
        code: int = command.execute(arguments)
        return code
    overview = _overview()
    if not words:
        overview.print_help(sys.stderr)
        return EXIT_MISTAKE
    if words[0].startswith("-"):
        shell = overview.parse(words).print_completion
        if shell is None:
            overview.error("a command is missing")
        print(completion.script(shell, COMMANDS))
        return 0
    overview.error(f"unknown command '{words[0]}', {hint(words[0], COMMANDS)}")


def _overview() -> Parser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(module.__doc__ or '').partition(chr(10))[0]}" for name, module in COMMANDS.items()]
    description = "Train and judge adversarially robust image classifiers.\n\ncommands:\n" + "\n".join(lines)
    parser = Parser(prog="robustkit", description=description, examples=EXAMPLES)
    parser.usage = "robustkit COMMAND ..., or robustkit COMMAND --help"
    parser.add_argument("--version", action="version", version=f"robustkit {robustkit.__version__}")
    words = f"print a script that completes commands and options in {', '.join(completion.SHELLS)}"
    parser.add_argument("--print-completion", metavar="SHELL", choices=completion.SHELLS, help=words)
    return parser


def _is_the_machine(error: Exception) -> bool:
    """Failures that a traceback does not explain better: of training, of the disk, for want of memory."""
    if isinstance(error, OSError):
        return True
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    from robustkit.core.loop import Failure
    from robustkit.core.processes import Lost

    return isinstance(error, (Failure, Lost, torch.OutOfMemoryError))


def _several() -> bool:
    """Whether this is one of several processes. Where it is not, nothing of torch need be loaded."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _complain(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory; lower batch_size, or set accumulate=2 ({text})"
    return _end(code, text, error)


def _end(code: int, text: str, error: Exception | None = None) -> int:
    """Says what went wrong, of several processes one for all, and returns the exit code."""
    text = visible(" ".join(text.split()))
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    if _several():
        from robustkit.core.processes import Lost, end, fail

        return end(error.end) if isinstance(error, Lost) else fail(code, text)
    if text:
        print(f"error: {text}", file=sys.stderr)
    return code
