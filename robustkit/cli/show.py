"""Show a recipe: every setting and where it comes from, what a step costs, how radii and rates move.

Settings that the recipe file sets are marked with their default, overrides with what the recipe file says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.cli.options import add_device, add_json, add_recipe, count
from robustkit.core.errors import UserError

if TYPE_CHECKING:
    from robustkit.core.recipe import Recipe

EXAMPLES = """\
  robustkit show recipes/uiat_table1.py:svhn-trades
  robustkit show recipes/ecas_uiat_wrn34.py threat.epsilon=4/255 target.inner=inverse
  robustkit show runs/quickstart-1 --json
  robustkit show recipes/ecas_table3.py:cifar10-ecas-pgd-at --calibrate-entropy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    words = "show the entropies that ECAS's thresholds come from instead, measured on augmented training images"
    parser.add_argument("--calibrate-entropy", action="store_true", help=words)
    parser.add_argument("--batches", type=count, metavar="N", help="of --calibrate-entropy: on so many (default: 20)")
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.core.override import override
    from robustkit.core.recipe import load_recipe
    from robustkit.reporting import composition, consoles

    for option in ("batches", "device"):
        if getattr(arguments, option) is not None and not arguments.calibrate_entropy:
            remedy = "leave it out, or add --calibrate-entropy"
            raise UserError("means nothing without --calibrate-entropy", place=f"--{option}", remedy=remedy)
    before = load_recipe(arguments.recipe)
    recipe = override(before, arguments.overrides)
    if arguments.calibrate_entropy:
        _calibrate(recipe, arguments)
    elif arguments.json:
        print(json.dumps(composition.to_data(recipe), indent=2))
    else:
        composition.print_composition(consoles.results(), recipe, before, arguments.recipe)
    return 0


def _calibrate(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from robustkit.calibration import BATCHES, calibrate_entropy
    from robustkit.reporting import consoles
    from robustkit.reporting.calibration import print_calibration, to_data

    batches, folder = arguments.batches or BATCHES, Path(arguments.recipe)
    with consoles.messages().status(f"forwarding {batches} batches"):
        found = calibrate_entropy(
            recipe, run=folder if folder.is_dir() else None, batches=batches, device=arguments.device
        )
    if arguments.json:
        print(json.dumps(to_data(found), indent=2))
    else:
        print_calibration(consoles.results(), found, arguments.recipe)
