"""List the strategies that recipes can name, those of installed plugins included."""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_json

EXAMPLES = """\
  robustkit list
  robustkit list attack
  robustkit list backbone --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", nargs="?", help="threat, epsilon, attack, ..., backbone (default: all)")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.reporting.catalogue import catalogue

    entries = catalogue(arguments.kind)
    if arguments.json:
        print(json.dumps([entry._asdict() for entry in entries], indent=2))
        return 0
    from robustkit.reporting import consoles
    from robustkit.reporting.tables import plain_table

    console = consoles.results()
    table = plain_table("Kind", "Name", "Description", "Origin")
    for entry in entries:
        table.add_row(*entry)
    console.print(table)
    if any(entry.kind == "backbone" for entry in entries):
        console.print("Every other timm model name is a backbone, too.")
    return 0
