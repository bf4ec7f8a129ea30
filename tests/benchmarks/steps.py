"""What does a method's step cost beside another's? Steps of several recipes by turns, in one process.

    python tests/benchmarks/steps.py recipes/uiat_rn18.py recipes/pgd_at_rn18.py
    python tests/benchmarks/steps.py RECIPE RECIPE RECIPE batch_size=32 model.backbone=resnet18_cifar --rounds 5

Words with "=" are overrides of every recipe. In a round each recipe makes a step, or as many as it takes until all that
it does in some steps only has been done once. Shown are seconds a step (median, fastest and slowest round), units of a
forward, and the ratios of both to the first recipe: of seconds, the median of the rounds themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics

from clock import seconds

from robustkit import UserError
from robustkit.core.batch import Passes
from robustkit.core.loop import train_step
from robustkit.core.override import override
from robustkit.core.parts import Parts
from robustkit.core.recipe import load_recipe
from robustkit.engine.memory import keeping_memory
from robustkit.opening import load_parts, make_world
from robustkit.reporting import consoles
from robustkit.reporting.tables import plain_table

WARM_UP = 2


def step(parts: Parts, steps: int) -> float:
    """Seconds for a step, over so many on the epoch's first batch."""
    batch = parts.order(0)[: parts.recipe.batch_size]
    return seconds(lambda: train_step(parts, batch), parts.world.device, steps)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RECIPE | path=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    changes = tuple(word for word in arguments.words if "=" in word)
    names = [word for word in arguments.words if "=" not in word]
    alive = []
    for name in names:
        recipe = override(load_recipe(name), changes)
        alive.append(load_parts(recipe, make_world(recipe, arguments.device)))
    times: list[list[float]] = [[] for _ in alive]
    with keeping_memory():
        for parts in alive:
            step(parts, WARM_UP)
        for _ in range(arguments.rounds):
            for parts, found in zip(alive, times, strict=True):
                found.append(step(parts, parts.recipe.interval))
    units = [sum(parts.recipe.mean_passes(parts.progress).values(), Passes()).units for parts in alive]
    rows = [
        {
            "recipe": name,
            "seconds": statistics.median(found),
            "spread": [min(found), max(found)],
            "units": cost,
            "ratio": statistics.median(own / first for own, first in zip(found, times[0], strict=True)),
            "ratio_of_units": cost / units[0],
        }
        for name, found, cost in zip(names, times, units, strict=True)
    ]
    if arguments.json:
        print(json.dumps({"path": alive[0].path, "rounds": arguments.rounds, "steps": rows}, indent=2))
        return 0
    table = plain_table("Recipe", "Seconds a step", "Fastest - slowest", "Units", "Ratio", "Of units")
    for row in rows:
        spread = " - ".join(f"{value:.2f}" for value in row["spread"])
        ratios = (f"{row[key]:.3f}" for key in ("ratio", "ratio_of_units"))
        table.add_row(row["recipe"], f"{row['seconds']:.2f}", spread, f"{row['units']:.4g}", *ratios)
    consoles.results().print(table)
    return 0


if __name__ == "__main__":
    import sys

    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
