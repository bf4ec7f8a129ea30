"""List the strategies that recipes can name, those of installed plugins included; or the recipes of a file."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter

from robustkit.cli.options import add_json
from robustkit.core.registry import Entry

EXAMPLES = """\
  robustkit list
  robustkit list attack
  robustkit list backbone --json
  robustkit list recipes/uiat_table1.py"""


NARROW = 72
"""On fewer columns a list reads better than a table."""


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
    if console.width < NARROW:
        for entry in entries:
            console.print(f"{entry.kind} {entry.name} ({entry.origin})", style="bold", soft_wrap=True)
            text = textwrap.fill(entry.description, console.width, initial_indent="  ", subsequent_indent="  ")
            console.print(text, soft_wrap=True)
    else:
        table = plain_table("Kind", "Name", "Description", "Origin")
        for entry in entries:
            table.add_row(*entry, style=None if _is_ours(entry) else "bold")
        console.print(table)
    plugins = Counter(entry.origin for entry in entries if not _is_ours(entry))
    if plugins:
        told = ", ".join(f"{origin} ({count})" for origin, count in sorted(plugins.items()))
        console.print(f"From plugins: {told}. See robustkit doctor --plugin PACKAGE.")
    if any(entry.kind == "backbone" for entry in entries):
        console.print("Every other timm model name is a backbone, too.")
    return 0


def _is_ours(entry: Entry) -> bool:
    return entry.origin.split()[0] == "robustkit"


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
