"""Runs: a folder that holds a recipe, what it produced, and all that is needed to go on.

    recipe.py recipe.json environment.json metrics.jsonl results.json figures/ faults/
    checkpoints/{last,last.previous,best}.safetensors

`run` makes one, `resume` goes on with one from wherever it stopped. Both train, evaluate the last and the best
checkpoint, draw the figures, and do the same for the recipe's control.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

import robustkit
from robustkit.core import checkpoint, faults
from robustkit.core.errors import CheckpointError, DamagedError, UserError
from robustkit.core.loop import train
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, Suite
from robustkit.core.registry import registry
from robustkit.core.spec import digest, evolve, to_json
from robustkit.core.world import World
from robustkit.display import RunDisplay
from robustkit.engine.memory import keeping_memory
from robustkit.folder import (
    CHECKPOINTS,
    cut_metrics,
    disk_trouble,
    new_folder,
    note,
    noted,
    read_results,
    set_aside,
    warnings_of,
    write_facts,
)
from robustkit.judging import Verdict, measure_checkpoints
from robustkit.limits import Limits
from robustkit.lock import holder, locked_by_first
from robustkit.opening import load_parts, make_world, recipe_of, restore
from robustkit.reporting import notebook

if TYPE_CHECKING:
    from rich.table import Table


@attrs.frozen
class Outcome:
    """How a run ended. `stopped`: "" (all is done), "steps", "time" or "interrupt".

    "collapse": all is done, but training ended where robustness collapsed (see `Validation.on_collapse`).
    """

    folder: Path
    stopped: str
    results: dict[str, Any]
    control: dict[str, Any] | None = None

    def __rich__(self) -> Table:
        """Its results as a table: `rich.print(outcome)`."""
        from robustkit.reporting.tables import results_table, with_control

        return results_table(with_control(self.results, self.control), title=self._title)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from robustkit.reporting.tables import results_as_html, with_control

        return results_as_html(with_control(self.results, self.control), title=self._title) + notebook.below(self)

    def report(self) -> Path:
        """Writes report.html, a page about the run for a browser, into its folder.

        Raises:
            UserError: the folder's recipe or results cannot be read.
        """
        from robustkit.reporting.report import read_runs, write_report

        return write_report(read_runs([str(self.folder)]))

    @property
    def _title(self) -> str:
        return str(self.folder) if not self.stopped else f"{self.folder}, stopped: {self.stopped}"


def run(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    source: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    device: str | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    rehearse: bool = False,
    preflight: bool = True,
    display: RunDisplay | None = None,
) -> Outcome:
    """Train, evaluate and draw `recipe` in a new folder.

    Args:
        out: the folder (default: runs/<recipe>-<n>); an existing one is refused.
        source: the recipe's file, copied into the folder; `overrides` are noted beside it.
        device: "cpu", "cuda", "cuda:1", ... (default: the best there is).
        max_steps: stop cleanly after so many; `resume` goes on.
        max_time: likewise, after so many seconds.
        rehearse: evaluate and draw even where training stopped at `max_steps` (see `smoke`).
        preflight: look for mistakes before the first step (see `robustkit.evaluation.preflight`).
        display: who watches; None: in a notebook the cell, in a script nobody (see `robustkit.reporting.notebook`).

    Raises:
        UserError: the folder exists or cannot be written, the data are missing, or do not fit the recipe; or training
            would mean nothing, as preflight finds.
        InUseError: another process begins a run in that folder.
        StorageError: the disk refuses in mid-run. What was saved is whole; the line says how to go on.
    """
    world, watching = make_world(recipe, device), display or notebook.watcher()
    with new_folder(out, source, world, watching.say) as folder:
        if world.rank == 0:
            write_facts(folder, recipe, source, overrides, world)
        world.barrier()
        limits = Limits(max_steps, None if max_time is None else time.monotonic() + max_time, rehearse)
        try:
            outcome = _go_on(folder, recipe, world, limits, watching, preflight)
        except UserError:
            if world.rank == 0 and not (folder / "checkpoints").exists():
                shutil.rmtree(folder, ignore_errors=True)  # nothing is lost; the mended command finds its folder free
            raise
    if display is None:
        notebook.conclude(outcome, watching.say)
    return outcome


def resume(
    folder: str | Path,
    *,
    device: str | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    display: RunDisplay | None = None,
) -> Outcome:
    """Go on with the run in `folder`: training, evaluation, figures, control, whatever is not done yet.

    Where the last checkpoint is damaged or gone, from the one before it.

    Raises:
        UserError: it is no run, neither checkpoint is whole, or they belong to another recipe.
        InUseError: another process works on it.
        StorageError: as `run`.
    """
    folder, watching = Path(folder), display or notebook.watcher()
    recipe = recipe_of(folder, to_build=True)
    world = make_world(recipe, device)
    with locked_by_first(folder, world, watching.say):
        limits = Limits(max_steps, None if max_time is None else time.monotonic() + max_time)
        outcome = _go_on(folder, recipe, world, limits, watching)
    if display is None:
        notebook.conclude(outcome, watching.say)
    return outcome


def evaluate_run(
    folder: str | Path,
    *,
    checkpoints: Sequence[str] = CHECKPOINTS,
    suite: str | Suite | Sequence[Suite] | None = None,
    keys: Sequence[str] | None = None,
    limit: int | None = None,
    again: bool = False,
    exact: bool = False,
    device: str | None = None,
    max_time: float | None = None,
    display: RunDisplay | None = None,
) -> Outcome:
    """Measure a run's checkpoints: what results.json lacks, or everything `again`.

    Results are kept in results.json, unless `limit` cuts the test images or training is not finished: such results are
    provisional, and returned only. An evaluation that was stopped or killed goes on where it was; not so a provisional
    one beside another process that works on the run, of which nothing is written.

    Args:
        suite: what to measure instead of the recipe's own suites: a name ("quick", ...), a value, or several.
        keys: some of its measures only.
        exact: forward the model as if it were called by hand, see `robustkit.evaluate`.
        max_time: stop after so many seconds.

    Raises:
        UserError: it is no run, a checkpoint is damaged, or there is no such measure.
        InUseError: another process works on the run, and results are to be kept.
    """
    from robustkit.evaluation.suites import some_of, suites_of

    folder, display = Path(folder), display or notebook.watcher()
    recipe = recipe_of(folder, to_build=True)
    suites = recipe.evaluation if suite is None else suites_of(suite)
    wanted = evolve(recipe, evaluation=some_of(suites, keys, limit))
    parts = load_parts(recipe, make_world(recipe, device))
    facts = restore(parts, folder / "checkpoints" / "last.safetensors", weights_only=True)
    parts.step, parts.best = facts["step"], facts["best"]
    finished = parts.finished
    kept = finished and limit is None
    if not kept:
        reason = f"limited to {limit} test images" if finished else f"training stands at step {parts.step}"
        display.say(f"Provisional results ({reason}): results.json stays as it is")
    busy = "" if kept else parts.world.share(holder(folder))
    if busy:
        display.say(f"{folder} is in use by {busy}: nothing is written, a stopped evaluation begins anew")
    limits = Limits(deadline=None if max_time is None else time.monotonic() + max_time)
    with (
        nullcontext() if busy else locked_by_first(folder, parts.world, display.say),
        limits.listening(display.say),
        disk_trouble(folder, "give the same command again"),
    ):
        verdict = Verdict(folder, parts.world, kept=kept, notes=not busy)
        for finding in _suspicious(parts, wanted):
            display.say(finding)
        try:
            stopped = measure_checkpoints(parts, wanted, checkpoints, verdict, again, exact, limits, display)
        finally:
            display.end()
        verdict.save()
    control = read_results(folder / "control") if kept else {}
    return Outcome(folder, stopped, verdict.results, control or None)


def _suspicious(parts: Parts, wanted: Recipe) -> list[str]:
    """What preflight finds before an evaluation."""
    from robustkit.evaluation.preflight import lines, preflight

    (suite, *_), images = wanted.evaluation or (Suite(measures=()),), parts.data.test
    found = preflight(
        parts.final,
        images,
        threat=suite.threat or wanted.threat,
        classes=len(parts.data.classes),
        measures=[measure for suite, measure in wanted.measures()],
        test_images=min(suite.images or len(images), len(images)),
        batch_size=wanted.batch_size,
    )
    return lines(found)


def _go_on(
    folder: Path, recipe: Recipe, world: World, limits: Limits, display: RunDisplay, preflight: bool = True
) -> Outcome:
    for line in warnings_of(recipe, folder):
        display.say(line)
    with limits.listening(display.say), disk_trouble(folder):
        try:
            stopped = _train_and_judge(folder, recipe, world, limits, display, preflight)
            control = None
            if stopped in ("", "collapse") and recipe.control is not None:
                inside, beside = folder / "control", attrs.evolve(world, seed=recipe.control.seed)
                if world.rank == 0:
                    inside.mkdir(exist_ok=True)
                with locked_by_first(inside, world, display.say):
                    if world.rank == 0 and not (inside / "recipe.json").is_file():
                        write_facts(inside, recipe.control, None, (), world)
                    world.barrier()
                    display.say("Control: " + _describe(recipe.control))
                    stopped = _train_and_judge(inside, recipe.control, beside, limits, display, preflight) or stopped
                control = read_results(inside)
        finally:
            display.end()
    return Outcome(folder, stopped, read_results(folder), control)


def _train_and_judge(
    folder: Path, recipe: Recipe, world: World, limits: Limits, display: RunDisplay, preflight: bool
) -> str:
    """Everything one recipe asks for that its folder does not hold yet. Returns why it stopped, "" when all is done."""
    parts = load_parts(recipe, world)
    last = folder / "checkpoints" / "last.safetensors"
    metrics = folder / "metrics.jsonl"
    lines = 0
    restored = _restored(parts, folder, display)
    if restored is not None:
        before = noted(folder, "path")
        if before not in (None, parts.path):
            display.say(f"Passes are computed in another way than before: {parts.path}; before: {before}")
        if world.rank == 0:
            lines = cut_metrics(folder, restored["metrics"])
            if lines < restored["metrics"]:
                fault = f"has {lines} of {restored['metrics']} epochs; those that are missing or damaged stay so"
                display.say(f"{metrics}: {fault}")
        lines = world.share(lines)
        if not parts.finished:
            _ready(parts)
    else:
        loaded = _ready(parts)
        for name, text in loaded.items():
            display.say(f"{name.capitalize()}: {text}")
        if preflight:
            _preflight(parts, folder, display)
        if world.rank == 0:
            note(folder, data=parts.data.copy, path=parts.path, **loaded)
    display.begin(recipe, folder, parts)

    def save(name: str) -> None:
        if name == "last":
            limits.saved = time.monotonic()
        tensors = parts.tensors()
        if world.rank == 0:
            facts = {
                "digest": digest(recipe),
                "recipe": to_json(recipe),
                "step": parts.step,
                "epoch": parts.progress.epoch,
                "best": parts.best,
                "skipped": [number for number in parts.skipped if number <= parts.step],
                "course": parts.course,
                "precision": to_json(parts.precision),
                "metrics": lines,
                "version": robustkit.__version__,
                "classes": list(parts.data.classes),  # with these, `load` needs no data
                "image_shape": list(parts.world.image_shape),
            }
            path = folder / "checkpoints" / f"{name}.safetensors"
            checkpoint.write(path, tensors, facts, keep_previous=name != "best")

    def rewind(name: str) -> None:
        world.barrier()  # until it is written
        path = folder / "checkpoints" / f"{name}.safetensors"
        if checkpoint.facts_of(path)["step"] > parts.step:  # of an epoch that is lost and comes again
            path = checkpoint.previous(path)
        parts.rewind(checkpoint.read(path)[0])

    def go_back() -> None:
        world.barrier()  # until it is written
        restore(parts, last)

    def set_aside(fault: faults.Report) -> Path:
        path = folder / "faults" / f"step-{fault.facts['step']:06d}.safetensors"
        if world.rank == 0:
            checkpoint.write(path, fault.tensors, fault.facts | {"skipped": parts.skipped})
        return path

    def record(report: dict[str, Any]) -> None:
        nonlocal lines
        if world.rank == 0:
            checkpoint.append_line(metrics, json.dumps(report, sort_keys=True))
        lines += 1

    if world.any(not last.is_file()):
        save("last")
    with keeping_memory():
        finished = train(
            parts,
            display=display,
            save=save,
            rewind=rewind,
            go_back=go_back,
            set_aside=set_aside,
            record=record,
            should_stop=lambda: bool(limits.reason()),
            should_save=limits.should_save,
            until=limits.max_steps,
        )
    reason = limits.agreed(world, parts)
    if not finished and not (limits.rehearsal and reason == "steps"):
        return reason
    return _judge(folder, parts, limits, display) or ("collapse" if parts.collapsed else "")


def _restored(parts: Parts, folder: Path, display: RunDisplay) -> dict[str, Any] | None:
    """Restores the newest checkpoint that is whole, and returns its facts; None where none was ever written.

    One that is not is set aside, and so are results, which are of weights that are gone.

    Raises:
        CheckpointError: neither the last nor the one before it is whole, or they belong to another recipe.
    """
    last = folder / "checkpoints" / "last.safetensors"
    found: list[str] = []
    for path in (last, checkpoint.previous(last)):
        try:
            facts = restore(parts, path)
        except DamagedError as error:
            found.append(f"{path.name}: {error.fault}")
            continue
        if found:
            parts.world.barrier()  # until every process has found it so
            if parts.world.rank == 0:
                moved = [set_aside(last, "damaged")]
                moved += [set_aside(folder / name, "lost") for name in ("results.json", "outcomes.json")]
                kept = ", ".join(file.name for file in moved if file is not None)
                kept = f" (set aside: {kept})" if kept else ""
                display.say(f"{last.parent}/{found[0]}; going on from the one before it, of step {parts.step}{kept}")
        return facts
    metrics = folder / "metrics.jsonl"
    written = [path for path in last.parent.glob("*.safetensors*") if path.suffix != ".partial"]
    if not written and not (metrics.is_file() and metrics.stat().st_size):
        return None
    remedy = f"put a copy back, or begin anew: robustkit run {folder} --out OTHER"
    raise CheckpointError(f"no checkpoint is whole ({'; '.join(found)})", place=str(last.parent), remedy=remedy)


def _ready(parts: Parts) -> dict[str, str]:
    """Has strategies load what training needs besides data (a helper's weights); says in words what that is.

    What measures need is asked for, too: not only when days of training are over.
    """
    from robustkit.evaluation.evaluate import made_ready

    for suite, measure in parts.recipe.measures():
        made_ready(measure, suite.threat or parts.recipe.threat, parts.world)
    ready = [part.ready() for part in parts.strategies.values() if hasattr(part, "ready")]
    return {name: text for found in ready for name, text in found.items() if text}


def _preflight(parts: Parts, folder: Path, display: RunDisplay) -> None:
    """Says what is worth a word before training, and keeps all of it in preflight.json.

    Raises UserError, in every process, where one found a failure.
    """
    from robustkit.evaluation.findings import worst
    from robustkit.evaluation.preflight import lines, preflight_run, refuse

    findings = preflight_run(parts)
    failed = parts.world.any(worst(findings) == "failure")
    refuse(findings)
    if failed:
        raise UserError("another process refuses to begin", place="preflight", remedy="see what it says")
    for line in lines(findings):
        display.say(line)
    if parts.world.rank == 0:
        data = [finding.to_json() for finding in findings]
        checkpoint.write_text(folder / "preflight.json", json.dumps(data, indent=2) + "\n")


def _judge(folder: Path, parts: Parts, limits: Limits, display: RunDisplay) -> str:
    """Every measure of the recipe on the last and the best checkpoint; those in results.json already are kept."""
    from robustkit.reporting.figures import draw

    verdict = Verdict(folder, parts.world)
    stopped = measure_checkpoints(parts, parts.recipe, CHECKPOINTS, verdict, False, False, limits, display)
    if not stopped and parts.world.rank == 0:
        verdict.save()
        if not (folder / "figures" / "examples.png").is_file():  # the last that is drawn
            restore(parts, folder / "checkpoints" / "last.safetensors")
            draw(folder, parts)
    return stopped


def _describe(recipe: Recipe) -> str:
    kinds = ("epsilon", "attack", "target", "loss", "weights")
    parts = {kind: getattr(recipe, kind) for kind in kinds}
    return ", ".join(f"{kind} {registry(kind).name_of(type(part)) or 'none'}" for kind, part in parts.items())
