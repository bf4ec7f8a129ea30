"""Measure the checkpoints of a run by its recipe's measures.

By default this measures what results.json lacks and shows everything. Results are written to results.json, except those
of --limit and of a run whose training is not finished.
"""

from __future__ import annotations

import argparse

from robustkit.cli.options import EXIT_INTERRUPT, add_device, add_json, count
from robustkit.cli.outcome import say, show_results, watched

EXAMPLES = """\
  robustkit eval runs/quickstart-1
  robustkit eval runs/quickstart-1 --checkpoint best --measures clean,pgd-20 --again
  robustkit eval runs/quickstart-1 --limit 100 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="one of them only")
    parser.add_argument("--measures", metavar="KEY,KEY", help="some of the recipe's measures only")
    parser.add_argument("--limit", type=count, metavar="N", help="a fixed part of the test images, for a quick look")
    parser.add_argument("--again", action="store_true", help="measure also what results.json has already")
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit import runs

    outcome = watched(
        arguments,
        lambda display: runs.evaluate_run(
            arguments.run,
            checkpoints=runs.CHECKPOINTS if arguments.checkpoint is None else (arguments.checkpoint,),
            keys=None if arguments.measures is None else arguments.measures.split(","),
            limit=arguments.limit,
            again=arguments.again,
            device=arguments.device,
            display=display,
        ),
    )
    show_results(outcome, arguments)
    if outcome.stopped:
        say("Interrupted; the same command goes on with what is not measured yet")
        return EXIT_INTERRUPT
    return 0
