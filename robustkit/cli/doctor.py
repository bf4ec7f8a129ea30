"""Say whether all is in order here: versions, devices, precision, disk, data sets, processes, extras, plugins.

Each line is ok, a warning or a problem, with what to do. Exit code 1 where there is a problem. With --plugin, one
package alone: all that it announces is loaded and held against the contract of its kind (robustkit.testing).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from robustkit.cli.options import EXIT_FAILURE, add_json

EXAMPLES = """\
  robustkit doctor
  robustkit doctor --json > doctor.json
  robustkit doctor --plugin robustkit-nfgsm"""

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugin", metavar="PACKAGE", help="look at this package and nothing else")
    parser.add_argument("--runs", metavar="DIR", default="runs", help="where runs are to be kept (default: runs)")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from rich.text import Text

    from robustkit.doctor import diagnose
    from robustkit.reporting import consoles

    if arguments.plugin is None:
        looked = diagnose(Path(arguments.runs))
    else:
        from robustkit.doctor.plugins import examine

        looked = examine(arguments.plugin)
    console, findings = consoles.results(), []
    for finding in looked:
        findings.append(finding)
        if arguments.json:
            continue
        verdict = (f"{finding.verdict:8}", STYLES[finding.verdict])
        console.print(Text.assemble(verdict, f"{finding.subject}: {finding.found}"), soft_wrap=True)
        if finding.remedy:
            console.print(f"{'':8}-> {finding.remedy}", soft_wrap=True)
    verdicts: list[str] = [finding.verdict for finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in STYLES}
    if arguments.json:
        print(json.dumps({"counts": counts, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), soft_wrap=True)
    return EXIT_FAILURE if counts["problem"] else 0
