"""The recipe that a run's own one came from, where robustkit ships it."""

from __future__ import annotations

from pathlib import Path

import robustkit
from robustkit.core.errors import UserError
from robustkit.core.recipe import Recipe, load_recipe, split_address
from robustkit.reporting.report.stored import StoredRun

RECIPES = Path(robustkit.__file__).parents[1] / "recipes"
"""Beside the package, in a checkout; an installed package has none."""


def shipped(run: StoredRun) -> tuple[str, Recipe] | None:
    """("recipes/uiat_rn18.py", the recipe), or None: by the part of its path from the folder `recipes` on, or its name.

    Only files of our own are executed, never the one that the run names.
    """
    source = run.environment.get("source")
    if not isinstance(source, str):
        return None
    file, name = split_address(source)
    parts = file.parts
    tail = parts[len(parts) - parts[::-1].index("recipes") :] if "recipes" in parts[:-1] else parts[-1:]
    path = RECIPES.joinpath(*tail)
    if file.suffix != ".py" or ".." in tail or not path.is_file():
        return None
    address = f"{path}:{name}" if name else str(path)
    try:
        recipe = load_recipe(address)
    except UserError:
        return None
    return "/".join(["recipes", *tail]) + (f":{name}" if name else ""), recipe
