"""Export a run's model: safetensors with a model card, or what RobustBench takes.

Writes a new folder, RUN/export/<format>-<checkpoint> unless --out says otherwise; an existing one is refused.
"""

from __future__ import annotations

import argparse
import json

from robustkit.cli.options import add_json

EXAMPLES = """\
  robustkit export runs/quickstart-1 --to safetensors
  robustkit export runs/quickstart-1 --to safetensors --checkpoint best --out models/digits
  robustkit export runs/uiat_rn18-1 --to robustbench --checkpoint best"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--to", required=True, choices=("safetensors", "robustbench"), help="the format")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one (default: last)")
    parser.add_argument("--out", metavar="FOLDER", help="where (default: RUN/export/<format>-<checkpoint>)")
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    from robustkit.export import export

    written = export(arguments.run, arguments.to, checkpoint=arguments.checkpoint, out=arguments.out)
    if arguments.json:
        print(json.dumps(written.to_json(), indent=2))
        return 0
    print(f"Exported to {written.folder}")
    for name, sha256 in written.files.items():
        print(f"  {sha256[:12]}  {name}")
    return 0
