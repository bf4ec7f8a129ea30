"""List the strategies that recipes can name, those of installed plugins included; or the recipes of a file."""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_json

EXAMPLES = """\
  robustkit list
  robustkit list attack
  robustkit list backbone --json
  robustkit list recipes/uiat_table1.py"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = "threat, epsilon, attack, ..., backbone (default: all), or a recipe file"
    parser.add_argument("kind", metavar="KIND", nargs="?", help=words)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    if arguments.kind is not None and arguments.kind.endswith(".py"):
        return _recipes(arguments)
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


def _recipes(arguments: argparse.Namespace) -> int:
    from robustkit.core.recipe import load_recipes
    from robustkit.reporting import consoles
    from robustkit.reporting.composition import overview
    from robustkit.reporting.tables import plain_table

    entries = [overview(arguments.kind, name, recipe) for name, recipe in load_recipes(arguments.kind).items()]
    if arguments.json:
        print(json.dumps([entry._asdict() for entry in entries], indent=2))
        return 0
    table = plain_table("Recipe", "Data", "Attack", "Target", "Loss", "Epochs", "Units a step", "Digest")
    for entry in entries:
        table.add_row(*map(str, entry))
    consoles.results().print(table)
    return 0
