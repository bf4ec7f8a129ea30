"""From a measure and a test set to a result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustkit.core.device import device_of
from robustkit.core.errors import DataError, SpecError
from robustkit.core.recipe import Suite, result_key
from robustkit.core.rng import derive
from robustkit.core.spec import digest, to_json
from robustkit.core.strategy import Measure, Outcomes, Slice, Subject, ThreatModel
from robustkit.core.world import World
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.findings import Finding
from robustkit.evaluation.ledger import Entry, Ledger, digest_of_images, digest_of_weights
from robustkit.evaluation.logits import LogitsOf, judging, with_warning
from robustkit.evaluation.results import Result, Results, fingerprint, wilson
from robustkit.evaluation.sources import Source, check_labels, source_of
from robustkit.evaluation.suites import suites_of
from robustkit.reporting import notebook
from robustkit.threats.linf import Linf

PROBE = 16
"""Images that a model is tried on before it is judged."""


class News(NamedTuple):
    """How far a measure is: this process's images done and in all; those judged so far, and of them still right.

    `right / judged` is an upper bound of the accuracy where later stages can only lower it. `stage` names the last one.
    """

    done: int
    total: int
    judged: int
    right: int
    stage: str = ""


Watch = Callable[[str, News], None]
"""Told of a measure, by its key, before it begins, after each of its stages, and after each slice."""


def fixed_part(total: int, limit: int | None) -> Tensor:
    """Rows (n,) int64 of a fixed random part of a test set of `total` images.

    The permutation behind it depends on `total` alone, so that larger parts begin with smaller ones; all rows, in
    their natural order, where `limit` is None or not below `total`.
    """
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(derive(0, "test part", total)))[:limit]


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    threat: ThreatModel | None = None,
    suite: str | Suite | Sequence[Measure] | Sequence[Suite] = "standard",
    limit: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    seed: int = 0,
    exact: bool = False,
    preflight: bool = True,
    folder: str | Path | None = None,
    shared: bool = False,
    watch: Watch | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Results:
    """Judges any module that maps images in [0, 1] to logits; normalisation belongs inside it.

    Args:
        model: maps (B, C, H, W) to logits (B, K), or to an Output. Its modes, statistics and gradients stay as found.
        images: (N, C, H, W), floating point in [0, 1]; or, without `labels`, a data set of (image, label) pairs, or a
            DataLoader over one: it is read slice by slice, in the data set's order.
        labels: (N,), whole numbers in 0..K-1.
        threat: the ball that attacks may move in; None: the suite's, else `Linf(epsilon=8/255)`. Of several suites this
            is the first one's; the others keep to their own.
        suite: "quick", "standard", "uiat", "ecas", "ldat", "detection", a Suite, measures, or several Suites.
        limit: judge a fixed random part of so many images.
        batch_size: images per slice, for measures that do not choose it themselves.
        device: where to judge; None: where the model is.
        exact: forward the model as if it were called by hand, instead of a faster way that gives the same logits but
            for rounding (`Results.path` says which).
        preflight: try the model on a few images first; what is suspicious is among `Results.findings`.
        folder: where to note what is judged; an evaluation that was killed goes on from there, a finished one is not
            done again.
        shared: share the work among the processes of torch.distributed. Each of them calls this, and gets all results.
        watch: told how far it is; None: in a notebook a bar in the cell.
        should_stop: asked after each stage of each slice; once it says so, the measures not done are left out.

    Returns:
        A result for each measure, by key.

    Raises:
        DataError: images or labels are not as above, or the model does not return logits.
        SpecError: two measures have one key.
        UserError: there is no such suite or device, or a library or network that a measure needs is missing.
    """
    from robustkit.evaluation.preflight import preflight as try_out

    main, *others = suites_of(suite)
    threat = threat or main.threat or Linf()
    balls = [(main, threat), *((other, other.threat or threat) for other in others)]
    tasks = [(one, result_key(one, measure), measure, ball) for one, ball in balls for measure in one.measures]
    keys = [key for _, key, *_ in tasks]
    for key in keys:
        if keys.count(key) > 1:
            raise SpecError(f"two measures report as '{key}'", place="measures", remedy="give one of them another key")
    source = source_of(images, labels)
    with (
        opened(model, source, threat, device, exact=exact, shared=shared) as (subject, world),
        notebook.evaluating(watch) as watch,
    ):
        tasks = [(one, key, made_ready(measure, ball, world), ball) for one, key, measure, ball in tasks]
        weights = "" if folder is None else digest_of_weights(model)
        rows = rows_of(Clean(), least(limit, main.images), len(source))
        looked: tuple[Finding, ...] = ()
        if preflight:
            looked = try_out(
                model,
                images,
                labels,
                threat=threat,
                measures=[measure for *_, measure, _ in tasks],
                test_images=len(rows),
                batch_size=batch_size,
            )
        found = {}
        for one, key, measure, ball in tasks:
            rows = rows_of(measure, least(limit, one.images), len(source))
            ledger = ledger_of(folder, weights, measure, ball, rows, batch_size, seed, exact, world)
            result = judge_slices(
                measure,
                attrs.evolve(subject, threat=ball),
                source,
                rows,
                world,
                seed=seed,
                batch_size=batch_size,
                ledger=ledger,
                watch=None if watch is None else partial(_tell, watch, key),
                should_stop=should_stop,
            )
            if result is None:
                break
            found[key] = result
        path = str(subject.logits.path)
    notes = [Finding(check=key, verdict="warning", evidence=n) for key, result in found.items() for n in result.notes]
    suspicious = [finding for finding in looked if finding.verdict in ("failure", "warning")]
    return Results(found, threat, seed, path, (*suspicious, *notes))


@contextmanager
def opened(
    model: nn.Module,
    source: Source,
    threat: ThreatModel,
    device: torch.device | str | None,
    *,
    exact: bool = False,
    shared: bool = False,
) -> Iterator[tuple[Subject, World]]:
    """The model as measures see it, tried on a few of its images, and the world it is judged in; then as it was.

    Raises:
        DataError: what it returns are not logits, or the labels are not for them.
        UserError: there is no such device.
    """
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    where = home if device is None else device_of(device)
    several = shared and dist.is_initialized()
    x, y = source.rows(torch.arange(min(PROBE, len(source))))
    try:
        if where != home:
            model.to(where)
        with judging(model, threat, x.to(where), exact=exact) as subject:
            classes = check_model(subject, x.to(where))
            check_labels(y, len(y), classes)
            yield (
                subject,
                World(
                    samples=len(source),
                    training=len(source),
                    classes=classes,
                    image_shape=(x.shape[1], x.shape[2], x.shape[3]),
                    device=where,
                    rank=dist.get_rank() if several else 0,
                    size=dist.get_world_size() if several else 1,
                ),
            )
    finally:
        if where != home:
            model.to(home)


def made_ready(measure: Measure, threat: ThreatModel, world: World) -> Measure:
    """The measure, with what it needs besides the model.

    Raises:
        UserError: a library or a network is missing.
    """
    ready: Measure = measure.ready(threat, world) if hasattr(measure, "ready") else measure
    return ready


def rows_of(measure: Measure, limit: int | None, total: int) -> Tensor:
    """The rows that a measure judges, of a test set of `total` images."""
    return fixed_part(total, least(limit, getattr(measure, "images", None)))


def least(*limits: int | None) -> int | None:
    """The least of them; None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def ledger_of(
    folder: str | Path | None,
    weights: str,
    measure: Measure,
    threat: ThreatModel,
    rows: Tensor,
    batch_size: int,
    seed: int,
    exact: bool,
    world: World,
) -> Ledger:
    """The ledger of this evaluation and no other."""
    if folder is None:
        return Ledger()
    size = getattr(measure, "slice_size", batch_size)
    facts = [weights, to_json(measure), to_json(threat), seed, world.samples, len(rows), size, exact]
    return Ledger(Path(folder), f"{measure.key.replace('/', '-')}-{digest(facts)}", world.rank)


