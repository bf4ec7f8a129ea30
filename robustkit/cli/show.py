"""Show a recipe: every setting and where it comes from, what a step costs, how radii and rates move.

Settings that the recipe file sets are marked with their default, overrides with what the recipe file says.
"""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_json, add_recipe

EXAMPLES = """\
  robustkit show recipes/uiat_table1.py:svhn-trades
  robustkit show recipes/ecas_uiat_wrn34.py threat.epsilon=4/255 target.inner=inverse
  robustkit show runs/quickstart-1 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.core.override import override
    from robustkit.core.recipe import load_recipe
    from robustkit.reporting import composition, consoles

    before = load_recipe(arguments.recipe)
    recipe = override(before, arguments.overrides)
    if arguments.json:
        print(json.dumps(composition.to_data(recipe), indent=2))
    else:
        composition.print_composition(consoles.results(), recipe, before, arguments.recipe)
    return 0
