"""Before hours are spent: is what is about to be judged, or trained, what its maker thinks it is?

`preflight` tries a model on a handful of its images, `preflight_run` a run that is about to begin. Each check is a
small function and gives one Finding: "failure" where a result would mean nothing, "warning" where it probably is not
what was meant. A check that cannot be made is "skipped"; none raises. Modes, statistics, gradients and random states
are left as found. On several processes each checks for itself: nothing here waits for another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

from robustkit.core.errors import DataError, UserError
from robustkit.core.parts import Parts
from robustkit.core.recipe import result_key
from robustkit.core.strategy import Measure, ThreatModel
from robustkit.evaluation.findings import Finding, finding
from robustkit.evaluation.logits import as_found
from robustkit.evaluation.preflight import costs
from robustkit.evaluation.preflight.case import Case, Sample, case_of, sample_of
from robustkit.evaluation.preflight.costs import passes_of, span
from robustkit.evaluation.preflight.gradients import gradient, one_step, radius_zero
from robustkit.evaluation.preflight.images import epsilon, input_range
from robustkit.evaluation.preflight.model import accuracy, determinism, labels, logits, modes, normalisation, pretrained

__all__ = ["CHECKS", "Case", "lines", "passes_of", "preflight", "preflight_run", "refuse", "span", "tried"]

CHECKS: dict[str, Callable[[Case], Finding]] = {
    "modes": modes,
    "normalisation": normalisation,
    "accuracy": accuracy,
    "determinism": determinism,
    "gradient": gradient,
    "one step": one_step,
    "radius 0": radius_zero,
    "memory": costs.memory_of_evaluation,
}
"""Of any model, after those of images, radius, logits and labels (`_begin`)."""
BEFORE_TRAINING = ("normalisation", "determinism", "gradient", "one step", "radius 0")
"""Accuracy and batch statistics have nothing to show yet."""


def preflight(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    threat: ThreatModel,
    classes: int | None = None,
    measures: Sequence[Measure] = (),
    test_images: int | None = None,
    batch_size: int = 128,
) -> tuple[Finding, ...]:
    """Checks, in seconds, that an evaluation of `model` would mean what it seems to.

    Args:
        model: any module; it is tried where it is, and left as found.
        images, labels: as `evaluate` takes them; a few of them are tried.
        threat: the ball it is to be judged in.
        classes: of the data set, where the labels at hand do not tell.
        measures: what is to be measured, to predict how long it takes.
        test_images: how many images are to be judged (None: all of `images`).
        batch_size: images that are forwarded at a time.

    Returns:
        A finding for each check, in order. After a failure of images, logits or labels nothing else is tried.
    """
    with _nothing_changed(model), ExitStack() as stack:
        try:
            sample = sample_of(images, labels)
        except (UserError, ValueError, TypeError, IndexError) as error:
            return (finding("images", "failure", str(error).removeprefix("images: ")),)
        found, case = _begin(stack, model, [threat], sample, classes=classes, batch_size=batch_size)
        if case is None:
            return tuple(found)
        found += [tried(name, check, case) for name, check in CHECKS.items()]
        if measures:
            count = sample.total if test_images is None else test_images
            tasks = [(measure.key, threat, measure, count) for measure in measures]
            found.append(tried("evaluation time", costs.evaluation_time, case, tasks))
    return tuple(found)


def preflight_run(parts: Parts) -> tuple[Finding, ...]:
    """Checks, in seconds, that a run which is about to train is the one that was meant."""
    recipe, data, n = parts.recipe, parts.data, len(parts.data.test)
    threats = list(dict.fromkeys([recipe.threat, *(suite.threat or recipe.threat for suite in recipe.evaluation)]))
    measures = [(suite, suite.threat or recipe.threat, measure) for suite, measure in recipe.measures()]
    tasks = [(result_key(suite, m), threat, m, min(suite.images or n, n)) for suite, threat, m in measures]
    with _nothing_changed(parts.model):
        sample = sample_of(parts.train, rows=parts.rows)
        known = {"classes": len(data.classes), "batch_size": recipe.batch_size, "trained": False}
        with ExitStack() as stack:
            found, case = _begin(stack, parts.model, threats, sample, **known)
            if case is None:
                return tuple(found)
            found.append(tried("test labels", labels, attrs.evolve(case, labels=data.test.labels), "test labels"))
            found.append(tried("pretrained", pretrained, parts))
            found += [tried(name, CHECKS[name], case) for name in BEFORE_TRAINING]
            checkpoints = 2 if len(parts.validation_rows) and recipe.epochs > 1 else 1
            evaluation = tried("evaluation time", costs.evaluation_time, case, tasks, checkpoints)
        found.append(tried("memory", costs.memory_of_training, parts, case.x))
        if found[-1].verdict != "failure":
            training = tried("training time", costs.training_time, parts, case.x)
            found += [training, costs.worth(training, evaluation)]
    return tuple(found)


def lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines for a terminal: one for each that is amiss, and one with the count and the predicted times."""
    verdicts = [found.verdict for found in findings]
    shown, last = [], f"preflight: {verdicts.count('ok')} checks ok"
    if "skipped" in verdicts:
        last += f", {verdicts.count('skipped')} skipped"
    for found in findings:
        if found.verdict in ("warning", "failure"):
            shown.append(f"preflight: {found.check}: {found.evidence}" + (found.remedy and f"; {found.remedy}"))
        if "seconds" in found.data:
            last += f", {found.check.removesuffix(' time')} predicted {span(found.data['seconds'])}"
    return [*shown, last]


def refuse(findings: Sequence[Finding]) -> None:
    """Raises UserError where a check failed."""
    for found in findings:
        if found.verdict == "failure":
            raise UserError(found.evidence, place=f"preflight: {found.check}", remedy=found.remedy)


def tried(name: str, check: Callable[..., Finding], *arguments: Any) -> Finding:
    """What the check finds; "skipped" where it cannot be made."""
    try:
        return check(*arguments)
    except Exception as error:  # a check must never be what stops an evaluation
        return finding(name, "skipped", f"{type(error).__name__}: {error}".splitlines()[0])


def _begin(
    stack: ExitStack, model: nn.Module, threats: Sequence[ThreatModel], sample: Sample, **known: Any
) -> tuple[list[Finding], Case | None]:
    """The first findings, and what other checks look at (until `stack` ends): None after a failure."""
    found = [input_range(sample), *(epsilon(threat, sample.x) for threat in threats)]
    if found[0].verdict == "failure":
        return found, None
    try:
        case = case_of(stack, model, threats[0], sample, **known)
    except DataError as error:
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        remedy = f"its weights are {kinds.pop()}, images float32: give model.float()" if kinds else error.remedy
        return [*found, finding("logits", "failure", error.fault, remedy)], None
    except Exception as error:
        return [*found, finding("logits", "failure", f"the model cannot be called: {error!r}")], None
    found += [logits(case), tried("labels", labels, case)]
    return found, None if found[-1].verdict == "failure" else case


@contextmanager
def _nothing_changed(model: nn.Module) -> Iterator[None]:
    """Afterwards random states, buffers and modes are what they were; gradients nothing here collects."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.inference_mode(False), as_found(model), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in buffers and not torch.equal(buffer, buffers[name]):
                        buffer.copy_(buffers[name])
