"""Compare recipes and runs: settings that differ, results side by side, and what the differences are worth.

Of runs it says for each measure whether the data tell the first from the others; runs of one recipe but for the seed
are taken together. A sweep's folder stands for its runs. With --paper, runs stand beside the numbers that a paper
published instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from robustkit.cli.options import add_json, runs_of
from robustkit.core.errors import UserError
from robustkit.published import load, tables

EXAMPLES = """\
  robustkit compare recipes/pgd_at_rn18.py recipes/uiat_rn18.py
  robustkit compare runs/quickstart-1 runs/quickstart-2 runs/quickstart-3
  robustkit compare runs/three
  robustkit compare runs/uiat_rn18-1 --paper uiat-table1 --row UIAT"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "first", metavar="A", help="a recipe file (or FILE.py:NAME), a recipe.json, a run folder, or a sweep's"
    )
    parser.add_argument("others", metavar="B", nargs="*", help="what to compare it with")
    parser.add_argument("--paper", metavar="TABLE", help=f"published numbers: {', '.join(tables())}")
    parser.add_argument("--row", metavar="METHOD", help="the table's row, where the recipe does not say which it is")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    paths = runs_of([arguments.first, *arguments.others])
    if arguments.paper is not None:
        return _with_paper(paths, arguments)
    if arguments.row is not None:
        raise UserError("names a row of a paper's table", place="--row", remedy="add --paper TABLE")
    if len(paths) == 1:
        raise UserError(
            "there is nothing to compare it with", place=arguments.first, remedy="give a B, too, or --paper TABLE"
        )
    from robustkit.reporting import comparison, consoles

    items = [comparison.load_item(path) for path in paths]
    if arguments.json:
        print(json.dumps(comparison.to_data(items), indent=2))
    else:
        comparison.print_comparison(consoles.results(), items)
    return 0


def _with_paper(paths: Sequence[str], arguments: argparse.Namespace) -> int:
    table = load(arguments.paper)
    from robustkit.reporting import consoles, published
    from robustkit.reporting.comparison import load_item

    found = published.beside([load_item(path) for path in paths], table, arguments.row)
    if arguments.json:
        print(json.dumps(published.to_data(found, table), indent=2))
    else:
        published.print_beside(consoles.results(), found, table)
    return 0
