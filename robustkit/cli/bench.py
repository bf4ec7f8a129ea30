"""Measure a recipe's training step: images a second, passes, where the time goes, and how the usual script compares.

The usual script is the same recipe in float32 and NCHW, with loss.backward() in the attack. Close other programs first;
the ratio is of steps that alternate in one process.
"""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_device, add_json, add_precision, add_recipe, count, precision_words
from robustkit.cli.outcome import say

EXAMPLES = """\
  robustkit bench recipes/quickstart.py
  robustkit bench recipes/uiat_rn18.py --precision bf16 --windows 5
  robustkit bench recipes/ecas_uiat_wrn34.py batch_size=16 --no-plain --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_precision(parser)
    parser.add_argument("--windows", type=count, default=3, metavar="N", help="timed windows; the median is reported")
    parser.add_argument("--steps", type=count, default=1, metavar="N", help="steps in a window")
    parser.add_argument("--no-plain", action="store_true", help="leave out the usual script")
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.bench import bench
    from robustkit.core.override import override
    from robustkit.core.recipe import load_recipe
    from robustkit.reporting import consoles
    from robustkit.reporting.speed import print_speed

    recipe = override(load_recipe(arguments.recipe), [*arguments.overrides, *precision_words(arguments)])
    found = bench(
        recipe,
        device=arguments.device,
        windows=arguments.windows,
        steps=arguments.steps,
        plain=not arguments.no_plain,
        watch=say,
    )
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_speed(consoles.results(), found)
    return 0
