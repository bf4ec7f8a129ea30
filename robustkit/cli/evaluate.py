"""Judge a run's checkpoints, or any model: clean accuracy, attacks, AutoAttack.

Of a run this measures what its recipe asks for and results.json lacks, or a suite (--suite), and shows everything.
Results are written to results.json, and the run's report.html anew, except those of --limit and of a run whose training
is not finished. A killed or interrupted evaluation goes on where it was, with the same command.

Of module:function, called without arguments, the module it returns is judged: it maps images in [0, 1] to logits,
normalisation inside. Name the test images (data=...) and, if not L-infinity 8/255, the threat model (threat=...).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

from robustkit.cli.options import EXIT_INTERRUPT, EXIT_TIME, add_device, add_json, add_processes, count, seconds
from robustkit.cli.outcome import renew_page, say, show_results, speaks, watched
from robustkit.cli.target import HELP, WORDS, is_function, load_target, run_of
from robustkit.core.errors import UserError

EXAMPLES = """\
  robustkit eval runs/quickstart-1 --checkpoint best --measures clean,pgd-20 --again
  robustkit eval runs/quickstart-1 --suite uiat --limit 1000
  robustkit eval runs/quickstart-1 --curves epsilon,steps,restarts,classes
  robustkit eval my_models:resnet data=image-folder data.root=photos threat=l2 threat.epsilon=0.5 --limit 500 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=HELP)
    parser.add_argument("words", metavar="path=value", nargs="*", default=[], help=WORDS)
    words = "quick, standard, uiat, ecas, ldat or detection (default: the recipe's)"
    parser.add_argument("--suite", metavar="NAME", help=words)
    parser.add_argument("--measures", metavar="KEY,KEY", help="some measures only")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="one checkpoint of a run only")
    parser.add_argument("--limit", type=count, metavar="N", help="a fixed part of the test images, for a quick look")
    parser.add_argument("--again", action="store_true", help="measure also what results.json has already")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="forward the model as if called by hand: slower, AutoAttack's outcomes are those of the bare package",
    )
    words = "draw curves instead: epsilon, steps, restarts, classes (without a name: epsilon)"
    parser.add_argument("--curves", nargs="?", const="epsilon", metavar="NAME,NAME", help=words)
    parser.add_argument("--out", metavar="DIR", help="where to keep a function's results (default: runs/eval-FUNCTION)")
    parser.add_argument("--max-time", type=seconds, metavar="TIME", help="stop after 90s, 9m, 2h, with exit code 75")
    parser.add_argument("--quiet", action="store_true", help="show results and errors only")
    add_processes(parser)
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    if arguments.curves is not None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("one process draws them", place="--curves", remedy="leave out --processes")
        return _curves(arguments)
    if is_function(arguments.target):
        return _function(arguments)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from robustkit import runs
    from robustkit.folder import CHECKPOINTS, read_results

    folder, checkpoint = run_of(arguments.target, arguments.checkpoint)
    if arguments.words:
        raise UserError(f"a run brings its own data and threat model, not {arguments.words[0]!r}", place=str(folder))
    before = read_results(folder)
    outcome = watched(
        arguments,
        lambda display: runs.evaluate_run(
            folder,
            checkpoints=CHECKPOINTS if checkpoint is None else (checkpoint,),
            suite=arguments.suite,
            keys=_keys(arguments),
            limit=arguments.limit,
            again=arguments.again,
            exact=arguments.exact,
            device=arguments.device,
            max_time=arguments.max_time,
            display=display,
        ),
    )
    show_results(outcome, arguments)
    if read_results(folder) != before:
        renew_page(folder, arguments)
    if outcome.stopped:
        say("Stopped; the same command goes on where it was")
        return EXIT_TIME if outcome.stopped == "time" else EXIT_INTERRUPT
    return 0


def _function(arguments: argparse.Namespace) -> int:
    from robustkit.evaluation import evaluate
    from robustkit.evaluation.suites import some_of, suites_of
    from robustkit.folder import write_outcomes, write_results
    from robustkit.limits import Limits
    from robustkit.reporting import consoles
    from robustkit.reporting.tables import Column, print_results
    from robustkit.reporting.terminal import run_display

    suites = some_of(suites_of(arguments.suite or "standard"), _keys(arguments), None)
    target = load_target(arguments.target, arguments.words, device=arguments.device)
    name = arguments.target.rpartition(":")[2]
    folder = Path(arguments.out or Path("runs", f"eval-{name}"))
    if arguments.again:
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
    display = run_display(quiet=arguments.quiet)
    limits = Limits(deadline=None if arguments.max_time is None else time.monotonic() + arguments.max_time)
    with limits.listening(display.say):
        try:
            results = evaluate(
                target.model,
                target.images,
                threat=target.threat,
                suite=suites,
                limit=arguments.limit,
                device=target.device,
                exact=arguments.exact,
                folder=folder / "evaluation",
                shared=True,
                watch=lambda key, news: display.measuring(name, key, news),
                should_stop=lambda: bool(limits.reason()),
            )
        finally:
            display.end()
    stopped = limits.reason() if len(results) < sum(len(suite.measures) for suite in suites) else ""
    if speaks():
        entries = {key: result.to_json() for key, result in results.items()}
        write_results(folder, {"model": entries})
        write_outcomes(folder, {"model": {key: result.outcomes_to_json() for key, result in results.items()}})
        if arguments.json:
            print(json.dumps({"target": arguments.target, "stopped": stopped} | results.to_json(), indent=2))
        else:
            print_results(consoles.results(), [Column(name, "as it is", entries)] if entries else [])
            for finding in results.findings:
                if finding.check not in results:  # notes of measures stand below the table already
                    say(f"{finding.check}: {finding.evidence}{f'; {finding.remedy}' if finding.remedy else ''}")
    if stopped:
        say("Stopped; the same command goes on where it was")
        return EXIT_TIME if stopped == "time" else EXIT_INTERRUPT
    if not arguments.quiet:
        say(f"Judged in {results.path}. Everything is in {folder}")
    return 0


def _curves(arguments: argparse.Namespace) -> int:
    from robustkit.lock import locked
    from robustkit.reporting.curves import draw_curves

    target = load_target(arguments.target, arguments.words, device=arguments.device, checkpoint=arguments.checkpoint)
    folder = target.folder or Path(arguments.out or Path("runs", f"eval-{arguments.target.rpartition(':')[2]}"))
    with nullcontext() if target.folder is None else locked(folder, say):
        written = draw_curves(
            folder,
            target.model,
            target.images,
            threat=target.threat,
            names=target.classes,
            wanted=tuple(arguments.curves.split(",")),
            limit=arguments.limit,
            device=target.device,
            say=(lambda text: None) if arguments.quiet else say,
        )
    if arguments.json:
        print((folder / "curves.json").read_text(encoding="utf-8"), end="")
    else:
        for path in written:
            print(path)
    if target.folder is not None:
        renew_page(folder, arguments)
    return 0


def _keys(arguments: argparse.Namespace) -> list[str] | None:
    return None if arguments.measures is None else arguments.measures.split(",")
