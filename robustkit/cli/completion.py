"""Scripts with which shells complete commands, options, recipe files, and the names of kinds, figures and tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from robustkit.core.errors import UserError
from robustkit.core.registry import FOLDERS
from robustkit.published import tables
from robustkit.reporting.paper import FIGURES

SHELLS = ("bash", "zsh", "fish")

NAMES: dict[tuple[str, str], Iterable[str]] = {
    ("list", "kind"): (*FOLDERS, "backbone"),
    ("new", "kind"): FOLDERS,
    ("report", "figure"): FIGURES,
    ("compare", "paper"): tables(),
    ("eval", "suite"): ("quick", "standard", "uiat", "ecas", "ldat", "detection"),
}
"""(command, argument) -> what it may be."""

RECIPES = ("recipe", "first", "others")
FOLDERS_OF_RUNS = ("run", "runs", "target", "surrogate")
FILES = ("out", "data", "into")
"""Arguments that are paths, by what they are paths of."""


def script(shell: str, commands: Mapping[str, ModuleType]) -> str:
    """The script for one of `SHELLS`.

    Raises:
        UserError: shtab, which writes it from the parsers, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        remedy = "pip install 'robustkit[completion]'"
        raise UserError("needs the package shtab", place="--print-completion", remedy=remedy) from error

    paths: dict[str, Any] = dict.fromkeys(RECIPES, shtab.glob("*.py", "*.json"))
    paths |= dict.fromkeys(FOLDERS_OF_RUNS, shtab.DIRECTORY) | dict.fromkeys(FILES, shtab.FILE)
    parser = argparse.ArgumentParser(prog="robustkit")
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print a script like this one")
    below = parser.add_subparsers()
    for name, command in commands.items():
        words = (command.__doc__ or "").partition("\n")[0]
        of_command = below.add_parser(name, help=words)
        command.add_arguments(of_command)
        of_command.description = words  # the figures of `report` are no help on one line
        of_command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        for action in of_command._actions:
            if (name, action.dest) in NAMES:
                action.choices = tuple(NAMES[name, action.dest])
            elif action.dest in paths:
                action.complete = paths[action.dest]  # type: ignore[attr-defined]  # what shtab looks for
    return str(shtab.complete(parser, shell))
