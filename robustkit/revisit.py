"""A step that went wrong, looked at again: the run as it stood before it."""

from __future__ import annotations

from pathlib import Path

from robustkit.core import checkpoint
from robustkit.core.errors import UserError
from robustkit.core.loop import pass_over, train_step
from robustkit.core.parts import Parts
from robustkit.opening import load_parts, make_world, recipe_of, restore


def revisit(fault: str | Path, *, device: str | None = None) -> Parts:
    """All that was alive in the run before the step of `fault` (RUN/faults/step-....safetensors), in one process.

    `train_step(parts, rows)` then makes that step once more. Where the step was skipped, its state was kept
    (RUN/checkpoints/before-...); where training stopped, it is trained again from the last checkpoint, which takes as
    long as it took. Nothing in the run's folder changes.

    Raises:
        UserError: it is no fault of a run, or there is no checkpoint from before it.
    """
    path = Path(fault)
    facts = checkpoint.facts_of(path)
    if "step" not in facts or path.parent.name != "faults":
        raise UserError("is no fault of a run", place=str(path), remedy="give RUN/faults/step-....safetensors")
    number, checkpoints = int(facts["step"]), path.parent.parent / "checkpoints"
    recipe = recipe_of(path.parent.parent, to_build=True)
    parts = load_parts(recipe, make_world(recipe, device))
    for part in parts.strategies.values():
        if hasattr(part, "ready"):
            part.ready()
    kept = checkpoints / f"before-{number:06d}.safetensors"
    restore(parts, kept if kept.is_file() else checkpoints / "last.safetensors")
    if parts.step >= number:
        fault_text = f"the last checkpoint is of step {parts.step}, no other is kept from before step {number}"
        raise UserError(fault_text, place=str(path))
    parts.skipped = list(facts["skipped"])
    while parts.step + 1 < number:
        if parts.step + 1 in parts.skipped:
            pass_over(parts)
            continue
        epoch, position = divmod(parts.step, parts.steps_per_epoch)
        train_step(parts, parts.order(epoch)[position * recipe.batch_size : (position + 1) * recipe.batch_size])
        if position + 1 == parts.steps_per_epoch:
            parts.totals = parts.new_totals()
    return parts
