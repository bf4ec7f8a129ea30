"""Will it fit, and how long will it take? Memory is tried on a GPU, estimated on the CPU; passes are timed here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkit.core.batch import Passes, Progress
from robustkit.core.parts import Parts
from robustkit.core.strategy import Measure, ThreatModel
from robustkit.engine import Predictor
from robustkit.evaluation.findings import Finding, Verdict, finding
from robustkit.evaluation.logits import LogitsOf
from robustkit.evaluation.preflight.case import Case, few, seconds, slope

HOUR, DAY = 3600.0, 24 * 3600.0

Work = Callable[[Tensor], object]
"""What is done with some images at once."""
Task = tuple[str, ThreatModel, Measure, int]
"""What is measured: its key, in which ball, how, and on how many images."""


class Pace(NamedTuple):
    """Seconds per image of a forward, of a backward to the images, and of one to the parameters."""

    forward: float
    input_backward: float
    parameter_backward: float = 0.0

    def seconds(self, passes: Passes) -> float:
        return math.fsum(map(operator.mul, attrs.astuple(passes), self))


def training_pass(parts: Parts, images: Tensor) -> None:
    """One forward, and one backward to the parameters, in training's mode and precision."""
    y = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    predict = Predictor(parts.model, parts.world.device, parts.precision.outer)
    with torch.enable_grad(), parts.model.using("train-frozen"):
        output = predict(images, y)
        loss = F.cross_entropy(output.margined, y) + output.penalty.mean()
        trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)


def memory_of_evaluation(case: Case) -> Finding:
    """One forward of a batch, and one backward to the images."""
    logits = LogitsOf(case.module)  # the module itself, not a faster twin of it
    work = partial(slope, lambda images: logits(images).sum(dim=1))
    need = activations(work, case.x, case.module) * case.batch_size
    return fits(need, work, case.x, case.batch_size, "a smaller batch_size, or slice_size of AutoAttack")


def memory_of_training(parts: Parts, x: Tensor) -> Finding:
    """One pass of what a process forwards at once, besides gradients and momentum."""
    recipe, work = parts.recipe, partial(training_pass, parts)
    piece = math.ceil(recipe.batch_size / recipe.accumulate / parts.world.size)
    count = piece * math.ceil(max(1, recipe.loss.passes(parts.progress).forward))
    weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    remedy = f"a smaller batch_size, or accumulate={2 * recipe.accumulate}, which gives the same steps in pieces"
    return fits(activations(work, x, parts.model) * count + 2 * weights, work, x, count, remedy)


