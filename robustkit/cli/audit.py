"""Audit a model for false robustness: the field's checklist, with a verdict, the evidence and what to do.

Takes the test images and the threat model of the run; for module:function, called without arguments, name the images
(data=...) and, if not L-infinity 8/255, the threat model (threat=...). Exit code 1 where a check fails. What is found
of a run is also written to its audit.json, and its report.html anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustkit.cli.options import EXIT_FAILURE, add_device, add_json, count
from robustkit.cli.outcome import renew_page, say
from robustkit.cli.target import HELP, WORDS, is_function, load_target, run_of

if TYPE_CHECKING:
    from robustkit.evaluation.audit import Watch

EXAMPLES = """\
  robustkit audit runs/quickstart-1
  robustkit audit runs/quickstart-1 --checkpoint best --surrogate runs/quickstart-1/control
  robustkit audit my_models:resnet data=cifar10 threat=l2 threat.epsilon=0.5 --limit 50 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help=HELP)
    parser.add_argument("words", metavar="path=value", nargs="*", default=[], help=WORDS)
    parser.add_argument("--checkpoint", choices=("last", "best"), help="which one of a run (default: last)")
    parser.add_argument("--surrogate", metavar="TARGET", help="a model whose adversarial images are tried on this one")
    parser.add_argument(
        "--limit", type=count, default=100, metavar="N", help="a fixed part of the test images (default: 100)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
    add_device(parser)
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.evaluation.audit import audit
    from robustkit.lock import locked
    from robustkit.reporting import consoles
    from robustkit.reporting.audits import print_audit

    def load(target: str, checkpoint: str | None = None) -> Any:
        named = arguments.words if is_function(target) or arguments.surrogate is None else []
        return load_target(target, named, device=arguments.device, checkpoint=checkpoint)

    target = load(arguments.target, arguments.checkpoint)
    surrogate = None if arguments.surrogate is None else load(arguments.surrogate)
    with nullcontext() if target.folder is None else locked(target.folder, say):
        with _watching() as watch:
            found = audit(
                target.model.eval(),
                target.images,
                threat=target.threat,
                limit=arguments.limit,
                seed=arguments.seed,
                surrogate=None if surrogate is None else surrogate.model,
                device=target.device,
                watch=watch,
            )
        data = {"target": target.name, "surrogate": None if surrogate is None else surrogate.name} | found.to_json()
        if arguments.json:
            print(json.dumps(data, indent=2))
        else:
            print_audit(consoles.results(), found, target.name)
        if target.folder is not None:
            checkpoint = run_of(arguments.target, arguments.checkpoint)[1] or "last"
            say(f"Written to {_write(target.folder, checkpoint, data)}")
            renew_page(target.folder, arguments)
    return EXIT_FAILURE if any(finding.verdict == "failure" for finding in found.findings) else 0


@contextmanager
def _watching() -> Iterator[Watch]:
    """Says on standard error which check runs: in one line on a terminal, else in a line for each."""
    from robustkit.reporting import consoles

    console = consoles.messages()
    if consoles.moves(console):
        with console.status("") as status:
            yield lambda name, number, total: status.update(f"check {number + 1} of {total}: {name}")
    else:
        yield lambda name, number, total: console.print(f"check {number + 1} of {total}: {name}")


def _write(folder: Path, checkpoint: str, data: dict[str, Any]) -> Path:
    """audit.json holds the latest audit of each checkpoint."""
    from robustkit.core.checkpoint import write_text
    from robustkit.reporting.curves import stored

    path = folder / "audit.json"
    held = stored(path)
    write_text(path, json.dumps(held | {checkpoint: data}, indent=2) + "\n")
    return path
