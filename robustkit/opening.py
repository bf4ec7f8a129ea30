"""A run, opened: its recipe, the device and processes, data and parts, and the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from robustkit.core import checkpoint
from robustkit.core.device import device_of
from robustkit.core.errors import CheckpointError, RecipeError, RegistryError, UserError
from robustkit.core.parts import Parts, assemble
from robustkit.core.processes import join
from robustkit.core.recipe import Precision, Recipe, execute, learn_backbone, load_recipe, meant, runs_beside
from robustkit.core.spec import digest, flatten, from_json, to_json
from robustkit.core.world import World
from robustkit.folder import not_known_here


def recipe_of(folder: Path, *, to_build: bool = False) -> Recipe:
    """The recipe of a run folder. Where it names a strategy that nobody knows, the folder's recipe.py is executed.

    Args:
        to_build: its network is built next: likewise where nobody knows its backbone, which takes an import of timm.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    if not (folder / "recipe.json").is_file():
        is_sweep = (folder / "sweep.json").is_file()
        remedy = f"it is a sweep's: robustkit sweep {folder}" if is_sweep else meant(folder, runs_beside(folder))
        raise RecipeError("is not a run folder: it has no recipe.json", place=str(folder), remedy=remedy)
    try:
        recipe = load_recipe(folder / "recipe.json")
    except RecipeError as error:
        if not isinstance(error.__cause__, RegistryError):
            raise
        if not (folder / "recipe.py").is_file():
            raise (not_known_here(folder) or error) from error.__cause__
        # Strategies may be defined in the recipe's own file: run the folder's copy, which registers them.
        execute(folder / "recipe.py")
        return load_recipe(folder / "recipe.json")
    if to_build:
        learn_backbone(folder / "recipe.py", recipe.model)
    return recipe


def make_world(recipe: Recipe, device: str | None = None) -> World:
    """Device and processes, as accelerate finds them; the data's facts are filled in when they are loaded."""
    state = join(cpu=device == "cpu")
    chosen = state.device if device is None or state.num_processes > 1 else device_of(device)
    return World(
        samples=0,
        training=0,
        classes=0,
        image_shape=(0, 0, 0),
        device=chosen,
        rank=state.process_index,
        size=state.num_processes,
        seed=recipe.seed,
    )


def load_parts(recipe: Recipe, world: World) -> Parts:
    """The recipe's data, loaded, and everything built from it.

    Raises:
        DataError, SpecError: the data are missing or do not fit.
    """
    if world.rank == 0:
        data = recipe.data.load()  # alone first: it may have to download
    world.barrier()
    if world.rank > 0:
        data = recipe.data.load()
    facts = attrs.evolve(
        world, samples=len(data.train), own=data.own, classes=len(data.classes), image_shape=data.train.shape
    )
    return assemble(recipe, data, facts)


def restore(parts: Parts, path: Path, *, weights_only: bool = False) -> dict[str, Any]:
    """Loads a checkpoint into `parts`; with `weights_only` just the model (for evaluation). Returns its facts.

    Raises:
        CheckpointError: it is missing, damaged, or of another recipe (the differing settings are named).
    """
    wanted = {"step": int, "best": dict} | ({} if weights_only else {"metrics": int})
    tensors, facts = checkpoint.read(path, **wanted)
    if facts.get("digest") != digest(parts.recipe) and not _means(facts.get("recipe"), parts.recipe):
        theirs, ours = flatten(facts.get("recipe", {})), flatten(to_json(parts.recipe))
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        shown = ", ".join(f"{key}={theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:5])
        raise CheckpointError(f"belongs to another recipe ({shown or 'an unknown one'})", place=str(path))
    if not _is_best(facts["best"]):
        raise CheckpointError("does not say which epoch was the best", place=str(path))
    try:
        if weights_only:
            prefix = "model." if parts.averaged is None else "average."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            parts.final.load_state_dict(state)
        else:
            parts.load(tensors)
            parts.step, parts.best = facts["step"], facts["best"]
            parts.skipped, parts.course = list(facts.get("skipped", ())), dict(facts.get("course", {}))
            if "precision" in facts:
                parts.precision = from_json(Precision, facts["precision"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"does not fit the recipe: {str(error).splitlines()[0]}", place=str(path)) from error
    return facts


def _is_best(best: dict[str, Any]) -> bool:
    """Whether it is what a run notes of its best epoch: numbers, and pairs of them."""
    epochs = [best[name] for name in ("epoch", "collapse", "rewound") if name in best]
    pairs = [best[name] for name in ("score", "seen") if name in best]
    return all(type(epoch) is int for epoch in epochs) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(share, (int, float)) for share in pair)
        for pair in pairs
    )


def _means(data: Any, recipe: Recipe) -> bool:
    """Whether that JSON is this recipe, written before some of its settings (now at their defaults) were there."""
    try:
        return bool(from_json(Recipe, data) == recipe)
    except UserError:
        return False
