"""Say what a model sees in pictures: label, posterior, likelihood, and whether it is sure enough.

Pictures are files, or folders, which are searched with all that is below. They are brought to the model's size: the
shorter side resized, the middle kept. With --reject or --false-rejections the model may decline to answer; what that is
worth under attack `robustkit eval RUN --suite detection` says. Exit code 1 where a picture cannot be read.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from robustkit.cli.options import EXIT_FAILURE, add_device, add_json
from robustkit.cli.outcome import say
from robustkit.cli.target import run_of
from robustkit.core.errors import visible

if TYPE_CHECKING:
    from robustkit.prediction import Predicted

EXAMPLES = """\
  robustkit predict runs/quickstart-1 photo.png
  robustkit predict runs/ldat_prn18-1 photos more/cat.jpg --reject 0.6 --checkpoint best
  robustkit predict runs/ldat_prn18-1 photos --false-rejections 0.05 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="the folder of a run or of an exported model, or a checkpoint")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture files, or folders of them")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="which one of a run (default: last)")
    threshold = parser.add_mutually_exclusive_group()
    threshold.add_argument("--reject", type=_share, metavar="T", help="reject what has a posterior below T, e.g. 0.6")
    threshold.add_argument(
        "--false-rejections",
        type=_share,
        metavar="SHARE",
        help="with the threshold that rejects that share of the run's held-out images, e.g. 0.05",
    )
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    from robustkit.loading import load
    from robustkit.prediction import Unreadable, find_pictures, held_out_threshold, predict
    from robustkit.reporting import consoles

    folder, checkpoint = run_of(arguments.model, arguments.checkpoint)
    device = arguments.device or PartialState().device
    model = load(folder, checkpoint, device)
    files = find_pictures(arguments.images)
    threshold = arguments.reject
    if arguments.false_rejections is not None:
        threshold, count = held_out_threshold(folder, model, arguments.false_rejections)
        share = f"{100 * arguments.false_rejections:g} %"
        say(f"Threshold {threshold:.4f}: rejects at most {share} of {count:,} held-out images")
    found: list[Predicted] = []
    entries = []
    with consoles.messages().status("") as status:
        for number, said in enumerate(predict(model, files, threshold=threshold)):
            status.update(f"picture {number + 1} of {len(files)}")
            entries.append(said.to_json())
            if isinstance(said, Unreadable):
                say(f"{said.file}: {said.fault}")
            else:
                found.append(said)
    if arguments.json:
        facts = {"model": str(folder), "checkpoint": model.facts["checkpoint"], "threshold": threshold}
        print(json.dumps(facts | {"images": entries}, indent=2))
    elif found:
        _show(found)
    if threshold is not None:
        say(f"{sum(bool(said.rejected) for said in found)} of {len(found)} rejected below {threshold:.4g}")
    return EXIT_FAILURE if len(found) < len(files) else 0


def _show(found: list[Predicted]) -> None:
    """A row for each picture; columns that no picture has are left out."""
    from rich.text import Text

    from robustkit.reporting import consoles
    from robustkit.reporting.tables import plain_table

    table = plain_table("Picture", "Label")
    table.add_column("Posterior", justify="right")
    table.add_column("Second best")
    likely, judged = found[0].likelihoods is not None, found[0].rejected is not None
    if likely:
        table.add_column("Log-likelihood", justify="right")
    if judged:
        table.add_column("Verdict")
    for said in found:
        second = "".join(f"{name} {share:.3f}" for name, share in list(said.posteriors.items())[1:2])
        row = [visible(str(said.file)), visible(said.label), f"{said.score:.3f}", visible(second)]
        if said.likelihoods is not None:
            row.append(f"{said.likelihoods[said.label]:.2f}")
        verdict = [Text("rejected", style="yellow") if said.rejected else Text("accepted")] if judged else []
        table.add_row(*row, *verdict)
    consoles.results().print(table)


def _share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got '{text}'")
    return value