def judge_slices(
    measure: Measure,
    subject: Subject,
    source: Source,
    rows: Tensor,
    world: World,
    *,
    seed: int = 0,
    batch_size: int,
    ledger: Ledger | None = None,
    watch: Watch | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Result | None:
    """Takes a measure through `rows` of the test images: None where `should_stop` said so after a stage.

    The rows are cut into slices (of the measure's `slice_size`, else `batch_size`), which are dealt to the processes in
    turn; what a slice gives does not depend on who judges it, when, or beside which others. Every process calls this
    and gets the same result.
    """
    ledger = ledger or Ledger()
    slices = torch.split(rows, getattr(measure, "slice_size", batch_size))
    entries = _still_true(ledger.read(), slices, source, world)  # of slices that need no more work
    started = {number: entry for number, entry in entries.items() if not entry.finished}
    entries = {number: entry for number, entry in entries.items() if entry.finished}
    mine = [number for number in range(len(slices)) if number not in entries][world.rank :: world.size]
    progress = _Progress(measure.key, watch, sum(len(slices[number]) for number in mine))
    stopped = False
    with torch.inference_mode(False), torch.no_grad():
        for number in mine:
            x, y = source.rows(slices[number])
            part = Slice(x.to(world.device), y.to(world.device), number)
            check_labels(y, len(y), world.classes, slices[number])
            entry = started.get(number)
            before, seconds = (None, 0.0) if entry is None else (_moved(entry.outcomes, world.device), entry.seconds)
            names = digest_of_images(x, y)
            began = time.perf_counter()
            if isinstance(subject.logits, LogitsOf):
                subject.logits.broken = None
            for found in measure.outcomes(subject, part, seed, before):
                outcomes = with_warning(found, subject.logits)
                now = time.perf_counter()
                seconds, began = seconds + now - began, now
                entry = Entry(names, _moved(outcomes, torch.device("cpu")), False, seconds)
                ledger.write(number, entry)
                progress.stage(entry.outcomes)
                if should_stop is not None and should_stop():
                    stopped = True
                    break
            if stopped:
                break
            assert entry is not None, f"{type(measure).__name__} yields nothing"
            entries[number] = attrs.evolve(entry, finished=True)
            ledger.write(number, entries[number])
            progress.slice(entry.outcomes)
    if world.any(stopped):
        return None
    return _result(measure, entries, world, getattr(subject.logits, "path", ""))


def check_model(subject: Subject, images: Tensor) -> int:
    """K, from one forward of a few images (B, C, H, W).

    Raises:
        DataError: what the model returns are not logits.
    """
    try:
        logits: Tensor = subject.logits(images)
    except (AttributeError, TypeError) as error:  # neither a tensor nor an Output
        raise DataError(f"does not return logits: {error}", place="model") from error
    except RuntimeError as error:
        shape = " x ".join(map(str, images.shape[1:]))
        fault = f"cannot take images of {shape}: {str(error).splitlines()[0]}"
        raise DataError(fault, place="model", remedy="is it for these data?") from error
    if logits.ndim != 2 or logits.shape[0] != len(images) or logits.shape[1] < 2:
        raise DataError(f"logits must be (B, K) with K >= 2, got {tuple(logits.shape)}", place="model")
    if not bool(logits.isfinite().all()):
        broken = int((~logits.isfinite().all(dim=1)).sum())
        raise DataError(
            f"returns NaN or infinity on {broken} of {len(images)} images",
            place="model",
            remedy="are its weights those of a finished training?",
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all() and ((sums - 1).abs() < 1e-4).all()):
        raise DataError("returns probabilities, not logits", place="model", remedy="take the softmax off its end")
    return logits.shape[1]


class _Progress:
    """Tells a watcher how far this process is with its own slices."""

    def __init__(self, key: str, watch: Watch | None, total: int) -> None:
        self._key, self._watch, self._total = key, watch, total
        self._done = self._right = 0
        if total:
            self._tell(News(0, total, 0, 0))

    def stage(self, outcomes: Outcomes) -> None:
        stage = next(reversed(outcomes.breakdown), "")
        if stage:
            judged, right = self._done + len(outcomes.right), self._right + int(outcomes.right.sum())
            self._tell(News(self._done, self._total, judged, right, stage))

    def slice(self, outcomes: Outcomes) -> None:
        self._done, self._right = self._done + len(outcomes.right), self._right + int(outcomes.right.sum())
        self._tell(News(self._done, self._total, self._done, self._right))

    def _tell(self, news: News) -> None:
        if self._watch is not None:
            self._watch(self._key, news)


def _still_true(found: dict[int, Entry], slices: Sequence[Tensor], source: Source, world: World) -> dict[int, Entry]:
    """The entries whose images are still those of the test set, the same in every process."""
    flags = torch.zeros(len(slices), dtype=torch.int64, device=world.device)
    for number in sorted(found)[world.rank :: world.size]:
        if number < len(slices):
            flags[number] = digest_of_images(*source.rows(slices[number])) == found[number].images
    return {number: found[number] for number in world.sum(flags).nonzero().flatten().tolist()}


def _result(measure: Measure, entries: dict[int, Entry], world: World, path: str) -> Result:
    """One result of all processes' slices."""
    lines = [json.dumps(entry.to_json(number)) for number, entry in entries.items()]
    reports = {report["slice"]: report for report in map(json.loads, _everyone(lines, world))}
    slices = [reports[number] for number in sorted(reports)]
    outcomes = [sign == "1" for report in slices for sign in report["right"]]
    counts = [len(report["right"]) for report in slices]
    breakdown = _means([report["breakdown"] for report in slices], counts)
    shares = {name: _means([report["shares"][name] for report in slices], counts) for name in slices[0]["shares"]}
    notes = [note for report in slices for note in report["notes"]]
    if hasattr(measure, "remarks"):
        notes.extend(measure.remarks(breakdown))
    return Result(
        key=measure.key,
        accuracy=sum(outcomes) / len(outcomes),
        n=len(outcomes),
        ci95=wilson(sum(outcomes), len(outcomes)),
        seconds=math.fsum(report["seconds"] for report in slices),
        breakdown=breakdown,
        notes=tuple(dict.fromkeys(notes)),
        outcomes=outcomes,
        images=fingerprint("".join(report["images"] for report in slices)),
        path=path,
        shares=shares,
    )


def _tell(watch: Watch, key: str, _: str, news: News) -> None:
    watch(key, news)


def _means(values: list[dict[str, float]], counts: list[int]) -> dict[str, float]:
    """Of each slice's numbers, over all images."""
    total = sum(counts)
    sums = {name: math.fsum(n * part[name] for n, part in zip(counts, values, strict=True)) for name in values[0]}
    return {name: value / total for name, value in sums.items()}


def _moved(outcomes: Outcomes, device: torch.device) -> Outcomes:
    return outcomes._replace(right=outcomes.right.to(device))


def _everyone(lines: list[str], world: World) -> list[str]:
    """The lines (ASCII) of all processes."""
    text = "".join(f"{line}\n" for line in lines).encode()
    rows = torch.tensor(list(text), dtype=torch.uint8, device=world.device)
    return bytes(world.gather_rows(rows).tolist()).decode().splitlines()
