"""Run a recipe, or several, over lists of values and seeds; or search for good values. Every trial is a run.

Lists are tried in every combination, which are checked as recipes before the first one trains. The folder of a sweep
goes on with it, and so does the same command with the same --out; as many workers as you like may do so at once, on
every machine that sees the folder. --workers N starts N of them here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from robustkit.cli.options import (
    EXIT_FAILURE,
    add_device,
    add_json,
    add_trackers,
    count,
    seconds,
)
from robustkit.cli.outcome import STOPS, say, with_trackers
from robustkit.core.errors import UserError

if TYPE_CHECKING:
    from robustkit.sweep import Sweep

EXAMPLES = """\
  robustkit sweep recipes/quickstart.py loss.weight=1,2,3.5,5 seed=1,2,3 epochs=6
  robustkit sweep recipes/pgd_at_rn18.py recipes/trades_rn18.py recipes/uiat_rn18.py seed=1,2,3 --out runs/three
  robustkit sweep recipes/quickstart.py loss.weight=1,5 seed=1,2,3 --workers 4
  robustkit sweep recipes/uiat_rn18.py optimizer.lr=0.01..0.3:log loss.weight=1..5 --search tpe --trials 20"""

_STOPS = STOPS | {"lost": ("Stopped: no worker is left", EXIT_FAILURE)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a recipe (FILE.py, FILE.py:NAME, recipe.json, or a run folder), several, or the folder of a sweep"
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help=what)
    words = "settings: path=value,value,... (a list as one value in brackets); with --search also path=low..high[:log]"
    parser.add_argument("words", metavar="path=values", nargs="*", help=words)
    parser.add_argument("--out", metavar="DIR", help="the folder of the sweep (default: runs/<recipe>-sweep-<n>)")
    parser.add_argument(
        "--search",
        choices=("random", "tpe"),
        help="draw trials instead of trying all, by robust accuracy on held-out training images (needs Optuna)",
    )
    parser.add_argument("--trials", type=count, metavar="N", help="of a search: how many")
    parser.add_argument(
        "--prune", action="store_true", help="of a search: stop a trial after an epoch below the median of those done"
    )
    words = "share the trials among N processes of this machine: cores are divided, several GPUs taken by turns"
    parser.add_argument("--workers", type=count, metavar="N", default=1, help=words)
    parser.add_argument("--retry", action="store_true", help="take up the trials that failed once more")
    parser.add_argument(
        "--max-time",
        type=seconds,
        metavar="TIME",
        help="stop cleanly after 90, 90s, 9m, 2h or 1h30m, with exit code 75",
    )
    add_trackers(parser)
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show results and errors only")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        remedy = "start it several times instead: workers share the trials"
        raise UserError("each of its trials trains in one process", place="robustkit sweep", remedy=remedy)
    sweep = _sweep(arguments)
    from robustkit.sweep import take_up_again, workers

    if workers.is_one():
        workers.settle_in()
        return _STOPS[_work(sweep, arguments)][1]
    if arguments.retry:
        take_up_again(sweep)
    trials = sweep.trials()
    planned = len(trials) if sweep.search is None else sweep.search.trials
    left = planned - sum(bool(trial.ended) for trial in trials)
    several = min(arguments.workers, left)
    if not arguments.quiet:
        say(f"{sweep.folder}: {planned} trials{f', {several} workers' if several > 1 else ''}")
    if several > 1:
        codes = _start(sweep, several, arguments)
        return workers.most_serious([*codes, _report(sweep, workers.ending(codes), arguments)])
    try:
        stopped = _work(sweep, arguments)
    except KeyboardInterrupt:
        say(f"Interrupted{_go_on(sweep)}")
        raise
    return _report(sweep, stopped, arguments)


def _work(sweep: Sweep, arguments: argparse.Namespace) -> str:
    """In this process. Returns why it stopped before the end, or ""."""
    from robustkit.reporting.terminal import run_display
    from robustkit.sweep import work

    return work(
        sweep,
        device=arguments.device,
        max_time=arguments.max_time,
        display=lambda: with_trackers(run_display(quiet=arguments.quiet), arguments),
    )


def _start(sweep: Sweep, workers: int, arguments: argparse.Namespace) -> list[int]:
    """In so many other processes. Returns their exit codes."""
    from robustkit.launch import cores
    from robustkit.reporting.terminal import run_display
    from robustkit.sweep.workers import environments, gpus_for, run_workers

    with_trackers(run_display(quiet=True), arguments)  # a mistake is to be told once, not by each
    words = ["sweep", os.path.join(".", sweep.folder)]  # a name as a=b would be a setting
    words += [] if arguments.device is None else ["--device", arguments.device]
    words += [] if arguments.max_time is None else ["--max-time", f"{arguments.max_time:.0f}s"]
    words += [word for name in arguments.log_with for word in ("--log-with", name)]
    words += [f"--{option}" for option in ("quiet", "debug") if getattr(arguments, option)]
    return run_workers(words, environments(workers, cores(), gpus_for(arguments.device)), say)


def _sweep(arguments: argparse.Namespace) -> Sweep:
    from robustkit.sweep.axes import is_word

    given = [*arguments.recipes, *arguments.words]
    words = [text for text in given if is_word(text)]
    recipes = [text for text in given if not is_word(text)]
    if not recipes:
        raise UserError("a recipe is missing", place="robustkit sweep", remedy="give one before the settings")
    from robustkit.sweep import Search, make_sweep, open_sweep

    planned = [recipe for recipe in recipes if Path(recipe, "sweep.json").is_file()]
    if planned:
        if len(given) > 1 or arguments.out or arguments.search or arguments.trials or arguments.prune:
            remedy = f"give it alone: robustkit sweep {shlex.quote(planned[0])}"
            raise UserError("is a sweep, whose plan is made", place=planned[0], remedy=remedy)
        return open_sweep(planned[0])
    if (arguments.search is None) != (arguments.trials is None):
        raise UserError("--search and --trials go together", place="sweep", remedy="e.g. --search tpe --trials 20")
    if arguments.prune and arguments.search is None:
        raise UserError("a grid tries everything to its end", place="--prune", remedy="leave it out, or add --search")
    search = None
    if arguments.search is not None:
        search = Search(method=arguments.search, trials=arguments.trials, prune=arguments.prune)
    return make_sweep(recipes, words, search=search, out=arguments.out)


def _report(sweep: Sweep, stopped: str, arguments: argparse.Namespace) -> int:
    from robustkit.reporting import consoles, trials

    if arguments.json:
        print(json.dumps(trials.to_data(sweep) | {"stopped": stopped}, indent=2))
    else:
        trials.print_sweep(consoles.results(), sweep)
    words, code = _STOPS[stopped]
    if stopped:
        say(f"{words}{_go_on(sweep)}")
        return code
    for path, drawn in trials.draw_figures(sweep):
        if not arguments.quiet:
            say(f"Figure            {drawn}" if isinstance(drawn, Path) else f"No figure of {path}: {drawn}")
    if not arguments.quiet:
        say(f"Every run is in   {sweep.folder}")
    failed = [trial for trial in sweep.trials() if trial.ended == "failed"]
    if failed:
        some = f"{len(failed)} trial{'' if len(failed) == 1 else 's'}"
        say(f"{some} failed; once more: robustkit sweep {shlex.quote(str(sweep.folder))} --retry")
    return EXIT_FAILURE if any(trial.ended in ("failed", "collapse") for trial in sweep.trials()) else 0


def _go_on(sweep: Sweep) -> str:
    return f"; go on with: robustkit sweep {shlex.quote(str(sweep.folder))}"
