"""Measures on a run's checkpoints, and what is known of them: results.json and outcomes.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe, result_key
from robustkit.core.world import World
from robustkit.data.loader import make_batch
from robustkit.display import RunDisplay
from robustkit.folder import read_outcomes, read_results, write_outcomes, write_results
from robustkit.limits import Limits
from robustkit.opening import restore

if TYPE_CHECKING:
    from robustkit.evaluation.evaluate import News
    from robustkit.evaluation.results import Result


class Verdict:
    """What is known of a run's checkpoints: results.json and outcomes.json, or the same in memory alone.

    `evaluation` is where that is noted which is judged but not known yet; None: nowhere.
    """

    def __init__(self, folder: Path, world: World, *, kept: bool = True, notes: bool = True) -> None:
        self.folder, self._writes = folder, kept and world.rank == 0
        self.evaluation = folder / "evaluation" if notes else None
        self.results = world.share(read_results(folder)) if kept else {}
        self.outcomes = read_outcomes(folder) if kept else {}

    def add(self, checkpoint: str, key: str, result: Result) -> None:
        self.results.setdefault(checkpoint, {})[key] = result.to_json()
        self.outcomes.setdefault(checkpoint, {})[key] = result.outcomes_to_json()
        self.save()

    def same(self, checkpoint: str, other: str) -> None:
        """`checkpoint` holds the weights of `other`."""
        self.results[checkpoint] = self.results.get(other, {})
        self.outcomes[checkpoint] = self.outcomes.get(other, {})

    def save(self) -> None:
        if self._writes:
            write_outcomes(self.folder, self.outcomes)
            write_results(self.folder, self.results)  # last: what is in it is not measured again


def measure_checkpoints(
    parts: Parts,
    wanted: Recipe,
    checkpoints: Sequence[str],
    verdict: Verdict,
    again: bool,
    exact: bool,
    limits: Limits,
    display: RunDisplay,
) -> str:
    """The measures of `wanted` on checkpoints, into `verdict`; `parts` holds the last. Returns why it stopped."""
    kept = parts.best.get("epoch", -1) * parts.steps_per_epoch == parts.step
    same = kept and parts.best.get("rewound") != parts.step  # best and last hold the same weights
    for name in checkpoints:
        path = verdict.folder / "checkpoints" / f"{name}.safetensors"
        if name == "best" and "epoch" not in parts.best:
            continue  # without validation images there is none
        if name == "best" and same and "last" in checkpoints:
            continue
        if name != "last":
            restore(parts, path, weights_only=True)
        stopped = judge(attrs.evolve(parts, recipe=wanted), name, verdict, again, exact, limits, display)
        if stopped:
            return stopped
    if same and "last" in checkpoints and ("best" in checkpoints or "best" in verdict.results):
        verdict.same("best", "last")
    return ""


def judge(
    parts: Parts, name: str, verdict: Verdict, again: bool, exact: bool, limits: Limits, display: RunDisplay
) -> str:
    """The recipe's measures on the weights in `parts.final`, but for those in `verdict` unless `again`.

    What is judged is noted in `verdict.evaluation`, slice by slice, until the measure is done: an evaluation that
    was stopped or killed goes on there.
    """
    from robustkit.evaluation.evaluate import PROBE, judge_slices, ledger_of, made_ready, rows_of
    from robustkit.evaluation.ledger import digest_of_weights
    from robustkit.evaluation.logits import judging
    from robustkit.evaluation.sources import OwnImages

    world, recipe = parts.world, parts.recipe
    source = OwnImages(parts.data.test)
    done = {} if again else verdict.results.get(name, {})
    wanted = [(suite, measure, rows_of(measure, suite.images, len(source))) for suite, measure in recipe.measures()]
    wanted = [entry for entry in wanted if done.get(result_key(*entry[:2]), {}).get("n") != len(entry[2])]
    if not wanted:
        return ""
    wanted = [(suite, made_ready(m, suite.threat or recipe.threat, world), rows) for suite, m, rows in wanted]
    weights = digest_of_weights(parts.final)
    few, _ = source.rows(torch.arange(min(PROBE, len(source))))
    with judging(parts.final, recipe.threat, few.to(world.device), exact=exact) as subject:
        for suite, measure, rows in wanted:
            if reason := limits.agreed(world):
                return reason
            key, threat = result_key(suite, measure), suite.threat or recipe.threat
            if hasattr(measure, "calibrated"):
                measure = world.share(measure.calibrated(subject.logits, _held_out(parts)))
            ledger = ledger_of(verdict.evaluation, weights, measure, threat, rows, recipe.batch_size, 0, exact, world)
            result = judge_slices(
                measure,
                attrs.evolve(subject, threat=threat),
                source,
                rows,
                world,
                batch_size=recipe.batch_size,
                ledger=ledger,
                watch=partial(_tell, display, name, key),
                should_stop=lambda: bool(limits.reason()),
            )
            if result is None:
                return limits.agreed(world)
            verdict.add(name, key, result)
            if world.rank == 0:
                ledger.remove()
            world.barrier()
    return ""


def _held_out(parts: Parts) -> Iterator[Tensor]:
    """The images that were held out, (B, C, H, W) in [0, 1], batch after batch."""
    for rows in torch.split(parts.validation_rows, parts.recipe.batch_size):
        yield make_batch(parts.train, rows, device=parts.world.device).x


def _tell(display: RunDisplay, checkpoint: str, key: str, _: str, news: News) -> None:
    display.measuring(checkpoint, key, news)
