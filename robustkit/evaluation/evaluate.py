"""From a measure and a test set to a result."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import NormalDist
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.errors import DataError, SpecError
from robustkit.core.rng import derive
from robustkit.core.strategy import Measure, Predict, ThreatModel
from robustkit.core.world import World
from robustkit.data.images import Images
from robustkit.data.loader import make_batch
from robustkit.engine.predictor import ModulePredictor
from robustkit.evaluation.attacked import CW, PGD_20
from robustkit.evaluation.autoattack import AutoAttack
from robustkit.evaluation.clean import Clean
from robustkit.evaluation.logits import LogitsOf, as_found

STANDARD: tuple[Measure, ...] = (Clean(), PGD_20, CW, AutoAttack())
"""What is measured where nothing else is asked for."""

OnSlice = Callable[[int, int, int], None]
"""Told after each slice: this process's images done, its images in all, and those of the done that are right."""


@attrs.frozen
class Result:
    """What one measure found: `accuracy` in [0, 1] over `n` images, its 95 % interval, and wall-clock seconds.

    `breakdown` is accuracy after each part of the measure; `outcomes` has one entry for each row of `fixed_part`.
    """

    key: str
    accuracy: float
    n: int
    ci95: tuple[float, float]
    seconds: float
    breakdown: dict[str, float]
    notes: tuple[str, ...]
    outcomes: list[bool]

    def to_json(self) -> dict[str, Any]:
        """The entry in results.json: without outcomes, breakdown and notes only where there are any."""
        data: dict[str, Any] = {
            "accuracy": self.accuracy,
            "n": self.n,
            "ci95": list(self.ci95),
            "seconds": round(self.seconds, 3),
        }
        if self.breakdown:
            data["breakdown"] = dict(self.breakdown)
        if self.notes:
            data["notes"] = list(self.notes)
        return data


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    middle = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return middle - half if successes > 0 else 0.0, middle + half if successes < n else 1.0


def fixed_part(total: int, limit: int | None) -> Tensor:
    """Rows (n,) int64 of a fixed random part of a test set of `total` images.

    The permutation behind it depends on `total` alone, so that larger parts begin with smaller ones; all rows, in
    their natural order, where `limit` is None or not below `total`.
    """
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(derive(0, "test part", total)))[:limit]


def measure_model(
    measure: Measure,
    suite_limit: int | None,
    predict: Predict,
    model: nn.Module,
    images: Images,
    threat: ThreatModel,
    world: World,
    *,
    seed: int = 0,
    batch_size: int,
    on_slice: OnSlice | None = None,
) -> Result:
    """Takes a measure through the test images, or through the fixed part that the suite and the measure limit it to.

    The part is cut into slices (of the measure's `slice_size`, else `batch_size`), which are dealt to the processes in
    turn; each is seeded by (seed, key, its number). Every process calls this and gets the same result, but for its own
    `seconds`.
    """

    def load(rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = make_batch(images, rows, device=world.device)
        return batch.x, batch.y

    rows = _rows(measure, suite_limit, len(images))
    return _measure(measure, rows, load, predict, model, threat, world, seed, batch_size, on_slice)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    measures: Sequence[Measure] | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, Result]:
    """Judges any module that maps images in [0, 1] to logits; normalisation belongs inside it.

    Args:
        model: maps (B, C, H, W) to logits (B, K), or to an Output. Its modes, statistics and gradients stay as found.
        images: (N, C, H, W), floating point in [0, 1].
        labels: (N,), whole numbers in 0..K-1.
        threat: the ball that attacks may move in; `Linf(epsilon=8/255)`.
        measures: None takes `STANDARD`: clean, PGD-20, CW, AutoAttack.
        device: where the model is; None asks its parameters.

    Returns:
        A result for each measure, by key.

    Raises:
        DataError: images or labels are not as above, or the model does not return logits.
        SpecError: two measures have one key.
    """
    measures = STANDARD if measures is None else measures
    keys = [measure.key for measure in measures]
    for key in keys:
        if keys.count(key) > 1:
            raise SpecError(f"two measures report as '{key}'", place="measures", remedy="give one of them another key")
    _check_images(images)
    where = _device_of(model, images) if device is None else torch.device(device)

    def load(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = images[rows.to(images.device)].detach().to(where).float()
        return x, labels[rows.to(labels.device)].to(where).long()

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # attacks differentiate, whatever the caller is in
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(where.type, enabled=False))
        stack.enter_context(as_found(model))
        model.eval()
        logits = LogitsOf(model)
        classes = _classes(logits, images[:1].detach().to(where).float())
        _check_labels(labels, len(images), classes)
        world = World(
            samples=len(images),
            training=len(images),
            classes=classes,
            image_shape=(images.shape[1], images.shape[2], images.shape[3]),
            device=where,
        )
        predict = ModulePredictor(logits)
        results = {}
        for measure in measures:
            rows = _rows(measure, None, len(images))
            results[measure.key] = _measure(measure, rows, load, predict, model, threat, world, seed, batch_size, None)
        return results


