"""Train, evaluate and draw a recipe, in a new folder.

The folder holds the recipe, its checkpoints, metrics, results and figures; `robustkit resume` goes on with it from
wherever it stopped.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from robustkit.cli.options import add_precision, add_recipe, add_run_control, precision_words
from robustkit.cli.outcome import exit_code, report, say, show_results, watched
from robustkit.core.errors import UserError

EXAMPLES = """\
  robustkit run recipes/quickstart.py
  robustkit run recipes/ecas_uiat_wrn34.py threat.epsilon=4/255 target.inner=inverse --processes 4
  robustkit run recipes/ecas_uiat_wrn34.py --smoke
  robustkit run recipes/uiat_table1.py:cifar10-mart --max-time 55m && echo finished"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder of the run (default: runs/<recipe>-<n>)")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="try it out: two steps on made-up images, then all the rest; nothing kept without --out",
    )
    parser.add_argument("--no-preflight", action="store_true", help="begin without looking for mistakes first")
    add_precision(parser)
    parser.add_argument("--seed", metavar="N", help="same as seed=N")
    add_run_control(parser)


def execute(arguments: argparse.Namespace) -> int:
    overrides = tuple(_overrides(arguments))
    if arguments.smoke:
        return _smoke(arguments, overrides)
    from robustkit import runs
    from robustkit.core.override import override
    from robustkit.core.recipe import load_recipe

    recipe = override(load_recipe(arguments.recipe), overrides)
    outcome = watched(
        arguments,
        lambda display: runs.run(
            recipe,
            out=arguments.out,
            source=arguments.recipe,
            overrides=overrides,
            device=arguments.device,
            max_steps=arguments.max_steps,
            max_time=arguments.max_time,
            preflight=not arguments.no_preflight,
            display=display,
        ),
    )
    return report(outcome, arguments)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Options are only another way to write overrides."""
    words = [*arguments.overrides, *precision_words(arguments)]
    if arguments.seed is not None:
        words.append(f"seed={arguments.seed}")
    return words


def _smoke(arguments: argparse.Namespace, overrides: tuple[str, ...]) -> int:
    from robustkit import runs
    from robustkit.core.override import override
    from robustkit.core.recipe import load_recipe
    from robustkit.smoke import smoke

    if arguments.out is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("several processes need one folder", place="--smoke", remedy="give --out DIR")
    recipe = smoke(override(load_recipe(arguments.recipe), overrides))
    with tempfile.TemporaryDirectory(prefix="robustkit-smoke-") as temporary:
        outcome = watched(
            arguments,
            lambda display: runs.run(
                recipe,
                out=arguments.out or Path(temporary) / "run",
                source=arguments.recipe,
                overrides=overrides,
                device=arguments.device,
                max_steps=2,
                max_time=arguments.max_time,
                rehearse=True,
                preflight=False,  # made-up images, and two steps: there is nothing to predict
                display=display,
            ),
        )
        if outcome.stopped:
            say("The smoke run was stopped")
            return exit_code(outcome)
        show_results(outcome, arguments)
    kept = "its folder was temporary" if arguments.out is None else f"see {arguments.out}"
    say(f"Smoke run passed: {arguments.recipe} trains and is evaluated (the numbers mean nothing; {kept})")
    return 0
