"""Begin a plugin: a package around a strategy that works, with its test, its recipe and its entry point.

KIND is threat, epsilon, attack, objective, target, head, loss, weights, average, optimizer, schedule, dataset or
measure; NAME is what recipes will call it. The folder robustkit-NAME must not exist.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from robustkit.cli.options import add_json
from robustkit.cli.outcome import say
from robustkit.core.errors import UserError
from robustkit.scaffold import create

EXAMPLES = """\
  robustkit new target soft-labels
  robustkit new epsilon slow-start --into plugins"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", help="what it is: target, attack, loss, ...")
    parser.add_argument("name", metavar="NAME", help="small letters, digits and '-'")
    parser.add_argument("--into", metavar="DIR", default=".", help="where to make the folder (default: here)")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    into = Path(arguments.into)
    if not into.is_dir():
        raise UserError("is no folder", place=str(into), remedy="make it first, or choose another --into")
    files = create(arguments.kind, arguments.name, into)
    root = into / f"robustkit-{arguments.name}"
    if arguments.json:
        print(json.dumps({"package": str(root), "files": [str(path) for path in files]}, indent=2))
        return 0
    for path in files:
        print(path)
    folder = shlex.quote(str(root))
    say(f"Try it with    pip install -e '{root}[test]' && pytest {folder}")
    say(f"Then change    {files[2]}")
    return 0