def activations(work: Work, x: Tensor, module: nn.Module) -> float:
    """Bytes for each image that `work` keeps for its backward, without weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work(few(x))
    return sum(size for pointer, size in kept.items() if pointer not in weights) / len(few(x))


def fits(need: float, work: Work, x: Tensor, count: int, remedy: str) -> Finding:
    """Whether a pass of `count` images, which keeps about `need` bytes, fits."""
    free = free_memory(x.device)
    verdict: Verdict = "ok"
    text = f"about {_bytes(need)} for {count} images at once" + ("" if free is None else f", {_bytes(free)} free")
    if x.device.type == "cuda":
        try:
            work(x.repeat(math.ceil(count / len(x)), 1, 1, 1)[:count])
        except torch.cuda.OutOfMemoryError:
            verdict, text = "failure", f"out of memory: {text}"
        finally:
            torch.cuda.empty_cache()
    elif free is not None and need > free:
        verdict = "warning"
    return finding("memory", verdict, text, remedy, need=need, free=free, images=count)


def free_memory(device: torch.device) -> float | None:
    """Bytes that may still be asked for, where that is known: by the device, or by Linux and a container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = []
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024.0 * sum(int(known[name].split()[0]) for name in ("MemAvailable", "SwapFree")))
        limit, used = (float(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    except (OSError, ValueError, KeyError):  # "max" is no number where there is no limit
        pass
    return min(free, default=None) if device.type == "cpu" else None


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def evaluation_time(case: Case, tasks: Sequence[Task], checkpoints: int = 1) -> Finding:
    """How long the measures take; those whose cost is not known are left out."""
    pace = pace_of(case.subject.logits, case.x, case.batch_size)
    parts: dict[str, float] = {}
    for key, threat, measure, total in tasks:
        passes = passes_of(measure, threat.norm, case.logits.shape[1])
        if passes is not None:
            images = min(total, getattr(measure, "images", None) or total)
            parts[key] = parts.get(key, 0.0) + checkpoints * images * pace.seconds(passes)  # one key in two balls
    whole = math.fsum(parts.values())
    text = f"predicted {span(whole)}: " + ", ".join(f"{key} {span(value)}" for key, value in parts.items())
    if unknown := ", ".join(key for key, *_ in tasks if key not in parts):
        text += f"; without {unknown}, whose cost is not known"
    data: dict[str, Any] = {"parts": parts, "pace": pace._asdict()} | ({"seconds": whole} if parts else {})
    remedy = "limit the images (--limit, or a suite's images=1000), or take a faster device"
    return finding("evaluation time", "warning" if whole > DAY else "ok", text, remedy, **data)


def training_time(parts: Parts, x: Tensor) -> Finding:
    """How long training takes: passes of all steps, and of validation."""
    recipe, steps, size = parts.recipe, parts.steps_per_epoch, parts.world.size
    attacking = Predictor(parts.model, parts.world.device, parts.precision.attack)
    with torch.no_grad(), attacking.using("eval"):
        pace = pace_of(lambda images: attacking(images).logits, x, recipe.batch_size)
    pure = seconds_per_image(partial(training_pass, parts), x, recipe.batch_size)
    pace = pace._replace(parameter_backward=max(0.0, pure - pace.forward))
    epochs = [Progress.at(epoch * steps, recipe.epochs, steps) for epoch in range(recipe.epochs)]
    costs = [sum(recipe.mean_passes(progress).values(), Passes()) for progress in epochs]
    in_steps = len(parts.order(0)) * math.fsum(map(pace.seconds, costs))
    validation, held_out, once = recipe.validation, len(parts.validation_rows), Passes(forward=1)
    attack = Passes() if validation.attack is None else validation.attack.passes(parts.progress) + once
    images = held_out + min(validation.train_images, len(parts.rows)) if held_out else 0
    in_validation = math.ceil(recipe.epochs / validation.every) * images * pace.seconds(attack + once)
    total = (in_steps + in_validation) / size
    text = f"predicted {span(total)}: {span(in_steps / size)} in steps, {span(in_validation / size)} in validation"
    data = {"seconds": total, "steps": in_steps, "validation": in_validation, "pace": pace._asdict()}
    remedy = "a GPU, fewer epochs, or a smaller model; --smoke tries all parts in seconds"
    return finding("training time", "warning" if total > 7 * DAY else "ok", text, remedy, **data)


def worth(training: Finding, judged: Finding) -> Finding:
    """The finding on evaluation, with a word where it takes longer than training and more than an hour."""
    ours, theirs = judged.data.get("seconds", 0.0), training.data.get("seconds", math.inf)
    if judged.verdict != "ok" or ours <= max(theirs, HOUR):
        return judged
    text, remedy = f"{judged.evidence}; that is more than training", "limit the images of evaluation, e.g. to 1000"
    return finding(judged.check, "warning", text, remedy, **judged.data)


def passes_of(measure: Measure, norm: str, classes: int) -> Passes | None:
    """What a measure costs per image, where half of the images resist; None where it does not say."""
    passes: Passes | None = measure.passes(norm, classes) if hasattr(measure, "passes") else None
    return passes


def pace_of(logits: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Pace:
    forward = seconds_per_image(logits, x, batch_size)
    both = seconds_per_image(partial(slope, lambda images: logits(images).sum(dim=1)), x, batch_size)
    return Pace(forward, max(0.0, both - forward))


def seconds_per_image(work: Work, x: Tensor, batch_size: int) -> float:
    """In batches as large as there is time for."""
    each = seconds(work, few(x)) / len(few(x))
    if each * batch_size > 0.25 and x.device.type == "cpu":
        return each
    images = x.repeat(math.ceil(batch_size / len(x)), 1, 1, 1)[:batch_size]
    work(images)
    return min(seconds(work, images) for _ in range(2)) / len(images)


def span(seconds: float) -> str:
    """A duration to the accuracy of a prediction: '12 s', '53 min', '7.5 h', '3 days'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / HOUR:.2g} h" if seconds < 2 * DAY else f"{round(seconds / DAY):,} days"
