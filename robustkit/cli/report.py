"""Make a page of one or several runs, to read in a browser: verdict, curves, composition, cost, commands.

It is one file that needs no network, made of what the runs' folders hold: nothing is trained or attacked for it, and
unfinished runs have one, too. What is not there takes a line that says which command makes it.

With --figure, draw a figure of a paper (UIAT, CVPR 2023; ECAS, BMVC 2023; LDAT, CMC 2024) from finished runs instead,
and give its data. What it has to measure is kept in figures.json of the runs: drawing again costs nothing, and a figure
that was killed or interrupted goes on where it was, with the same command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from robustkit.cli.options import add_device, add_json, count, runs_of
from robustkit.cli.outcome import say
from robustkit.core.errors import UserError
from robustkit.reporting.paper import FIGURES, figure_named, make

EXAMPLES = """\
  robustkit report runs/uiat_rn18-1 runs/pgd_at_rn18-1 --out beside.html
  robustkit report runs/trades_rn18-1 runs/uiat_oneoff_rn18-1 --figure strength --images 1000
  robustkit report runs/uiat_rn18-1 runs/uiat_rn18-2 runs/uiat_rn18-3 --figure sweep --setting loss.weight
  robustkit report runs/uiat_oneoff_rn18-1 runs/trades_rn18-1 --figure difference --attack autoattack --out fig5.pdf"""

FORMATS = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lines = [f"  {name:13}{entry.shows} ({entry.paper})" for name, entry in FIGURES.items()]
    parser.description = f"{parser.description}\nfigures:\n" + "\n".join(lines)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="the folder of a run, or of a sweep; for figures, finished"
    )
    parser.add_argument("--figure", metavar="NAME", help="draw this one instead: see above")
    words = "in the first run's folder: report.html, comparison.html of several runs, figures/NAME.png"
    parser.add_argument("--out", metavar="FILE", help=f".html; of a figure .png, .svg or .pdf (default: {words})")
    parser.add_argument("--data", metavar="FILE", help="where to write what the figure shows, as JSON")
    parser.add_argument(
        "--images",
        type=count,
        metavar="N",
        help="measure on a fixed part of the test images (default: all); of inverse: show so many (default: 6)",
    )
    parser.add_argument(
        "--attack",
        choices=("pgd-20", "autoattack"),
        help="of difference: the paper has autoattack, at some hundred times the cost of pgd-20 (default: pgd-20); "
        "of budgets: autoattack adds four points of it",
    )
    parser.add_argument("--setting", metavar="PATH", help="of sweep: loss.weight, ... (default: the one that differs)")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="for a figure (default: last)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    first, arguments.runs = arguments.runs[0], runs_of(arguments.runs)
    if arguments.runs[0] != first and arguments.out is arguments.figure is None:
        arguments.out = str(Path(arguments.runs[0]).parent / "comparison.html")  # beside the runs of the sweep
    return _page(arguments) if arguments.figure is None else _figure(arguments)


def _page(arguments: argparse.Namespace) -> int:
    for option in ("data", "images", "attack", "setting", "checkpoint", "device"):
        if getattr(arguments, option) is not None:
            remedy = "leave it out, or name a --figure"
            raise UserError("means nothing without --figure", place=f"--{option}", remedy=remedy)
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and out.suffix.lower() not in PAGES:
        remedy = "name a file .html, or a --figure"
        raise UserError(f"cannot write a page as '{out.suffix}'", place=str(out), remedy=remedy)
    from robustkit.reporting.report import read_runs, to_data, write_report

    runs = read_runs(arguments.runs)
    written = write_report(runs, out)
    print(json.dumps({"page": str(written), "runs": to_data(runs)}, indent=2) if arguments.json else written)
    return 0


def _figure(arguments: argparse.Namespace) -> int:
    name, options = _wanted(arguments)
    out = Path(arguments.out or Path(arguments.runs[0], "figures", f"{name}.png"))
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"cannot draw '{out.suffix}'", place=str(out), remedy=f"name a file {', '.join(FORMATS)}")
    from robustkit.core.checkpoint import write_text
    from robustkit.reporting.paper.finished import open_runs
    from robustkit.reporting.terminal import run_display

    display = run_display(quiet=arguments.quiet)
    try:
        runs = open_runs(
            arguments.runs,
            checkpoint=arguments.checkpoint or "last",
            images=arguments.images,
            device=arguments.device,
            display=display,
        )
        out.parent.mkdir(parents=True, exist_ok=True)  # before hours are spent on what could not be written
        data, figure = make(name, runs, **options)
        for line in data.get("missing", ()):
            display.say(line)
    except KeyboardInterrupt:
        display.end()
        say("Interrupted; the same command goes on where it was")
        raise
    finally:
        display.end()
    figure.savefig(out)
    text = json.dumps(data, indent=1)
    if arguments.data is not None:
        write_text(Path(arguments.data), text + "\n")
    print(text if arguments.json else out)
    return 0


def _wanted(arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The figure's name, and its options.

    Raises:
        UserError: there is no such figure, or it takes no such option.
    """
    takes = figure_named(arguments.figure).takes
    given = {option: getattr(arguments, option) for option in ("images", "attack", "setting")}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in takes:
            raise UserError(f"means nothing to {arguments.figure}", place=f"--{option}", remedy="leave it out")
    return arguments.figure, {option: value for option, value in given.items() if option != "images"}
