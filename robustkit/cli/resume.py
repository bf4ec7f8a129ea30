"""Go on with a run: training, evaluation, figures, whatever is not done yet.

The result is that of a run which never stopped. A finished run shows its results.
"""

from __future__ import annotations

import argparse

from robustkit.cli.options import add_run_control
from robustkit.cli.outcome import report, watched

EXAMPLES = """\
  robustkit resume runs/quickstart-1
  robustkit resume runs/ecas_uiat_wrn34-1 --max-time 9m"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    add_run_control(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit import runs

    outcome = watched(
        arguments,
        lambda display: runs.resume(
            arguments.run,
            device=arguments.device,
            max_steps=arguments.max_steps,
            max_time=arguments.max_time,
            display=display,
        ),
    )
    return report(outcome, arguments)
