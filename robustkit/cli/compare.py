"""Compare recipes and runs: settings that differ, and results side by side."""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_json

EXAMPLES = """\
  robustkit compare recipes/pgd_at_rn18.py recipes/uiat_rn18.py
  robustkit compare runs/quickstart-1 runs/quickstart-2 runs/quickstart-3
  robustkit compare recipes/quickstart.py runs/quickstart-1 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a recipe file, a recipe.json, or a run folder")
    parser.add_argument("others", metavar="B", nargs="+", help="what to compare it with")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.reporting import comparison, consoles

    items = [comparison.load_item(path) for path in (arguments.first, *arguments.others)]
    if arguments.json:
        print(json.dumps(comparison.to_data(items), indent=2))
    else:
        comparison.print_comparison(consoles.results(), items)
    return 0
