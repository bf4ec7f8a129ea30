"""Arguments that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from robustkit.core.registry import hint

EXIT_FAILURE, EXIT_MISTAKE, EXIT_TIME, EXIT_INTERRUPT = 1, 2, 75, 130


def runs_of(paths: Sequence[str]) -> list[str]:
    """The paths, with a sweep's runs in place of its folder. Loads nothing heavy where there is none.

    Raises:
        UserError: a sweep cannot be read, or none of its runs was measured.
    """
    if not any(Path(path).name == "sweep.json" or Path(path, "sweep.json").is_file() for path in paths):
        return list(paths)
    from robustkit.sweep import with_sweeps

    return with_sweeps(paths)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error."""

    def __init__(self, *, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, words: list[str]) -> argparse.Namespace:
        """What the words say; options may stand anywhere. A mistyped one is told its nearest."""
        found, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.startswith("-") and word.strip("-"):
                known = [option for option in self._option_string_actions if option.startswith("--")]
                self.error(f"unknown option '{word}', {hint(word, known)}")
            self.error(f"unexpected argument '{word}'")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"error: {message}; see `{self.prog} --help`\n")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--precision auto|fp32|bf16"""
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of attack and outer passes")


def precision_words(arguments: argparse.Namespace) -> list[str]:
    """The overrides that --precision is another way to write."""
    if arguments.precision is None:
        return []
    return [f"precision.{passes}={arguments.precision}" for passes in ("attack", "outer")]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE [path=value ...]"""
    words = "a recipe file (FILE.py:NAME where it defines several), a recipe.json, or a run folder"
    parser.add_argument("recipe", metavar="RECIPE", help=words)
    parser.add_argument(
        "overrides", metavar="path=value", nargs="*", default=[], help="changes to its settings, left to right"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    words = "share the work among N processes of this machine: one for each GPU, or on a CPU its cores divided"
    parser.add_argument("--processes", type=count, metavar="N", help=words)


def add_run_control(parser: argparse.ArgumentParser) -> None:
    """What `run` and `resume` share."""
    add_processes(parser)
    parser.add_argument("--max-steps", type=count, metavar="N", help="stop cleanly when N steps are done in all")
    parser.add_argument(
        "--max-time",
        type=seconds,
        metavar="TIME",
        help="stop cleanly after 90, 90s, 9m, 2h or 1h30m, with exit code 75",
    )
    add_trackers(parser)
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show results and errors only")
    add_json(parser)


def add_trackers(parser: argparse.ArgumentParser) -> None:
    words = "show epochs and results in tensorboard, wandb, mlflow, ..., too (may stand there several times)"
    parser.add_argument("--log-with", metavar="TRACKER", action="append", default=[], help=words)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best there is)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def seconds(text: str) -> float:
    """'90', '90s', '9m', '2h', '1h30m' in seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip().lower())
    hours, minutes, rest = (0, 0, 0) if found is None else (int(part or 0) for part in found.groups())
    total = 3600 * hours + 60 * minutes + rest
    if total < 1:
        raise argparse.ArgumentTypeError(f"must be a duration such as 90s, 9m or 1h30m, got '{text}'")
    return float(total)