def _rows(measure: Measure, limit: int | None, total: int) -> Tensor:
    limits = [bound for bound in (limit, getattr(measure, "images", None)) if bound is not None]
    return fixed_part(total, min(limits, default=None))


def _measure(
    measure: Measure,
    rows: Tensor,
    load: Callable[[Tensor], tuple[Tensor, Tensor]],
    predict: Predict,
    model: nn.Module,
    threat: ThreatModel,
    world: World,
    seed: int,
    batch_size: int,
    on_slice: OnSlice | None,
) -> Result:
    began = time.perf_counter()
    size = getattr(measure, "slice_size", batch_size)
    mine = list(enumerate(torch.split(rows, size)))[world.rank :: world.size]
    total = sum(len(part) for _, part in mine)
    outcomes = torch.zeros(len(rows), dtype=torch.int64, device=world.device)
    reports = []
    done = right = 0
    with torch.inference_mode(False), torch.no_grad():
        for number, part in mine:
            x, y = load(part)
            found = measure.outcomes(predict, model, x, y, threat, derive(seed, measure.key, number))
            outcomes[number * size : number * size + len(part)] = found.right
            reports.append(json.dumps([number, len(part), found.breakdown, found.notes]))
            done, right = done + len(part), right + int(found.right.sum())
            if on_slice is not None:
                on_slice(done, total, right)
    flags = [bool(outcome) for outcome in world.sum(outcomes).tolist()]
    slices = sorted(map(json.loads, _everyone(reports, world)), key=lambda report: int(report[0]))
    breakdown = {
        name: math.fsum(count * parts[name] for _, count, parts, _ in slices) / len(flags)
        for name in (slices[0][2] if slices else ())
    }
    notes = [note for *_, said in slices for note in said]
    if hasattr(measure, "remarks"):
        notes.extend(measure.remarks(breakdown))
    return Result(
        key=measure.key,
        accuracy=sum(flags) / len(flags),
        n=len(flags),
        ci95=wilson(sum(flags), len(flags)),
        seconds=time.perf_counter() - began,
        breakdown=breakdown,
        notes=tuple(dict.fromkeys(notes)),
        outcomes=flags,
    )


def _everyone(lines: list[str], world: World) -> list[str]:
    """The lines (ASCII) of all processes."""
    text = "".join(f"{line}\n" for line in lines).encode()
    rows = torch.tensor(list(text), dtype=torch.uint8, device=world.device)
    return bytes(world.gather_rows(rows).tolist()).decode().splitlines()


def _device_of(model: nn.Module, images: Tensor) -> torch.device:
    parameter = next(model.parameters(), None)
    return images.device if parameter is None else parameter.device


def _classes(logits: nn.Module, image: Tensor) -> int:
    """K, from one forward."""
    try:
        output: Tensor = logits(image)
    except AttributeError as error:  # neither a tensor nor an Output
        raise DataError(f"does not return logits: {error}", place="model") from error
    if output.ndim != 2 or output.shape[1] < 2:
        raise DataError(f"logits must be (B, K) with K >= 2, got {tuple(output.shape)}", place="model")
    return output.shape[1]


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise DataError(
            f"must be (N, C, H, W) floating point, N >= 1, got {tuple(images.shape)} {images.dtype}",
            place="images",
            remedy="divide 8-bit pixels by 255",
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"pixels must be in [0, 1], but range from {low:g} to {high:g}",
            place="images",
            remedy="divide 8-bit pixels by 255, and put normalisation inside the model",
        )


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if labels.shape != (images,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"must be ({images},) whole numbers, got {tuple(labels.shape)} {labels.dtype}",
            place="labels",
            remedy="give one class number for each image",
        )
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"label {int(labels[row])} of image {row} is not one of 0..{classes - 1}",
            place="labels",
            remedy=f"the model has {classes} logits: is it for these data?",
        )
