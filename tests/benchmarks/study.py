"""Every recipe of a family under one budget, arm by arm, each judged when it is trained; in the end all side by side.

    python tests/benchmarks/study.py recipes/cpu/uiat_table1.py --out runs/uiat-cpu
    python tests/benchmarks/study.py recipes/cpu/ecas_table1.py --out runs/ecas-cpu --only fixed,ecas --seeds 1,2,3

The same command goes on where it was stopped; --max-time 9m stops it, with exit code 75. Every arm is an ordinary run
in OUT/NAME-SEED. A helper that another arm of the family makes is taken from there, so that arm is trained first. An
arm that fails is reported at the end, the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from robustkit import Recipe, UserError, evolve, resume, run
from robustkit.cli.options import EXIT_TIME, seconds
from robustkit.core.override import override
from robustkit.core.recipe import load_recipes, split_address
from robustkit.core.spec import walk
from robustkit.folder import CHECKPOINTS
from robustkit.reporting import consoles
from robustkit.reporting.comparison import load_item, print_comparison
from robustkit.reporting.terminal import TerminalDisplay
from robustkit.runs import evaluate_run


def helper_words(recipe: Recipe, family: Path, out: Path, seed: int) -> tuple[str, ...]:
    """Overrides that point helpers made by a recipe of this family to its arm of the study."""
    made = {path: split_address(getattr(part, "made_by", "")) for path, part in walk(recipe)}
    return tuple(f"{path}.run={out / f'{name}-{seed}'}" for path, (file, name) in made.items() if file == family)


def arm(recipe: Recipe, words: tuple[str, ...], folder: Path, source: str, checkpoint: str, end: float | None) -> bool:
    """Train, then judge that checkpoint alone. Whether all is done."""
    display = TerminalDisplay(consoles.messages())
    if (folder / "recipe.json").is_file():
        outcome = resume(folder, max_time=_left(end), display=display)
    else:
        given = evolve(override(recipe, words), evaluation=())
        outcome = run(given, out=folder, source=source, overrides=words, max_time=_left(end), display=display)
    for suite in recipe.evaluation:
        if outcome.stopped in ("", "collapse"):
            outcome = evaluate_run(folder, checkpoints=(checkpoint,), suite=suite, max_time=_left(end), display=display)
    return outcome.stopped in ("", "collapse")


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, metavar="FAMILY.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", metavar="NAME,NAME", help="these arms alone")
    parser.add_argument("--seeds", default="1", metavar="N,N", help="each arm with each seed (default: 1)")
    parser.add_argument("--checkpoint", default="last", choices=CHECKPOINTS, help="which is judged (default: last)")
    parser.add_argument("--max-time", type=seconds, metavar="TIME", help="stop after e.g. 9m with exit code 75")
    arguments = parser.parse_args(words)
    recipes = load_recipes(arguments.family)
    names = arguments.only.split(",") if arguments.only else list(recipes)
    if unknown := [name for name in names if name not in recipes]:
        raise UserError(f"no recipe '{unknown[0]}'", place=str(arguments.family), remedy=f"known: {', '.join(recipes)}")
    end = None if arguments.max_time is None else time.monotonic() + arguments.max_time
    names.sort(key=lambda name: bool(helper_words(recipes[name], arguments.family, arguments.out, 1)))
    folders, failed = [], []
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            folder = arguments.out / f"{name}-{seed}"
            extra = (f"seed={seed}", *helper_words(recipes[name], arguments.family, arguments.out, seed))
            try:
                if not arm(recipes[name], extra, folder, f"{arguments.family}:{name}", arguments.checkpoint, end):
                    return EXIT_TIME
                folders.append(folder)
            except (UserError, RuntimeError) as error:
                print(f"{folder}: {error}", file=sys.stderr)
                failed.append(folder)
    print_comparison(consoles.results(), [load_item(str(folder)) for folder in folders])
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
